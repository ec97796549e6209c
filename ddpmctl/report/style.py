"""What all figures share: colours, dashes, markers, and how a figure is written."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from ddpmctl.files import atomic_write

# Okabe & Ito's colour-blind safe palette; markers and dashes also work without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX"
DPI = 130


def save_figure(path: Path, figure: Figure) -> Path:
    """Write a figure as PNG and, with the same name, as SVG; return the path of the PNG."""
    for file, kind in ((path, "png"), (path.with_suffix(".svg"), "svg")):
        with atomic_write(file) as temporary:
            figure.savefig(temporary, format=kind, dpi=DPI, metadata={"Date": None} if kind == "svg" else None)
    return path
