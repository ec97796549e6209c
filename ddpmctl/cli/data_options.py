"""Options that name a data set, and say how its images and labels are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ddpmctl.cli.completion import one_of
from ddpmctl.data.source import FITS, REPEATED, DataSource
from ddpmctl.errors import UsageError
from ddpmctl.registry import FORMATS, Registry
from ddpmctl.task import SIZES

READING = "How images are read, for another size or form of data"


def _named(flag: str, text: str, default: str, choices: Registry[object] | Sequence[str]) -> Any:
    """Return the option of one of some names."""
    return typer.Option(flag, help=text, metavar="NAME", show_default=default, rich_help_panel=READING, autocompletion=one_of(choices))


Size = Annotated[
    int | None,
    typer.Option("--size", envvar="DDPMCTL_SIZE", help=f"Pixels on a side ({', '.join(map(str, SIZES))}).", show_default="64", rich_help_panel=READING),
]
Fit = Annotated[str | None, _named("--fit", "How images that are not square become square (squeeze, crop, pad).", "squeeze", FITS)]
DataFormat = Annotated[str | None, _named("--format", f"Form of the data ({', '.join(FORMATS.names())}).", "recognised", FORMATS)]
LabelColumn = Annotated[
    str | None, typer.Option("--label-column", help="Columns with the labels, e.g. colour,shape.", show_default="labels", rich_help_panel=READING)
]
Repeated = Annotated[str | None, _named("--repeated", "CLEVR's images with two objects of one label (keep, drop).", "keep", REPEATED)]
HoldOut = Annotated[
    int | None,
    typer.Option(
        "--hold-out", help="Most label sets that are kept out of training, where the data have no conditions.", show_default="a tenth, up to 32",
        rich_help_panel=READING,
    ),
]  # fmt: skip


def data_source(
    data: Path | None, scenes: int | None = None, *, size: int | None = None, fit: str | None = None, form: str | None = None,
    label_column: str | None = None, repeated: str | None = None, hold_out: int | None = None,
) -> DataSource:  # fmt: skip
    """Return the data that options name.

    Raises:
        UsageError: ``--scenes`` stands beside ``--data``, so that one would be ignored in silence; or a value is not possible.
    """
    if data is not None and scenes is not None:
        raise UsageError("--scenes sets the size of the embedded benchmark and does not go with --data")
    names = None if label_column is None else tuple(part.strip() for part in label_column.split(",") if part.strip())
    given = {"size": size, "fit": fit, "format": form, "label_column": names, "repeated": repeated, "hold_out": hold_out}
    return DataSource.checked(path=data, scenes=scenes, **{name: value for name, value in given.items() if value is not None})
