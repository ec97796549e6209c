"""``ddpmctl compare``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ddpmctl.cli.common import prepare_output
from ddpmctl.cli.options import command
from ddpmctl.cli.terminal import Terminal

if TYPE_CHECKING:
    from ddpmctl.engine.compare import Comparison, Point

OUT = Path("comparison.png")


@command()
def compare(
    paths: Annotated[list[Path], typer.Argument(help="Two or more runs, or folders of report-style .pth files.", show_default=False)],
    at_epoch: Annotated[int | None, typer.Option(min=1, help="Epoch to compare at (the last that all have reached).", show_default=False)] = None,
    last: Annotated[int, typer.Option(min=1, help="Evaluations that mean and standard deviation are taken over.")] = 10,
    out: Annotated[Path, typer.Option("--out", "-o", help="PNG of accuracy over epochs.")] = OUT,
) -> None:
    """Set runs side by side: settings that differ, accuracies, losses, and a figure."""
    terminal = Terminal()
    prepare_output(out, "--out", folder=False)

    from ddpmctl.engine.compare import FILES
    from ddpmctl.engine.compare import compare as run
    from ddpmctl.report.figures import save_comparison_figure

    comparison = run(paths, at_epoch=at_epoch, last=last)
    for warning in comparison.warnings:
        terminal.warn(warning)
    if comparison.differing:
        rows = [[name, *map(str, values)] for name, values in comparison.differing.items()]
        terminal.table("settings that differ", ["setting", *(arm.name for arm in comparison.arms)], rows)
    else:
        terminal.result("settings that differ: none that are known")
    for file in FILES:
        _table(terminal, comparison, file)
    terminal.result(f"figure: {save_comparison_figure(out, comparison)}")


def _table(terminal: Terminal, comparison: Comparison, file: str) -> None:
    at_epoch = [f"at epoch {comparison.epoch}", "loss"] if comparison.epoch is not None else []
    columns = ["run", *at_epoch, "last", "loss", "best", "loss", f"mean of last {comparison.last}", "sd"]
    rows = []
    for arm in comparison.arms:
        mean, deviation = arm.last_mean(file, comparison.last)
        cells = [arm.name]
        for point, expected in ((arm.at(comparison.epoch), comparison.epoch), (arm.points[-1], None), (arm.best(file), None)):
            cells += [] if point is None else [_accuracy(point, file, expected), _number(point.loss, 6)]
        rows.append([*cells, _number(mean, 4), _number(deviation, 4)])
    terminal.table(f"accuracy on {file}", columns, rows)


def _accuracy(point: Point, file: str, expected: int | None) -> str:
    """Return an accuracy, with its epoch where that is not the one in the heading."""
    where = "" if point.epoch == expected else f" ({point.epoch})"
    return f"{_number(point.accuracy[file], 4)}{where}"


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"
