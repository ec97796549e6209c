"""``ddpmctl compare``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ddpmctl.cli.common import Given
from ddpmctl.cli.completion import checkpoints
from ddpmctl.cli.data_options import data_source
from ddpmctl.cli.options import RUNS, Assume, ClassifierFile, ConditionFiles, ConfigFile, Data, RunsDir, SceneCount, command
from ddpmctl.cli.outputs import Outputs, figure_line, output_option, prepare_output
from ddpmctl.cli.terminal import Terminal
from ddpmctl.errors import UsageError

if TYPE_CHECKING:
    from ddpmctl.comparison.fidelity import FidelityContrast
    from ddpmctl.comparison.recorded import Comparison
    from ddpmctl.comparison.verdict import Arm
    from ddpmctl.evaluation.evaluate import EvaluationSpec
    from ddpmctl.evaluation.fidelity import Reference

OUT = Path("comparison.png")


@command("sampling", "device")
def compare(
    given: dict[str, str],
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUNS", help="Two or more runs, checkpoints, or folders of report-style .pth files.", show_default=False, autocompletion=checkpoints
        ),
    ],
    at_epoch: Annotated[int | None, typer.Option(min=1, help="Epoch to compare at (the last that all have reached).", show_default=False)] = None,
    last: Annotated[int, typer.Option(min=1, help="Evaluations that mean and standard deviation are taken over.")] = 10,
    repeats: Annotated[int, typer.Option("--repeats", "-r", min=1, max=1000, help="Images for each condition that the verdict rests on.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise, the same for all.")] = 0,
    recorded: Annotated[bool, typer.Option("--recorded", help="Only compare the recorded scores: no sampling, no verdict on new images.")] = False,  # noqa: FBT002
    anyway: Annotated[bool, typer.Option("--anyway", help="Compare although evaluators or samplers differ.")] = False,  # noqa: FBT002
    fidelity: Annotated[bool, typer.Option("--fidelity", help="Compare also how close the images are to real ones.")] = False,  # noqa: FBT002
    data: Data = None,
    scenes: SceneCount = None,
    conditions: ConditionFiles = None,
    evaluator: ClassifierFile = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="PNG of accuracy over epochs; the verdict's figure stands beside it.")] = OUT,
    json_file: Annotated[Path | None, output_option("--json", "Write what is found as JSON.")] = None,
    csv_file: Annotated[Path | None, output_option("--csv", "Write the differences as CSV.")] = None,
    latex: Annotated[Path | None, output_option("--latex", "Write the verdict's tables as LaTeX (booktabs, graphicx).")] = None,
    html: Annotated[Path | None, output_option("--html", "Write one page with everything, to open in a browser.")] = None,
    runs_dir: RunsDir = RUNS,
    config: ConfigFile = None,
    assume: Assume = None,
) -> None:
    """Compare runs: settings that differ, accuracies, losses, figures, and a verdict on which one is better.

    ddpmctl compare runs/gelu runs/relu
    ddpmctl compare runs/gelu-* runs/relu-* --repeats 16 --html verdict.html
    ddpmctl compare --recorded runs/gelu runs/relu

    The verdict scores each run's last checkpoint (or that of --at-epoch) again, all on the same conditions and the same noise. Runs that
    differ only in the seed are one arm, and the variance between them is part of the verdict.
    """
    source = data_source(data, scenes)
    terminal = Terminal()
    chosen = Given.of(given, config, assume)
    outputs = Outputs(json_file, csv_file, latex, html, out)
    _prepare(outputs, recorded=recorded, fidelity=fidelity)

    from ddpmctl.runs.named import located_all

    paths = located_all(paths, runs_dir)
    comparison = _recorded(terminal, paths, at_epoch, last, out, alone=recorded, anyway=anyway)
    if recorded:
        assert comparison is not None  # otherwise it was refused
        _tell_curves(terminal, comparison, outputs)
        return

    from ddpmctl.comparison.verdict import checkpoint_of
    from ddpmctl.interface.choices import evaluation_spec, known_conditions, named_conditions, reference_images

    known, source = known_conditions(source, [checkpoint_of(path, at_epoch) for path in paths[:1]])
    files = named_conditions(conditions, known)
    spec = replace(evaluation_spec(files, evaluator, source.path, known.task, **vars(chosen), seed=seed, repeats=repeats), every_image=fidelity)
    against = terminal.finish(reference_images(spec, source)) if fidelity else None  # first, so that conditions are refused before sampling
    _on_new_images(terminal, paths, at_epoch, comparison, spec, outputs, against, anyway=anyway)


def _prepare(outputs: Outputs, *, recorded: bool, fidelity: bool) -> None:
    """Refuse outputs that this comparison does not make, and check before the work starts that the others can be written.

    Raises:
        UsageError: an output cannot be made or written.
    """
    for_verdict = (("--latex", outputs.latex), ("--html", outputs.html), ("--fidelity", fidelity))
    if recorded and (unmade := [flag for flag, value in for_verdict if value]):
        raise UsageError(f"{', '.join(unmade)}: cannot be combined with --recorded, which makes no verdict on new images")
    if outputs.only_json:
        raise UsageError("--json -: compare prints its tables on stdout; give --json the name of a file")
    outputs.prepare()
    if not recorded:
        assert outputs.out is not None
        prepare_output(_verdict_figure(outputs.out), "--out", folder=False)


def _verdict_figure(out: Path) -> Path:
    return out.with_name(f"{out.stem}-verdict.png")


def _on_new_images(
    terminal: Terminal, paths: list[Path], at_epoch: int | None, comparison: Comparison | None, spec: EvaluationSpec, outputs: Outputs,
    against: tuple[Reference, str] | None, *, anyway: bool,
) -> None:  # fmt: skip
    """Score the runs' checkpoints on the same noise, and show the verdict, or why there is none."""
    from ddpmctl.comparison.recorded import short_names
    from ddpmctl.comparison.verdict import checkpoint_of, score_arms

    names = {checkpoint_of(path, at_epoch): name for path, name in zip(paths, short_names(paths), strict=True)}
    arms = terminal.finish(score_arms(names, spec, anyway=anyway))
    if len(arms) > 1:
        contrasts = _fidelity(terminal, arms, against[0], spec) if against else ()
        _conclude(terminal, comparison, arms, spec, outputs, contrasts)
    else:
        reason = "the runs differ only in the seed" if arms and len(arms[0].rows) > 1 else "the weights of fewer than two arms load"
        unmade = f"; not written: {', '.join(map(str, outputs.files().values()))}" if outputs.files() else ""
        terminal.warn(f"no verdict: {reason}{unmade}")


