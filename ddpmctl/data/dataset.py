"""Load the training data or the conditions of a lab folder or the embedded benchmark."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ddpmctl.benchmark import embedded
from ddpmctl.benchmark.embedded import scene_count
from ddpmctl.data.cache import benchmark_key, cached_images, decoded, folder_key
from ddpmctl.data.declared import found_images, read_declared
from ddpmctl.data.source import DataSource
from ddpmctl.iclevr import ICLEVR
from ddpmctl.progress import Notice, Progress
from ddpmctl.task import LabelSet, Task


@dataclass(frozen=True)
class Dataset:
    """Training images with labels, and the conditions.

    ``key`` is a hash of labels and pixels and does not depend on the folder's path.
    """

    name: str
    key: str
    images: np.ndarray  # uint8, (N, 3, H, W)
    labels: np.ndarray  # uint8 multi-hot, (N, C)
    conditions: dict[str, list[LabelSet]]
    root: Path | None  # None for the embedded benchmark
    task: Task = ICLEVR
    names: tuple[str, ...] = ()  # of the images


@dataclass(frozen=True)
class Conditions:
    """The conditions without the images; ``key`` is a hash of the conditions and the training label sets."""

    name: str
    key: str
    conditions: dict[str, list[LabelSet]]
    root: Path | None
    trained_sets: frozenset[frozenset[str]]
    images: int  # number of training images
    task: Task = ICLEVR

    def trained(self, files: Mapping[str, Sequence[LabelSet]]) -> dict[str, int]:
        """Return how many conditions of each file occur in the training data."""
        return {name: sum(frozenset(labels) in self.trained_sets for labels in sets) for name, sets in files.items()}

    def shares(self, files: Mapping[str, Sequence[LabelSet]]) -> str:
        """Return in words how many conditions of each file occur in the training data."""
        found = "; ".join(f"{name} {count} of {len(files[name])}" for name, count in self.trained(files).items())
        return f"label sets that occur in training ({self.name}): {found}"


def load_dataset(data: DataSource | Path | None, *, scenes: int | None = None) -> Generator[Progress | Notice, None, Dataset]:
    """Load the images of a data source, a folder, or the embedded benchmark (None), through the image cache.

    ``scenes`` is the size of the embedded benchmark; None: all scenes.

    Raises:
        UsageError: the source is not a folder, or ``scenes`` is out of range.
        DataError: the folder has a problem; names the first problem and counts the others.
    """
    source = source_of(data, scenes)
    if source.path is None:
        return (yield from _load_benchmark(source))
    return (yield from _load_folder(source, source.path))


def load_conditions(data: DataSource | Path | None, *, scenes: int | None = None) -> Conditions:
    """Load the conditions of a data source, a folder, or the embedded benchmark (None), without reading images.

    Raises:
        UsageError: as for ``load_dataset``.
        DataError: the folder's files have a problem.
    """
    source = source_of(data, scenes)
    if source.path is None:
        count = scene_count(source.scenes)
        name, conditions, task = _benchmark_name(count), embedded.conditions(), replace(ICLEVR, size=source.size)
        sets: list[Sequence[str]] = list(embedded.train_labels(count).values())
    else:
        declared, conditions = read_declared(source).for_training(source.hold_out)
        name, task, sets = str(source.path), declared.task(source.size, conditions), list(declared.labels.values())
    trained = frozenset(map(frozenset, sets))
    content = json.dumps([conditions, sorted(sorted(names) for names in trained)])
    return Conditions(name, hashlib.sha256(content.encode()).hexdigest(), conditions, source.path, trained, len(sets), task)


def source_of(data: DataSource | Path | None, scenes: int | None = None) -> DataSource:
    """Return the source that is a folder, or the embedded benchmark of some scenes."""
    return data if isinstance(data, DataSource) else DataSource(data, scenes)


def _load_folder(source: DataSource, folder: Path) -> Generator[Progress | Notice, None, Dataset]:
    declared, conditions = read_declared(source).for_training(source.hold_out)
    for note in declared.notes:
        yield Notice(f"{folder}: {note}")
    found, size, fit = found_images(declared), source.size, source.fit
    cached = yield from cached_images(folder_key(declared.digest, found, size, fit), len(found), lambda start: decoded(folder, found, size, fit, start), size)
    task, labels = declared.task(size, conditions), declared.labels
    return Dataset(
        str(folder), _content_key(labels, cached.digest), cached.images, task.multi_hot(list(labels.values())), conditions, folder, task, tuple(labels)
    )


def _load_benchmark(source: DataSource) -> Generator[Progress | Notice, None, Dataset]:
    scenes, size = scene_count(source.scenes), source.size
    labels = embedded.train_labels(scenes)
    key = benchmark_key(embedded.fingerprint(scenes), size)
    cached = yield from cached_images(key, len(labels), lambda start: embedded.rendered(scenes, size, start), size)
    content, task = _content_key(labels, cached.digest), replace(ICLEVR, size=size)
    return Dataset(_benchmark_name(scenes), content, cached.images, task.multi_hot(list(labels.values())), embedded.conditions(), None, task, tuple(labels))


def _content_key(labels: Mapping[str, Sequence[str]], pixels: str) -> str:
    """Hash the labels, in order, and the digest of the pixels; unlike the cache key, without file times."""
    return hashlib.sha256(json.dumps([list(labels.items()), pixels]).encode()).hexdigest()


def _benchmark_name(scenes: int) -> str:
    return f"embedded benchmark ({scenes} scenes)"
