"""``ddpmctl export``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ddpmctl.cli.common import chosen_checkpoint
from ddpmctl.cli.completion import checkpoints, one_of
from ddpmctl.cli.options import RUNS, Assume, RunsDir, command
from ddpmctl.cli.terminal import Terminal
from ddpmctl.config import Value
from ddpmctl.config_sources import assumed
from ddpmctl.errors import DataError
from ddpmctl.files import prepare_folder, require_new_folder
from ddpmctl.registry import EXPORTS


@command()
def export(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="A .pth file or a run; else the newest run's best.", show_default=False, autocompletion=checkpoints)
    ] = None,
    to: Annotated[
        str, typer.Option("--to", help=f"Form of the export ({', '.join(EXPORTS.names())}).", metavar="NAME", autocompletion=one_of(EXPORTS))
    ] = "safetensors",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to make.")] = Path("export"),
    licence: Annotated[str, typer.Option("--licence", help="Licence of the weights, as model hubs name it, e.g. mit.", show_default="none")] = "",
    repeats: Annotated[int, typer.Option("--repeats", min=0, max=1000, help="Images per condition of the scores on the model card; 0: no scores.")] = 1,
    runs_dir: RunsDir = RUNS,
    assume: Assume = None,
) -> None:
    """Export a model for other programs. It is sampled beside the checkpoint on the same noise; if the images differ, nothing is left.

    ddpmctl export runs/NAME -o model --licence mit
    ddpmctl export runs/NAME --to onnx -o model
    """
    terminal = Terminal()
    form = EXPORTS.check(to)
    require_new_folder(out, "--out")
    prepare_folder(out, "--out")

    with terminal.busy("loading torch and the checkpoint"):
        from ddpmctl.export.card import Card
        from ddpmctl.export.exporting import export as exporting
        from ddpmctl.export.exporting import usable_form

        given = assumed(assume)
        model = chosen_checkpoint(checkpoint, runs_dir, given, terminal)
        usable_form(form, model)  # refused before minutes of work
    results = _results(terminal, model.path, repeats, given) if repeats and model.task.classes else None
    card = Card(out.resolve().name, _data(model.path), licence, results)
    made = terminal.finish(exporting(model, form, out, card))
    terminal.result(str(made.folder))
    terminal.say(f"{made.images} images on the same noise differ by at most {made.levels} of 255 levels, one call of the network by {made.call:.1g}")


def _data(checkpoint: Path) -> str:
    """Return the training data in words, of a run's checkpoint; without the path of their folder."""
    from ddpmctl.runs.folder import Run
    from ddpmctl.runs.sources import RunSources

    run = Run(checkpoint.parent.parent)
    if not run.data_file.is_file():
        return ""
    sources = RunSources.load(run.data_file)
    return sources.describe() if sources.source.path is None else sources.source.path.name


def _results(terminal: Terminal, checkpoint: Path, repeats: int, assume: dict[str, Value]) -> Mapping[str, Any] | None:
    """Return the scores for the model card, from the cache if they are there; None where there is no classifier."""
    from ddpmctl.evaluation.classifier_file import NoClassifierError
    from ddpmctl.evaluation.evaluate import evaluate_checkpoints
    from ddpmctl.interface.judging import specified
    from ddpmctl.report.json_csv import as_dict

    try:
        spec, known, _ = specified([checkpoint], repeats=repeats, assume=assume)
    except NoClassifierError as error:
        terminal.warn(f"the model card has no scores: {error}")
        return None
    rows, failures = terminal.finish(evaluate_checkpoints([checkpoint], spec))
    if not rows:
        raise DataError(f"{checkpoint}: {failures[0].reason}")
    return as_dict(rows, failures, spec, known.trained(spec.conditions), None)
