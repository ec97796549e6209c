"""Figures, drawn with matplotlib without a display."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.figure import Figure

from ddpmctl.engine.compare import FILES, Comparison
from ddpmctl.files import atomic_write

# Okabe & Ito's colours tell apart under colour blindness; markers and dashes without any colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX"
DPI = 130


def save_comparison_figure(path: Path, comparison: Comparison) -> Path:
    """Write a PNG with accuracy over epochs, a panel for each condition file, and the loss where it is recorded."""
    with_loss = any(not math.isnan(point.loss) for arm in comparison.arms for point in arm.points)
    titles = [*(f"accuracy on {name}" for name in FILES), *(["training loss"] if with_loss else [])]
    figure = Figure(figsize=(4.6 * len(titles), 4.4), layout="constrained")
    axes = figure.subplots(1, len(titles), squeeze=False)[0]
    for number, arm in enumerate(comparison.arms):
        epochs = [point.epoch for point in arm.points]
        series = [[point.accuracy[name] for point in arm.points] for name in FILES] + [[point.loss for point in arm.points]]
        for axis, values in zip(axes, series, strict=False):
            axis.plot(
                epochs,
                values,
                color=COLOURS[number % len(COLOURS)],
                linestyle=DASHES[number % len(DASHES)],
                marker=MARKERS[number % len(MARKERS)],
                markersize=4,
                label=arm.name,
            )
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes[: len(FILES)]:
        axis.set_ylim(0, 1.02)
    if with_loss:
        axes[-1].set_yscale("log")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=1 if max(map(len, labels)) > 40 else 2, fontsize=9, frameon=False)
    return save_figure(path, figure)


def save_figure(path: Path, figure: Figure) -> Path:
    """Write a figure as the PNG of the given name, and as SVG beside it; return the PNG."""
    for file, kind in ((path, "png"), (path.with_suffix(".svg"), "svg")):
        with atomic_write(file) as temporary:
            figure.savefig(temporary, format=kind, dpi=DPI, metadata={"Date": None} if kind == "svg" else None)
    return path
