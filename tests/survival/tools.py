"""Helpers of the tests of failures."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeVar

import pytest

from ddpmctl.checkpoints.format import save_tensors

from ..conftest import load_tensors
from ..data.conftest import finish

R = TypeVar("R")
PYTHON = [sys.executable, "-m", "ddpmctl"]
posix = pytest.mark.skipif(os.name != "posix", reason="signals and mounts are POSIX")


def result_of(spec: Generator[object, None, R]) -> R:
    result: R = finish(spec)[1]
    return result


@contextmanager
def training(*arguments: object, until: str = "epoch 1 ") -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
    """Train in a process of its own; the body begins with it, and with its stderr, when a line of it begins with ``until``."""
    with subprocess.Popen([*PYTHON, "train", *map(str, arguments)], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if line.startswith(until))
        yield process, process.stderr


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def edited(file: Path, **changes: object) -> None:
    content = load_tensors(file)[0]
    save_tensors(file, {**content, **changes})
