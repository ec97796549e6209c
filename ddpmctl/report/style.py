"""What all figures share: colours, dashes, markers, and how a figure is written."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ddpmctl.errors import visible
from ddpmctl.files import atomic_write

# Okabe & Ito's colour-blind safe palette; markers and dashes also work without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX"
DPI = 130


def in_figure(text: str) -> str:
    """Return a text that may hold the name of a file as a figure can show it: on one line, and without formulas between dollars."""
    return visible(text).replace("$", r"\$")


def write_figure(path: Path, figure: Figure, kind: str, **options: Any) -> Path:
    """Write a figure in a format such as "png"; return the path.

    Matplotlib warns of characters that its font lacks, for which it draws boxes, and of long names that leave no room; neither is for the user.
    """
    with atomic_write(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(temporary, format=kind, **options)
    return path


def save_figure(path: Path, figure: Figure) -> Path:
    """Write a figure as PNG and, with the same name, as SVG; return the path of the PNG."""
    write_figure(path, figure, "png", dpi=DPI)
    write_figure(path.with_suffix(".svg"), figure, "svg", dpi=DPI, metadata={"Date": None})
    return path
