"""``ddpmctl show``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ddpmctl.cli.completion import run_names
from ddpmctl.cli.options import RUNS, RunsDir, command
from ddpmctl.cli.outputs import Outputs
from ddpmctl.cli.terminal import Terminal, human_seconds
from ddpmctl.cli.train import longer, next_commands
from ddpmctl.files import named_after

if TYPE_CHECKING:
    from ddpmctl.runs.record import Record, Scored

ROWS = 6  # scores in the text, so that it fits on a small screen


@command()
def show(
    run: Annotated[Path | None, typer.Argument(help="A run, by name or folder; else the newest one.", show_default=False, autocompletion=run_names)] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="PNG of curves and samples (show-NAME.png).", show_default=False)] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write one page with everything, to open in a browser.", show_default=False)] = None,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Show one run: its state, settings, scores, curves and last samples, and what can be done next.

    ddpmctl show
    ddpmctl show q30 --html q30.html

    The figure has accuracy, exact match and loss over epochs and minutes, and below them the sample grids of the last score. A run that is being trained can be
    shown too.
    """
    from ddpmctl.runs.named import located
    from ddpmctl.runs.record import newest_run, read_record

    terminal = Terminal()
    folder = located(run, runs_dir) if run else newest_run(runs_dir)
    record = read_record(folder)
    out = out or Path(named_after(folder.resolve().name, ".png", "show-"))
    Outputs(html=html, out=out).prepare()

    from ddpmctl.report.run_figures import save_run_figure

    for line in summary(record):
        terminal.result(line)
    if record.scored:
        rows = [_cells(one) for one in _some(record.scored, record.best)]
        marked = next(number for number, row in enumerate(rows) if record.best and row[0] == str(record.best.epoch))
        terminal.table("scores", score_columns(record), rows, marked=marked)
        for line in best_words(record):
            terminal.result(line)
    terminal.result(f"figure: {save_run_figure(out, record)}")
    if html:
        from ddpmctl.report.run_page import write_run_page

        lines = [*summary(record), *best_words(record), *(f"next: {text}" for text in commands(record))]
        terminal.result(f"page: {write_run_page(html, record, lines, score_columns(record), [_cells(one) for one in record.scored])}")
    for text in commands(record):
        terminal.result(f"next: {text}")


def score_columns(record: Record) -> list[str]:
    """Return the columns of a run's scores: of each condition file, accuracy and exact match."""
    return ["epoch", "minutes", "loss", *(column for name in record.files for column in (name, "exact"))]


def summary(record: Record) -> list[str]:
    """Return the state of a run, its data and its settings, one line each."""
    from ddpmctl.config_sources import in_words, nearest_preset
    from ddpmctl.files import in_bytes

    training = record.config.training
    time = human_seconds(record.seconds)
    done = f"{record.epochs} of {training.epochs} epochs, {time}" if training.minutes is None else f"{record.epochs} epochs, {time} of {training.minutes:g} min"
    preset, changed = nearest_preset(record.config)
    return [
        f"{record.run.folder}: {record.state}; {done} of training",
        f"data: {record.data}; size on disk: {in_bytes(record.size)}",
        f"settings: preset {preset}{f', but {in_words(changed)}' if changed else ''}",
    ]


def best_words(record: Record) -> list[str]:
    """Return which score is the best, by what, and its checkpoint if it is still there."""
    if record.best is None:
        return []
    if not record.files:
        return ["no classifier: the newest checkpoint is used", *([f"checkpoint: {newest}"] if (newest := record.run.pointer("latest")) else [])]
    file = record.run.checkpoint(record.best.checkpoint)
    return [f"best by mean accuracy: epoch {record.best.epoch}", *([f"checkpoint: {file}"] if file else [])]


def commands(record: Record) -> list[str]:
    """Return the commands that a run's state suggests."""
    folder = record.run.folder
    on = {"running": [], "stopped": [f"ddpmctl train --resume {folder}"], "finished": [longer(folder, record.config)]}[record.state]
    return [*(next_commands(folder, scored=bool(record.files)) if record.scored else []), *on]


def _some(scored: tuple[Scored, ...], best: Scored | None) -> list[Scored]:
    """Return a few scores, evenly over the run, the best and the last among them."""
    step = max(1, math.ceil(len(scored) / ROWS))
    kept = {one.epoch: one for one in (*scored[::-1][::step], *([best] if best else []))}
    return [kept[epoch] for epoch in sorted(kept)]


def _cells(one: Scored) -> list[str]:
    minutes = f"{one.seconds / 60:.1f}" if math.isfinite(one.seconds) else ""
    scores = [f"{value:.4f}" for name in one.accuracy for value in (one.accuracy[name], one.exact[name])]
    return [str(one.epoch), minutes, f"{one.loss:.5f}", *scores]
