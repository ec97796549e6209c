"""Where training data come from, and how their images are read: what ``--data`` and the options beside it say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpmctl.errors import UsageError
from ddpmctl.iclevr import ICLEVR
from ddpmctl.registry import FORMATS
from ddpmctl.task import SIZES

FITS = ("squeeze", "crop", "pad")
REPEATED = ("keep", "drop")
MOST_HELD_OUT = 32


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
        hold_out: label sets that are kept out of training, at most, of data without conditions of their own; None: a tenth of them.
    """

    path: Path | None = None
    scenes: int | None = None
    size: int = ICLEVR.size
    fit: str = FITS[0]
    format: str | None = None
    label_column: tuple[str, ...] = ()
    repeated: str = "keep"
    hold_out: int | None = None

    @staticmethod
    def checked(**values: Any) -> DataSource:
        """Return a source of values that nobody has checked, such as those of a file.

        Raises:
            UsageError: one is not possible; names its option.
        """
        source = DataSource(**{**values, "label_column": tuple(values.get("label_column") or ())})
        if source.size not in SIZES:
            raise UsageError(f"--size: {source.size!r} is none of {', '.join(map(str, SIZES))}")
        for name, value, choices in (("--fit", source.fit, FITS), ("--repeated", source.repeated, REPEATED)):
            if value not in choices:
                raise UsageError(f"{name}: {value!r} is none of {', '.join(choices)}")
        if source.format is not None:
            FORMATS.check(str(source.format))
        if not all(isinstance(name, str) for name in source.label_column):
            raise UsageError("--label-column: must be names of columns")
        if source.hold_out is not None and not (type(source.hold_out) is int and 0 <= source.hold_out <= MOST_HELD_OUT):
            raise UsageError(f"--hold-out: {source.hold_out!r} is out of range (at least 0, at most {MOST_HELD_OUT})")
        return source

    def describe(self) -> str:
        """Return the data in words."""
        return "the embedded benchmark" if self.path is None else str(self.path)
