"""``ddpmctl evaluate``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ddpmctl.cli.common import Given, beside_real, say_which
from ddpmctl.cli.completion import checkpoints as complete_checkpoints
from ddpmctl.cli.data_options import data_source
from ddpmctl.cli.evaluate_images import refuse_sampling, score_images
from ddpmctl.cli.options import RUNS, Assume, ClassifierFile, ConditionFiles, ConfigFile, Data, RunsDir, SceneCount, command
from ddpmctl.cli.outputs import Outputs, figure_line, output_option, prepare_output
from ddpmctl.cli.signals import when_stopped
from ddpmctl.cli.terminal import Terminal
from ddpmctl.config import Value, settings
from ddpmctl.distributed.job import Job
from ddpmctl.errors import DataError, UsageError

if TYPE_CHECKING:
    from ddpmctl.data.dataset import Conditions
    from ddpmctl.evaluation.evaluate import EvaluationSpec
    from ddpmctl.evaluation.fidelity import Reference
    from ddpmctl.evaluation.results import CheckpointResult, Failed
    from ddpmctl.evaluation.selection import Selection
    from ddpmctl.report.page import BesideReal


@command("sampling", "device")
def evaluate(
    given: dict[str, str],
    job: Job,
    paths: Annotated[
        list[Path] | None,
        typer.Argument(help="Checkpoints, runs or folders of .pth files; else the newest run's best.", show_default=False, autocompletion=complete_checkpoints),
    ] = None,
    data: Data = None,
    scenes: SceneCount = None,
    evaluator: ClassifierFile = None,
    conditions: ConditionFiles = None,
    images: Annotated[
        list[Path] | None,
        typer.Option("--images", help="Score the images in a folder, in the order of --conditions; both may be repeated.", show_default=False),
    ] = None,
    pattern: Annotated[
        str | None, typer.Option("--pattern", help="File names of --images; for several per condition {index}-{copy}.png.", show_default="{index}.png")
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", "-r", min=1, max=1000, help="Images per condition, each from different noise.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    recorded: Annotated[bool, typer.Option("--recorded", help="Also show what training recorded: epoch, loss, accuracies.")] = False,  # noqa: FBT002
    breakdown: Annotated[bool, typer.Option("--breakdown", help="Tables by class, colour, shape and number of objects, and of errors.")] = False,  # noqa: FBT002
    fidelity: Annotated[bool, typer.Option("--fidelity", help="Compare the sampled images with real ones: sharpness, variety, copies.")] = False,  # noqa: FBT002
    confirm: Annotated[bool, typer.Option(help="Score the best of several checkpoints again, on new noise.")] = True,  # noqa: FBT002
    json_file: Annotated[Path | None, output_option("--json", "Write the results as JSON ('-': to stdout, without tables).")] = None,
    csv_file: Annotated[Path | None, output_option("--csv", "Write the results as CSV.")] = None,
    latex: Annotated[Path | None, output_option("--latex", "Write the table as LaTeX (booktabs, graphicx).")] = None,
    html: Annotated[Path | None, output_option("--html", "Write all results as one HTML page.")] = None,
    figures: Annotated[Path | None, output_option("--figures", "Folder for figures of the best checkpoint, as PNG and SVG.")] = None,
    grid: Annotated[Path | None, output_option("--grid", "Folder for image grids.")] = None,
    sweep: Annotated[
        str | None, typer.Option("--sweep", help="Compare values of a sampling setting, e.g. steps=5,10,20,50 or guidance=0,1,2,4.", show_default=False)
    ] = None,
    runs_dir: RunsDir = RUNS,
    config: ConfigFile = None,
    assume: Assume = None,
) -> None:
    """Score checkpoints, or images, on the lab's conditions: the lab's accuracy with its 95 % interval, and exact match.

    ddpmctl evaluate checkpoints/
    ddpmctl evaluate runs/NAME --repeats 4 --breakdown --html scores.html
    ddpmctl evaluate --images images/test --conditions test

    In a narrow window (80 columns) the intervals stand on a second line, below the accuracies; from about 110 columns on, beside them.
    Results are cached: a second call is fast, and more repeats only sample the missing images.
    A broken file is listed and does not stop the others.
    """
    source = data_source(data, scenes)
    terminal = Terminal(silent=not job.is_leader)
    chosen = Given.of(given, config, assume)
    outputs = Outputs(json_file, csv_file, latex, html, figures=figures, grid=grid)
    if images or pattern:
        refused = {"paths": paths, "repeats": repeats != 1, "seed": seed, "sweep": sweep, "grid": grid, "assume": assume, "recorded": recorded}
        refuse_sampling(given, images, **refused, no_confirm=not confirm)
        if job.is_leader:
            score_images(terminal, images or [], pattern, conditions, source, evaluator, chosen.device, outputs, breakdown=breakdown, fidelity=fidelity)
        return
    varied = None if sweep is None else _varied(sweep, outputs, {"--recorded": recorded, "--breakdown": breakdown, "--fidelity": fidelity})
    if job.is_leader:
        outputs.prepare()

    from ddpmctl.interface.choices import evaluation_spec, known_conditions, named_conditions, reference_images

    checkpoints = job.from_leader(lambda: _checkpoints(paths, runs_dir, terminal))
    known, source = job.from_leader(lambda: known_conditions(source, checkpoints))
    spec = evaluation_spec(named_conditions(conditions, known), evaluator, source.path, known.task, **vars(chosen), seed=seed, repeats=repeats, job=job)
    spec = replace(spec, grids=grid, titles=_titles(checkpoints), every_image=fidelity)
    # Before sampling, so that data or conditions that cannot be used are refused at once.
    against = terminal.finish(reference_images(spec, source)) if fidelity and job.is_leader else None
    if varied is not None:
        failures = _sweep(terminal, checkpoints, spec, *varied, outputs)
    else:
        failures = _score(terminal, checkpoints, spec, known, outputs, against, confirm=confirm, recorded=recorded, breakdown=breakdown)
    if failures and job.is_leader:  # it alone: another process that ends with an error stops this one before its files are written
        count = len({failure.path for failure in failures})
        raise DataError(f"{count} of {len(checkpoints)} checkpoints could not be scored; see the reasons above")


def _score(
    terminal: Terminal, checkpoints: list[Path], spec: EvaluationSpec, known: Conditions, outputs: Outputs, against: tuple[Reference, str] | None,
    *, confirm: bool, recorded: bool, breakdown: bool,
) -> list[Failed]:  # fmt: skip
    """Score the checkpoints, print the results and write the requested files; return the failures."""
    from ddpmctl.evaluation.evaluate import evaluate_checkpoints
    from ddpmctl.report.names import checkpoint_names

    with when_stopped("checkpoints that were scored completely are kept in the cache, and the same command continues after them"):
        rows, failures = terminal.finish(evaluate_checkpoints(checkpoints, spec))
    if rows:
        names = checkpoint_names([row.path for row in rows], spec.titles)
        beside = beside_real(terminal, names, [row.answers for row in rows], spec, *against) if against else None
        _conclude(terminal, rows, names, failures, spec, known, outputs, beside, confirm=confirm, recorded=recorded, breakdown=breakdown)
    elif spec.job.is_leader:
        _write_values(terminal, outputs, [], failures, spec, {}, None)
    return failures


def _write_values(
    terminal: Terminal, outputs: Outputs, rows: list[CheckpointResult], failures: list[Failed], spec: EvaluationSpec,
    trained: Mapping[str, int], selection: Selection | None, beside: BesideReal | None = None,
) -> None:  # fmt: skip
    """Write JSON and CSV."""
    if not outputs.json and not outputs.csv:
        return

    from ddpmctl.files import json_text
    from ddpmctl.report.json_csv import as_dict, write_csv, write_json

    result = as_dict(rows, failures, spec, trained, selection, beside.fidelity if beside else ())
    if outputs.only_json:
        terminal.document(json_text(result))
    outputs.write(terminal, json=lambda file: write_json(file, result), csv=lambda file: write_csv(file, result))


def _conclude(
    terminal: Terminal, rows: list[CheckpointResult], names: list[str], failures: list[Failed], spec: EvaluationSpec, known: Conditions,
    outputs: Outputs, beside: BesideReal | None, *, confirm: bool, recorded: bool, breakdown: bool,
) -> None:  # fmt: skip
    """Print the results and write the requested files."""
    from ddpmctl.evaluation.selection import best_of, confirm_best
    from ddpmctl.report.latex import write_latex
    from ddpmctl.report.tables import breakdown_tables, evaluation_table, selection_sentence, training_table

    best = best_of(rows)
    selection = terminal.finish(confirm_best(rows, spec)) if confirm and len(rows) > 1 else None
    if not spec.job.is_leader:
        return
    table, trained = evaluation_table(rows, names, spec, best), known.trained(spec.conditions)
    further = [*([training_table(rows, names, spec)] if recorded else []), *(beside.tables if beside else ())]
    sentences = [known.shares(spec.conditions), *([selection_sentence(selection, names[best])] if selection else [])]
    if not outputs.only_json:
        terminal.sentence(sentences[0])
        terminal.table(table.title, table.columns, table.rows, groups=table.groups, marked=best, caption=table.note)
        for sentence in sentences[1:]:
            terminal.sentence(sentence)
        parts = [replace(part, title=f"{names[best]}: {part.title}") for part in breakdown_tables(rows[best].answers)] if breakdown else []
        for part in [*parts, *further]:
            terminal.table(part.title, part.columns, part.rows, caption=part.note)
    _write_values(terminal, outputs, rows, failures, spec, trained, selection, beside)
    outputs.write(terminal, latex=lambda file: write_latex(file, [table, *further]))
    if outputs.figures:
        from ddpmctl.report.page import evaluation_figures

        for figure in evaluation_figures(outputs.figures, rows[best], names[best], beside.fidelity[best] if beside else None):
            terminal.say(figure_line(figure.file.with_suffix(".png")))
    if outputs.html:
        from ddpmctl.report.page import write_evaluation_page

        recorded_too = [] if recorded else [training_table(rows, names, spec)]
        shown = [table, *recorded_too, *further]
        terminal.say(f"page: {write_evaluation_page(outputs.html, rows, best, names, shown, sentences, spec, beside)}")


def _checkpoints(paths: list[Path] | None, runs_dir: Path, terminal: Terminal) -> list[Path]:
    from ddpmctl.interface.choices import checkpoint_path
    from ddpmctl.runs.folder import find_checkpoints
    from ddpmctl.runs.named import located_all

    if paths:
        return [file for path in located_all(paths, runs_dir) for file in find_checkpoints(path)]
    found, which = checkpoint_path(None, runs_dir)
    say_which(terminal, found, which)
    return [found]


def _titles(checkpoints: list[Path]) -> dict[Path, str]:
    """Return unique names, from run and file, for checkpoints that share a file name."""
    names = [path.name for path in checkpoints]
    folders = {path: path.parent.parent if path.parent.name == "checkpoints" else path.parent for path in checkpoints}
    return {path: f"{folders[path].resolve().name}-{path.stem}" for path in checkpoints if names.count(path.name) > 1}


def _varied(text: str, outputs: Outputs, tables: dict[str, bool]) -> tuple[str, list[Value]]:
    """Return the setting and the values of ``--sweep``; refuse outputs that a sweep does not write."""
    unmade = {"--json": outputs.json, "--html": outputs.html, "--grid": outputs.grid, **tables}
    if asked := [flag for flag, value in unmade.items() if value]:
        raise UsageError(f"{', '.join(asked)}: cannot be combined with --sweep, which writes --csv, --latex and a figure in --figures")
    known = {setting.name: setting for setting in settings("sampling") if setting.kind in (int, float)}
    name, _, values = text.partition("=")
    name = name.strip().replace("-", "_")
    if name not in known or not values.strip():
        raise UsageError(f"--sweep {text!r}: give NAME=VALUE,VALUE with a name of {', '.join(known)}")
    return name, list(dict.fromkeys(known[name].check(value.strip()) for value in values.split(",")))


def _sweep(terminal: Terminal, checkpoints: list[Path], spec: EvaluationSpec, name: str, values: list[Value], outputs: Outputs) -> list[Failed]:
    """Print and plot accuracy over the values of one setting; return the failures."""
    from ddpmctl.evaluation.sweep import evaluate_sweep
    from ddpmctl.report.evaluation_figures import save_sweep
    from ddpmctl.report.json_csv import write_table_csv
    from ddpmctl.report.latex import write_latex
    from ddpmctl.report.names import checkpoint_names
    from ddpmctl.report.tables import Table, images_per_condition, in_brackets

    figure = (outputs.figures or Path()) / f"sweep-{name}.png"
    if spec.job.is_leader:
        prepare_output(figure, "--figures", folder=False)
    points, failures = terminal.finish(evaluate_sweep(checkpoints, spec, name, values))
    if not points or not spec.job.is_leader:
        return failures
    found = dict(zip(checkpoint_names(list(points), spec.titles), points.values(), strict=True))
    title = f"{', '.join(spec.conditions)} pooled; {images_per_condition(spec.repeats)}"

    def named(names: Iterable[str]) -> Table:
        lines = [
            [called, str(point.value), str(point.nfe), in_brackets(point.accuracy), f"{point.exact:.4f}"]
            for called, measured in zip(names, points.values(), strict=True)
            for point in measured
        ]
        return Table(title, ["checkpoint", name, "network calls", "accuracy", "exact"], lines)

    table = named(found)
    terminal.table(table.title, table.columns, table.rows)
    by_file = named(spec.titles.get(path, path.name) for path in points)  # other programs know a checkpoint by its file
    outputs.write(terminal, csv=lambda file: write_table_csv(file, by_file), latex=lambda file: write_latex(file, [table]))
    terminal.result(figure_line(save_sweep(figure, name, found)))
    return failures