def _fidelity(terminal: Terminal, arms: list[Arm], reference: Reference, spec: EvaluationSpec) -> tuple[FidelityContrast, ...]:
    """Return the differences of fidelity of every pair."""
    from ddpmctl.comparison.fidelity import fidelity_contrasts
    from ddpmctl.evaluation.fidelity import PreparedReference

    return terminal.finish(fidelity_contrasts(arms, PreparedReference(reference, spec.tools().classifier)))


def _recorded(terminal: Terminal, paths: list[Path], at_epoch: int | None, last: int, out: Path, *, alone: bool, anyway: bool) -> Comparison | None:
    """Show the scores that the runs recorded and return them; they may be missing, unless they are ``alone`` asked for."""
    from ddpmctl.comparison.recorded import NothingRecorded, compare_recorded, refuse_unlike
    from ddpmctl.report.figures import save_comparison_figure
    from ddpmctl.report.tables import loss_table, recorded_table

    try:
        comparison = compare_recorded(paths, at_epoch=at_epoch, last=last)
    except NothingRecorded as error:
        if alone:
            raise
        terminal.warn(f"no table of what was recorded: {error}")
        return None
    if alone and not anyway:
        refuse_unlike(comparison)
    for warning in comparison.warnings:
        terminal.warn(warning)
    if comparison.differing:
        rows = [[name, *map(str, values)] for name, values in comparison.differing.items()]
        terminal.table("settings that differ", ["setting", *(arm.name for arm in comparison.arms)], rows)
    else:
        terminal.result("settings that differ: none that are known")
    for table in [*(recorded_table(comparison, file) for file in comparison.files), loss_table(comparison)]:
        if table is not None:
            terminal.table(table.title, table.columns, table.rows)
    terminal.result(figure_line(save_comparison_figure(out, comparison)))
    return comparison


def _tell_curves(terminal: Terminal, comparison: Comparison, outputs: Outputs) -> None:
    """Show what the recorded curves tell, and write it in the forms asked for."""
    from ddpmctl.comparison.curves import curve_verdict
    from ddpmctl.report.curves import curve_tables, curves_as_dict, write_curves_csv
    from ddpmctl.report.json_csv import write_json

    found = curve_verdict(comparison)
    for table in curve_tables(found):
        terminal.table(table.title, table.columns, table.rows, caption=table.note)
    for sentence in found.sentences():
        terminal.sentence(sentence)
    result = curves_as_dict(comparison, found)
    outputs.write(terminal, json=lambda file: write_json(file, result), csv=lambda file: write_curves_csv(file, result))


def _conclude(
    terminal: Terminal, comparison: Comparison | None, arms: list[Arm], spec: EvaluationSpec, outputs: Outputs, contrasts: Sequence[FidelityContrast]
) -> None:
    """Show the verdict, and write it in the forms asked for."""
    from ddpmctl.comparison.verdict import pooled_files, verdict
    from ddpmctl.report.figures import save_verdict_figure
    from ddpmctl.report.json_csv import verdict_as_dict, write_json, write_table_csv
    from ddpmctl.report.latex import write_latex
    from ddpmctl.report.page import PageFigure, write_comparison_page
    from ddpmctl.report.tables import fidelity_contrast_table, images_per_condition, settings_table, verdict_tables

    found, compute = verdict(arms, pooled_files(spec.conditions)), spec.compute
    title = f"classifier {spec.classifier.describe()}; {images_per_condition(spec.repeats)}; {compute.kind}, {compute.precision}"
    title = "; ".join(filter(None, (title, spec.classifier.warning)))
    tables = [*verdict_tables(found, title), *map(fidelity_contrast_table, contrasts)]
    for table in tables:
        terminal.table(table.title, table.columns, table.rows, caption=table.note)
    for sentence in found.sentences():
        terminal.sentence(sentence)
    assert outputs.out is not None
    figure = save_verdict_figure(_verdict_figure(outputs.out), found)
    terminal.result(figure_line(figure))
    outputs.write(
        terminal,
        json=lambda file: write_json(file, verdict_as_dict(found, spec, contrasts)),
        csv=lambda file: write_table_csv(file, tables[1]),
        latex=lambda file: write_latex(file, tables),
    )
    if outputs.html:
        figures = [PageFigure(figure.with_suffix(".svg"), "Accuracy of each arm, and their differences")]
        if comparison is not None:
            figures.append(PageFigure(outputs.out.with_suffix(".svg"), "Accuracy and loss over epochs, as recorded in training"))
        warnings = () if comparison is None else comparison.warnings
        settings = settings_table(found)
        shown = [*([settings] if settings else []), *tables]
        terminal.result(f"page: {write_comparison_page(outputs.html, found, shown, figures, warnings, spec)}")
