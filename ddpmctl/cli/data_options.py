"""Options that say how images of a data set are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ddpmctl.cli.completion import one_of
from ddpmctl.data.source import FITS, REPEATED, DataSource
from ddpmctl.registry import FORMATS
from ddpmctl.task import SIZES

READING = "How images are read, for another size or form of data"

Size = Annotated[
    int | None,
    typer.Option(
        "--size", envvar="DDPMCTL_SIZE", help=f"Pixels on a side ({', '.join(map(str, SIZES))}).", show_default="64", rich_help_panel=READING
    ),
]  # fmt: skip
Fit = Annotated[
    str | None,
    typer.Option("--fit", help="What becomes of images that are not square (squeeze, crop, pad).", metavar="NAME", show_default="squeeze",
        rich_help_panel=READING, autocompletion=one_of(FITS)),
]  # fmt: skip
DataFormat = Annotated[
    str | None,
    typer.Option("--format", help=f"Form of the data ({', '.join(FORMATS.names())}).", metavar="NAME", show_default="recognised",
        rich_help_panel=READING, autocompletion=one_of(FORMATS)),
]  # fmt: skip
LabelColumn = Annotated[
    str | None,
    typer.Option("--label-column", help="Columns with the labels, e.g. colour,shape.", show_default="labels", rich_help_panel=READING),
]  # fmt: skip
Repeated = Annotated[
    str | None,
    typer.Option("--repeated", help="CLEVR's images with two objects of one label (keep, drop).", metavar="NAME", show_default="keep",
        rich_help_panel=READING, autocompletion=one_of(REPEATED)),
]  # fmt: skip
HoldOut = Annotated[
    int | None,
    typer.Option("--hold-out", help="Label sets kept out of training, at most, of data without conditions of their own.", show_default="a tenth, up to 32",
        rich_help_panel=READING),
]  # fmt: skip


def folder_source(folder: Path, form: str | None, label_column: str | None, repeated: str | None) -> DataSource:
    """Return the source of a folder, or of a zip file, as options say; UsageError for values that are not possible."""
    given = {"format": form, "label_column": columns(label_column), "repeated": repeated}
    return DataSource.checked(path=folder, **{name: value for name, value in given.items() if value is not None})


def columns(text: str | None) -> tuple[str, ...] | None:
    """Return the names of columns in a list with commas; None for none."""
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())
