"""Where training data come from, and how their images are read: what ``--data`` and the options beside it say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ddpmctl.iclevr import ICLEVR

FITS = ("squeeze", "crop", "pad")


@dataclass(frozen=True)
class DataSource:
    """Training data.

    Attributes:
        path: a folder or a zip file; None for the embedded benchmark.
        scenes: scenes of the embedded benchmark; None for all of them.
        size: pixels on a side of the images, after ``fit``.
        fit: how an image that is not square becomes it: squeezed, its middle cropped, or padded with the colour of its border.
        format: a name in ``FORMATS``; None: recognised by the folder's content.
        label_column: columns of the metadata that hold the labels; empty for ``labels``.
        repeated: of CLEVR's scenes, what becomes of images with two objects of the same labels: kept or dropped.
    """

    path: Path | None = None
    scenes: int | None = None
    size: int = ICLEVR.size
    fit: str = FITS[0]
    format: str | None = None
    label_column: tuple[str, ...] = ()
    repeated: str = "keep"

    def describe(self) -> str:
        """Return the data in words."""
        return "the embedded benchmark" if self.path is None else str(self.path)
