"""A figure of how often labels occur together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ddpmctl.data.label_counts import LabelCounts
from ddpmctl.report.style import in_figure, save_figure

MOST = 40  # labels; of more, the most frequent


def save_label_figure(path: Path, counts: LabelCounts) -> Path:
    """Write the number of images that show each pair of labels; on the diagonal those that show the label."""
    names = list(counts.counts)
    chosen = np.sort(np.argsort(-np.diag(counts.together), kind="stable")[:MOST]) if names else np.empty(0, np.int64)
    table, shown = counts.together[np.ix_(chosen, chosen)], [in_figure(names[index]) for index in chosen]
    side = 2.5 + 0.34 * max(len(shown), 4)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axis = figure.subplots()
    if shown:
        edges = np.arange(len(shown) + 1) - 0.5
        image = axis.pcolormesh(edges, edges, table, cmap="Greys", vmin=0, edgecolors="face", linewidth=0.1)
        for (row, column), value in np.ndenumerate(table):
            axis.text(column, row, f"{value}", ha="center", va="center", fontsize=6, color="white" if value > 0.55 * table.max() else "black")
        axis.set_xticks(range(len(shown)), shown, rotation=90, fontsize=8)
        axis.set_yticks(range(len(shown)), shown, fontsize=8)
        axis.set(aspect="equal", ylim=(len(shown) - 0.5, -0.5))
        figure.colorbar(image, ax=axis, shrink=0.6, label="images that show both")
    more = f"; the {MOST} most frequent of {len(names)} labels" if len(names) > MOST else ""
    axis.set_title(f"labels in {counts.images} images{more}", fontsize=10)
    return save_figure(path, figure)
