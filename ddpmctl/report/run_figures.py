"""The curves of one run, and its last samples."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from PIL import Image

from ddpmctl.files import read_plain
from ddpmctl.report.style import COLOURS, DASHES, DPI, MARKERS, save_figure, write_figure
from ddpmctl.runs.record import Record

WIDTH, HEIGHT = 11.0, 4.2  # inches of the curves
SMALL_DPI = 80  # of the figure that training draws at each score
TICKS = 5  # of the axis in minutes, at most
LOG_FROM = 3  # ratio of the highest to the lowest loss from which its axis is logarithmic
MAX_GRID_BYTES, MAX_GRID_PIXELS = 2**26, 5 * 10**7  # of a grid of samples
DOTTED = 40  # epochs up to which the loss of each has a dot


def save_curves(path: Path, record: Record) -> Path:
    """Write the curves of a run as a small PNG, which takes a fraction of a second."""
    figure = Figure(figsize=(WIDTH, HEIGHT))
    draw_curves(figure, record)
    figure.subplots_adjust(left=0.05, right=0.98, top=0.82, bottom=0.13, wspace=0.17)  # faster than a layout that is computed
    return write_figure(path, figure, "png", dpi=SMALL_DPI)


def save_run_figure(path: Path, record: Record) -> Path:
    """Write the curves of a run, and below them its last sample grids, as PNG."""
    grids = {title: grid for title, file in last_samples(record) if (grid := _grid(file)) is not None}
    below = max((WIDTH / len(grids) * grid.shape[0] / grid.shape[1] + 0.4 for grid in grids.values()), default=0.0)
    figure = Figure(figsize=(WIDTH, HEIGHT + below), layout="constrained")
    parts = figure.subfigures(1 + bool(grids), 1, squeeze=False, height_ratios=[HEIGHT, below][: 1 + bool(grids)])[:, 0]
    draw_curves(parts[0], record)
    for number, (title, grid) in enumerate(grids.items()):
        axis = parts[1].add_subplot(1, len(grids), number + 1)
        axis.imshow(grid)
        axis.set_title(title, fontsize=11)
        axis.set_axis_off()
        axis.set_anchor("N")
    return write_figure(path, figure, "png", dpi=DPI)


def save_curves_for_page(path: Path, record: Record) -> Path:
    """Write the curves of a run as PNG and SVG."""
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    draw_curves(figure, record)
    return save_figure(path, figure)


def last_samples(record: Record) -> list[tuple[str, Path]]:
    """Return title and file of the sample grids of the last score; files that are gone, and what is no image, are left out."""
    if record.last is None:
        return []
    grids = [(f"samples of epoch {record.last.epoch}, {name}", record.run.samples / f"epoch{record.last.epoch}_{name}.png") for name in record.expected_images]
    return [(title, file) for title, file in grids if _grid(file) is not None]


def _grid(file: Path) -> np.ndarray | None:
    """Return a PNG, (H, W, 3), or None if it cannot be read: people only look at it."""
    try:
        with Image.open(io.BytesIO(read_plain(file, MAX_GRID_BYTES)), formats=("PNG",)) as image:
            return np.asarray(image.convert("RGB")) if image.width * image.height <= MAX_GRID_PIXELS else None
    except Exception:  # a damaged image can raise any error
        return None


def draw_curves(figure: FigureBase, record: Record) -> None:
    """Draw accuracy and exact match on the left and the loss on the right, over epochs and, where it is known, the time of training."""
    left, right = figure.subplots(1, 2, sharex=True)
    epochs = [one.epoch for one in record.scored]
    for number, name in enumerate(record.files):
        style = {"color": COLOURS[number], "linestyle": DASHES[number], "marker": MARKERS[number], "markersize": 4}
        left.plot(epochs, [one.accuracy[name] for one in record.scored], label=name, **style)
        left.plot(epochs, [one.exact[name] for one in record.scored], label=f"{name}, exact match", alpha=0.6, linewidth=1, markerfacecolor="none", **style)
    if record.best is not None and len(epochs) > 1:
        left.axvline(record.best.epoch, color=COLOURS[-1], linewidth=1, linestyle=":", label=f"best: epoch {record.best.epoch}")
    left.set(title="accuracy", xlabel="epoch", ylim=(0, 1.02))
    losses = [(point.epoch, point.loss) for point in record.losses or record.scored if math.isfinite(point.loss)]
    right.plot(*zip(*losses, strict=True) if losses else ([], []), color=COLOURS[2], marker="o" if len(losses) <= DOTTED else "", markersize=3)
    right.set(title="training loss", xlabel="epoch")
    if losses and 0 < LOG_FROM * min(loss for _, loss in losses) < max(loss for _, loss in losses):
        right.set_yscale("log")
    if epochs and record.files:
        left.legend(framealpha=0.9, edgecolor="none", fontsize=8, loc="lower right" if _mean_height(record) > 0.5 else "upper left")
    left.set_xlim(0, 1.03 * max(record.epochs, 1))
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
        _add_time(axis, record)


def _mean_height(record: Record) -> float:
    """Return the mean height of the last half of the curves, which the legend should not cover."""
    later = record.scored[len(record.scored) // 2 :]
    return sum(one.standing.accuracy for one in later) / len(later)


def _add_time(axis: Axes, record: Record) -> None:
    """Add the time of training at the top, at some of the epochs; seconds for a short run."""
    known = [(point.epoch, point.seconds) for point in record.losses if math.isfinite(point.seconds)]
    if not known:
        return
    step = -(-len(known) // TICKS)
    shown = known[::-1][::step]
    top = axis.secondary_xaxis("top")
    longest = known[-1][1]
    unit, name = (1, "seconds") if longest < 120 else (60, "minutes")
    digits = 1 if longest < 10 * unit else 0
    top.set_xticks([epoch for epoch, _ in shown], [f"{seconds / unit:.{digits}f}" for _, seconds in shown])
    top.set_xlabel(f"{name} of training", fontsize=9)
    top.tick_params(labelsize=8)
