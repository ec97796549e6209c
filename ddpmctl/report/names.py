"""Short names of checkpoints, for tables, figures and pages."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ddpmctl.checkpoints.names import short_name
from ddpmctl.runs.folder import epoch_in_name

LONGEST = 17  # characters of a run's name; with intervals on a second line, as many are left for it at 80 columns


def checkpoint_names(paths: Sequence[Path], titles: Mapping[Path, str]) -> list[str]:
    """Return short names: run and epoch, such as ``q30 epoch 10``, else ``short_name``, or ``titles`` where that is not unique.

    Checkpoints that would still have the same name are called by that part of their paths in which they differ.
    """
    named = [path for path in paths if epoch_in_name(path) >= 0]
    runs = _shortened([_folder(path) for path in named])
    short = {path: f"{run} epoch {epoch_in_name(path)}" for path, run in zip(named, runs, strict=True)}
    names = [short.get(path, titles.get(path, short_name(path))) for path in paths]
    alike = [path.resolve() for path, name in zip(paths, names, strict=True) if names.count(name) > 1]
    shared = os.path.commonpath([path.parent for path in alike]) if alike else ""
    return [str(path.resolve().relative_to(shared)) if names.count(name) > 1 else name for path, name in zip(paths, names, strict=True)]


def _folder(path: Path) -> str:
    folder = path.resolve().parent
    return folder.parent.name if folder.name == "checkpoints" else folder.name


def _shortened(names: Sequence[str]) -> list[str]:
    """Shorten long names of runs: drop the words that all have in common, then cut out the middle; names stay different."""
    if max(map(len, names), default=0) <= LONGEST:
        return list(names)
    words = [name.split("-") for name in names]
    if len(set(names)) > 1 and len(set(map(len, words))) == 1:
        differing = [len(set(column)) > 1 for column in zip(*words, strict=True)]
        words = [[word for word, differs in zip(of, differing, strict=True) if differs] for of in words]
    half = LONGEST // 2
    short = [name if len(name) <= LONGEST else f"{name[:half]}…{name[-half:]}" for name in map("-".join, words)]
    return short if len(set(zip(names, short, strict=True))) == len(set(short)) == len(set(names)) else list(names)
