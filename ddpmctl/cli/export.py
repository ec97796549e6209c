"""``ddpmctl export``."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ddpmctl.checkpoints.names import short_name
from ddpmctl.cli.common import chosen_checkpoint
from ddpmctl.cli.completion import checkpoints, one_of
from ddpmctl.cli.options import RUNS, Assume, RunsDir, command
from ddpmctl.cli.outputs import prepare_output
from ddpmctl.cli.terminal import Terminal
from ddpmctl.config import Value
from ddpmctl.config_sources import assumed
from ddpmctl.errors import DataError
from ddpmctl.files import require_new_folder
from ddpmctl.registry import EXPORTS


@command()
def export(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="A .pth file or a run; else the newest run's best.", show_default=False, autocompletion=checkpoints)
    ] = None,
    to: Annotated[
        str, typer.Option("--to", help=f"Form of the export ({', '.join(EXPORTS.names())}).", metavar="NAME", autocompletion=one_of(EXPORTS))
    ] = "safetensors",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder to make [default: export]; with --to page, the HTML file to write [default: model.html].", show_default=False),
    ] = None,
    beside: Annotated[
        Path | None,
        typer.Option(
            "--beside", help="With --to page: a second model, shown beside the first on the same noise.", show_default=False, autocompletion=checkpoints
        ),
    ] = None,
    licence: Annotated[str, typer.Option("--licence", help="Licence of the weights, as model hubs name it, e.g. mit.", show_default="none")] = "",
    repeats: Annotated[int, typer.Option("--repeats", min=0, max=1000, help="Images per condition of the scores on the model card; 0: no scores.")] = 1,
    half: Annotated[  # noqa: FBT002
        bool, typer.Option("--half", help="Round the weights to float16, which halves their size. The scores are those of the rounded weights.")
    ] = False,
    runs_dir: RunsDir = RUNS,
    assume: Assume = None,
) -> None:
    """Export a model for other programs. Images of the export and of the checkpoint are compared, on the same noise; if they differ, nothing is left.

    ddpmctl export runs/NAME -o model --licence mit
    ddpmctl export runs/NAME --to onnx -o model
    ddpmctl export runs/NAME --to page -o model.html
    """
    terminal = Terminal()
    form = EXPORTS.check(to)
    with terminal.busy("loading torch and the checkpoint"):
        from ddpmctl.export.card import Card
        from ddpmctl.export.exporting import export as exporting
        from ddpmctl.export.exporting import usable_form
        from ddpmctl.export.half import halved

        file: str = EXPORTS.get(form).file
        out = out or Path(file or "export")
        if not file:
            require_new_folder(out, "--out")
        prepare_output(out, "--out", folder=not file, suffix=Path(file).suffix)
        given = assumed(assume)
        chosen = [chosen_checkpoint(named, runs_dir, given, terminal) for named in (checkpoint, *([beside] if beside else []))]
        usable_form(form, chosen)  # refused before minutes of work
    with tempfile.TemporaryDirectory() as rounded:
        models = []
        for number, original in enumerate(chosen):
            model = halved(original, Path(rounded, str(number))) if half else original
            results = _results(terminal, original.path, model.path, repeats, given) if repeats and model.task.classes else None
            models.append((model, Card(_name(original.path) if file else out.resolve().name, _data(original.path), licence, results, half=half)))
        made = terminal.finish(exporting(models, form, out))
    terminal.result(str(made.out))
    terminal.say(f"{made.images} images on the same noise differ by at most {made.levels} of 255 levels, one call of the network by {made.call:.1g}")


def _name(checkpoint: Path) -> str:
    """Return the name by which other commands find a checkpoint, without the folders above it.

    That is the run for a run's best checkpoint, RUN/checkpoints/FILE for another one of a run, the folder for an exported model, and else the file.
    """
    from ddpmctl.runs.folder import Run, best_checkpoint

    folder = checkpoint.absolute().parent
    run = Run(folder.parent)
    if folder != run.checkpoints or not run.config_file.is_file():
        return short_name(checkpoint)
    best = best_checkpoint(run)
    return run.folder.name if best is not None and best[0].name == checkpoint.name else str(checkpoint.absolute().relative_to(run.folder.parent))


def _data(checkpoint: Path) -> str:
    """Return the training data in words, of a run's checkpoint; without the path of their folder."""
    from ddpmctl.runs.folder import Run
    from ddpmctl.runs.sources import RunSources

    run = Run(checkpoint.parent.parent)
    if not run.data_file.is_file():
        return ""
    sources = RunSources.load(run.data_file)
    return sources.describe() if sources.source.path is None else sources.source.path.name


def _results(terminal: Terminal, original: Path, checkpoint: Path, repeats: int, assume: dict[str, Value]) -> Mapping[str, Any] | None:
    """Return a checkpoint's scores for the model card, from the cache if they are there; None where there is no classifier.

    Conditions and classifier are those of ``original``, which may lie in a run.
    """
    from ddpmctl.evaluation.classifier_file import NoClassifierError
    from ddpmctl.evaluation.evaluate import evaluate_checkpoints
    from ddpmctl.interface.judging import specified
    from ddpmctl.report.json_csv import as_dict

    try:
        spec, known, _ = specified([original], repeats=repeats, assume=assume)
    except NoClassifierError as error:
        terminal.warn(f"the model card has no scores: {error}")
        return None
    rows, failures = terminal.finish(evaluate_checkpoints([checkpoint], spec))
    if not rows:
        raise DataError(f"{checkpoint}: {failures[0].reason}")
    return as_dict(rows, failures, spec, known.trained(spec.conditions), None)
