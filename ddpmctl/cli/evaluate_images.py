"""``ddpmctl evaluate --images``: scores of images that any program made, without a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ddpmctl.cli.common import beside_real
from ddpmctl.cli.outputs import Outputs, figure_line
from ddpmctl.cli.terminal import Terminal
from ddpmctl.config import Value, settings
from ddpmctl.data.source import DataSource
from ddpmctl.errors import UsageError

if TYPE_CHECKING:
    from ddpmctl.evaluation.evaluate import EvaluationSpec
    from ddpmctl.evaluation.image_files import ScoredFolder
    from ddpmctl.report.page import BesideReal


def refuse_sampling(given: Mapping[str, str], images: Sequence[Path] | None, **others: object) -> None:
    """Refuse, beside ``--images``, what is about checkpoints and sampling, and would be ignored in silence.

    Raises:
        UsageError: something of this was given, or a pattern without images.
    """
    if not images:
        raise UsageError("--pattern: names the files of --images; give both")
    flags = [setting.flag for setting in settings("sampling") if setting.name in given]
    flags += ["a checkpoint" if name == "paths" else f"--{name.replace('_', '-')}" for name, value in others.items() if value]
    if flags:
        raise UsageError(f"{', '.join(flags)}: cannot be combined with --images, which samples nothing")


def score_images(
    terminal: Terminal, folders: Sequence[Path], pattern: str | None, conditions: Sequence[Path] | None, source: DataSource,
    evaluator: Path | None, device: Mapping[str, Value], outputs: Outputs, *, breakdown: bool, fidelity: bool,
) -> None:  # fmt: skip
    """Score the images in folders, one for each condition file; print the results and write the requested files.

    Raises:
        UsageError, DataError: conditions, images or classifier cannot be used.
    """
    if len(folders) != len(conditions or ()):
        raise UsageError("--images: give --conditions test (or new_test, heldout, a JSON file), one for each folder and in the same order")

    with terminal.busy("loading torch"):
        from ddpmctl.data.dataset import load_conditions
        from ddpmctl.evaluation.classifiers import load_classifier
        from ddpmctl.evaluation.evaluate import EvaluationSpec
        from ddpmctl.evaluation.image_files import ONE, ImageFolder, check_pattern, score_folder
        from ddpmctl.interface.choices import agreed_device, named_conditions, reference_images
        from ddpmctl.report.scored_images import answers_of

    pattern = pattern or ONE
    check_pattern(pattern)
    known = load_conditions(source)
    named = named_conditions(conditions, known)
    sources = {name: ImageFolder(folder, pattern, sets) for folder, (name, sets) in zip(folders, named.items(), strict=True)}
    counts = {len(source.files()[0]) for source in sources.values()}  # before any work
    if len(counts) > 1:
        raise UsageError("--images: the folders have different numbers of images per condition; score them one by one")
    outputs.prepare()
    compute = agreed_device({"precision": "fp32", **device})  # classifiers work in float32
    spec = EvaluationSpec(named, load_classifier(evaluator, source.path, compute.device, known.task), compute, repeats=counts.pop())
    against = terminal.finish(reference_images(spec, source)) if fidelity else None
    scored = {name: terminal.finish(score_folder(source, spec.tools().classifier)) for name, source in sources.items()}
    beside = beside_real(terminal, ["images"], [answers_of(scored)], spec, *against) if against else None
    _conclude(terminal, scored, spec, known.trained(named), known.shares(named), outputs, beside, breakdown=breakdown)


def _conclude(
    terminal: Terminal, scored: Mapping[str, ScoredFolder], spec: EvaluationSpec, trained: Mapping[str, int], sentence: str, outputs: Outputs,
    beside: BesideReal | None, *, breakdown: bool,
) -> None:  # fmt: skip
    """Print the results and write the requested files."""
    from ddpmctl.files import json_text
    from ddpmctl.report.json_csv import write_json
    from ddpmctl.report.latex import write_latex
    from ddpmctl.report.page import answer_figures
    from ddpmctl.report.scored_images import answers_of, images_as_dict, images_table, write_images_csv, write_images_page
    from ddpmctl.report.tables import breakdown_tables

    table, answers = images_table(scored, spec.classifier), answers_of(scored)
    result = images_as_dict(scored, spec.classifier, trained, beside)
    if outputs.only_json:
        terminal.document(json_text(result))
    else:
        terminal.sentence(sentence)
        for part in (table, *(breakdown_tables(answers) if breakdown else ()), *(beside.tables if beside else ())):
            terminal.table(part.title, part.columns, part.rows, caption=part.note)
    outputs.write(
        terminal,
        json=lambda file: write_json(file, result),
        csv=lambda file: write_images_csv(file, result),
        latex=lambda file: write_latex(file, [table, *(beside.tables if beside else ())]),
    )
    if outputs.figures:
        for figure in answer_figures(outputs.figures, answers, "images", beside.fidelity[0] if beside else None):
            terminal.say(figure_line(figure.file.with_suffix(".png")))
    if outputs.html:
        terminal.say(f"page: {write_images_page(outputs.html, scored, table, [sentence], spec.classifier, beside)}")
