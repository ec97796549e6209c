"""The files and folders that a command writes: their options, checks before the work, and writing."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from ddpmctl.cli.options import OUTPUTS
from ddpmctl.cli.terminal import Terminal
from ddpmctl.errors import UsageError
from ddpmctl.files import prepare_file, prepare_folder

FILE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".svg", ".pdf"})


def output_option(flag: str, help_text: str) -> Any:
    """Return the option of a file or folder of results."""
    return typer.Option(flag, help=help_text, show_default=False, rich_help_panel=OUTPUTS)


def prepare_output(path: Path, flag: str, *, folder: bool, suffix: str = "") -> None:
    """Make an output folder, or a file's parent, before any work is done for it; check the file's ``suffix`` where one is given.

    A missing folder above the output is made only if its own parent exists, and said on stderr: the path may be mistyped.

    Raises:
        UsageError: it cannot be made or written to.
    """
    if str(path).startswith("-"):
        raise UsageError(f"{flag}: {path} looks like an option, and the value is missing; a file of that name is ./{path}")
    if not folder and path.is_dir():
        raise UsageError(f"{flag}: {path} is a folder; name a file in it")
    if folder and path.suffix.lower() in FILE_SUFFIXES and not path.is_dir():
        raise UsageError(f"{flag}: {path} looks like a file, but several files are written here; name a folder, e.g. {path.with_suffix('')}")
    if suffix and path.suffix.lower() != suffix:
        raise UsageError(f"{flag}: {path} must end in {suffix}")
    above = path.absolute().parent
    if not above.exists() and not above.parent.exists():
        raise UsageError(f"{flag}: there is no folder {above.parent}; make it first, or name another place than {path}")
    made = not above.exists()
    if folder:
        prepare_folder(path, flag)
    else:
        prepare_file(path, flag)
    if made:
        Terminal().say(f"made the folder {path.parent}")


@dataclass(frozen=True)
class Outputs:
    """The files and folders that a command writes besides what it prints, where they are asked for; ``json`` '-' is stdout."""

    json: Path | None = None
    csv: Path | None = None
    latex: Path | None = None
    html: Path | None = None
    out: Path | None = None
    figures: Path | None = None
    grid: Path | None = None

    @property
    def only_json(self) -> bool:
        """Whether stdout gets JSON and nothing else."""
        return str(self.json) == "-"

    def files(self) -> dict[str, Path]:
        """Return the files of results by flag."""
        return {f"--{name}": file for name in ("json", "csv", "latex", "html") if (file := getattr(self, name))}

    def write(self, terminal: Terminal, **writers: Callable[[Path], object]) -> None:
        """Write the files that are asked for, each by the function that has its name here, and say so on stderr."""
        for name, writer in writers.items():
            file: Path | None = getattr(self, name)
            if file is not None and str(file) != "-":
                writer(file)
                terminal.say(f"{name}: {file}")

    def prepare(self) -> None:
        """Create the folders and check the files before any work is done for them.

        Raises:
            UsageError: one cannot be written to, or two flags name one file.
        """
        for flag, folder in (("--grid", self.grid), ("--figures", self.figures)):
            if folder:
                prepare_output(folder, flag, folder=True)
        named: dict[str, str] = {}
        for flag, file in {"--out": self.out, **self.files()}.items():
            if file is None or str(file) == "-":
                continue
            if (other := named.setdefault(os.path.realpath(file), flag)) != flag:
                raise UsageError(f"{other} and {flag}: both name {file}, and one would overwrite the other")
            prepare_output(file, flag, folder=False, suffix=".png" if flag == "--out" else "")


def figure_line(png: Path) -> str:
    """Return how a figure that was written as PNG and SVG is announced."""
    return f"figure: {png} and {png.with_suffix('.svg').name}"
