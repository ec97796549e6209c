"""``ddpmctl data verify``: find all problems of a lab folder."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from pathlib import Path

from ddpmctl.data.folders import Lab, Problem, scan_lab
from ddpmctl.data.images import PLACES, FoundImage, check_image, each_image, find_images
from ddpmctl.errors import DataError
from ddpmctl.progress import Progress

SUFFIXES = {".png", ".jpg", ".jpeg"}


@dataclass(frozen=True)
class ConditionCount:
    """The counts of a condition file."""

    conditions: int
    objects: int
    in_training: int  # conditions whose label set occurs in train.json


@dataclass(frozen=True)
class Summary:
    """The counts of a lab folder, without entries that have a problem."""

    images: int  # declared in train.json
    scenes: int
    label_sets: int  # distinct ones in train.json
    label_sets_by_size: dict[int, int]  # objects per set -> sets
    conditions: dict[str, ConditionCount]
    problems: int


def verify_folder(folder: Path) -> Generator[Progress | Problem, None, Summary]:
    """Yield progress and every problem of a lab folder, and return its counts.

    Each image is fully decoded. Problems are missing, broken and undeclared images, unknown labels and invalid JSON.

    Raises:
        UsageError: ``folder`` is not a folder.
    """
    lab, problems = scan_lab(folder)
    found: list[FoundImage] = []
    if lab.labels:
        found, missing = find_images(folder, list(lab.labels))
        problems += missing
        problems += _undeclared(folder, {*(str(image.path) for image in found), *(problem.path for problem in missing)})
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
    return _summary(lab, count)


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


def _summary(lab: Lab, problems: int) -> Summary:
    trained = {frozenset(names) for names in lab.labels.values() if names}
    conditions = {
        name: ConditionCount(len(sets), sum(map(len, sets)), sum(frozenset(each) in trained for each in sets)) for name, sets in lab.conditions.items()
    }
    return Summary(len(lab.labels), len({_scene(name) for name in lab.labels}), len(trained), _by_size(trained), conditions, problems)


def _by_size(sets: Iterable[Iterable[str]]) -> dict[int, int]:
    sizes = sorted(len(tuple(each)) for each in sets)
    return {size: sizes.count(size) for size in dict.fromkeys(sizes)}


def _scene(name: str) -> str:
    """Return the scene of an image: ``CLEVR_train_000341`` for ``CLEVR_train_000341_2.png``, and any other name itself."""
    stem, _, frame = os.path.splitext(name)[0].rpartition("_")
    return stem if stem and frame.isdigit() else name
