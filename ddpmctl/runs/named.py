"""Runs and checkpoints by the names that a person gives: a path, the name of a run, or a pattern."""

from __future__ import annotations

import difflib
import glob
import os
from collections.abc import Sequence
from pathlib import Path

from ddpmctl.checkpoints.names import PRETRAINED, PRETRAINED_NAME
from ddpmctl.errors import UsageError
from ddpmctl.runs.record import run_folders


def located(named: Path, runs_dir: Path) -> Path:
    """Return the file or folder that a name means: the path, or else the run of that name, or else the model that comes with ddpmctl (``pretrained``).

    Raises:
        UsageError: there is none, or it is a pattern that fits several.
    """
    found = _matches(named, runs_dir)
    if len(found) > 1:
        raise UsageError(f"{named}: fits {len(found)} files or folders ({found[0]}, {found[1]}, ...); name one of them")
    return found[0]


def located_all(named: Sequence[Path], runs_dir: Path) -> list[Path]:
    """Return the files and folders that names mean; a pattern such as ``runs/*/checkpoints/*.pth`` stands for all that fit it.

    Raises:
        UsageError: there is none for a name.
    """
    return [found for one in named for found in _matches(one, runs_dir)]


def _matches(named: Path, runs_dir: Path) -> list[Path]:
    if os.path.exists(named):
        return [named]
    inside = None if named.is_absolute() else runs_dir / named
    if inside is not None and os.path.exists(inside):
        return [inside]
    if str(named) == PRETRAINED_NAME:
        return [PRETRAINED]
    if glob.has_magic(str(named)):
        if found := [Path(text) for text in sorted(glob.glob(str(named)))]:
            return found
        raise UsageError(f"{named}: no file or folder fits this pattern")
    names = [folder.name for folder in run_folders(runs_dir)]
    near = difflib.get_close_matches(named.name, names, 3) or [name for name in names if named.name and named.name in name][:3]
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise UsageError(f"{named}: there is no such file or folder, and no run of this name in {runs_dir}/{hint}")
