"""``ddpmctl data verify``: find all problems of a data set."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from pathlib import Path

from ddpmctl.data.declared import Declared, scan_declared
from ddpmctl.data.folders import Problem
from ddpmctl.data.images import PLACES, FoundImage, check_image, each_image
from ddpmctl.data.reference import scene_of
from ddpmctl.data.source import DataSource
from ddpmctl.errors import DataError
from ddpmctl.progress import Progress

SUFFIXES = {".png", ".jpg", ".jpeg"}


@dataclass(frozen=True)
class ConditionCount:
    """The counts of a condition file."""

    conditions: int
    objects: int
    in_training: int  # conditions whose label set occurs in training


@dataclass(frozen=True)
class Summary:
    """The counts of a data set, without entries that have a problem."""

    declared: Declared
    images: int
    scenes: int
    label_sets: int  # distinct ones
    label_sets_by_size: dict[int, int]  # objects per set -> sets
    conditions: dict[str, ConditionCount]
    problems: int


def verify_folder(source: DataSource) -> Generator[Progress | Problem, None, Summary]:
    """Yield progress and every problem of a data set, and return its counts.

    Each image is fully decoded. Problems are missing, broken and (in the lab's layout) undeclared images, unknown labels and invalid files.

    Raises:
        UsageError: there is no such folder or zip file.
        DataError: its format is not known, or its file of labels cannot be read at all.
    """
    declared, problems = scan_declared(source)
    found: list[FoundImage] = []
    if declared.labels:
        found, missing = declared.find()
        problems += missing
        if declared.format == "lab":
            problems += _undeclared(declared.root, {*(str(image.path) for image in found), *(problem.path for problem in missing)})
    yield from problems
    count = len(problems)
    yield Progress("checking", 0, len(found))
    for index, result in enumerate(each_image([image.path for image in found], check_image), start=1):
        if isinstance(result, DataError):
            path = str(found[index - 1].path)
            yield Problem(path, str(result).removeprefix(f"{path}: "))
            count += 1
        if index % 100 == 0 or index == len(found):
            yield Progress("checking", index, len(found))
    return _summary(declared, count)


def _undeclared(folder: Path, declared: set[str]) -> list[Problem]:
    """Return a problem for each image file in an image folder that is not in train.json."""
    places = {folder / place for place in PLACES} | {Path(path).parent for path in declared}
    problems = []
    for place in sorted(places):
        try:
            names = sorted(os.listdir(place))
        except OSError:  # the folder does not exist
            continue
        images = [str(place / name) for name in names if os.path.splitext(name)[1].lower() in SUFFIXES]
        problems += [Problem(path, "is not declared in train.json; add its labels there or remove it") for path in images if path not in declared]
    return problems


def _summary(declared: Declared, problems: int) -> Summary:
    trained = {frozenset(names) for names in declared.labels.values() if names}
    conditions = {
        name: ConditionCount(len(sets), sum(map(len, sets)), sum(frozenset(each) in trained for each in sets)) for name, sets in declared.conditions.items()
    }
    return Summary(declared, len(declared.labels), len({scene_of(name) for name in declared.labels}), len(trained), _by_size(trained), conditions, problems)


def _by_size(sets: Iterable[Iterable[str]]) -> dict[int, int]:
    sizes = sorted(len(tuple(each)) for each in sets)
    return {size: sizes.count(size) for size in dict.fromkeys(sizes)}
