"""Real images of given label sets, to compare samples with."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from typing import NamedTuple

import numpy as np

from ddpmctl.benchmark import embedded
from ddpmctl.data.dataset import Dataset
from ddpmctl.progress import Progress
from ddpmctl.task import LabelSet, Task

RENDER_SEED = 3 * 2**32  # other scenes than the training set's and those of the classifier's training and check


class RealImages(NamedTuple):
    """Two disjoint sets of real images of each condition.

    Attributes:
        images: uint8 (2, conditions, repeats, 3, H, W).
        same_scene: indices of the training images that show the same scene, (2, conditions, repeats, E); E = 0 for new renders.
        source: where they come from, in words.
    """

    images: np.ndarray
    same_scene: np.ndarray
    source: str


def real_images(dataset: Dataset, conditions: Sequence[LabelSet], repeats: int) -> Generator[Progress, None, RealImages]:
    """Yield progress and return real images of every condition.

    The embedded benchmark renders new images. Of a folder, training images are taken: those with the same labels and, where there are too
    few, those that share the most labels. No image is taken twice within a condition.

    Raises:
        UsageError: a label set cannot be rendered.
    """
    wanted = [labels for labels in conditions for _ in range(repeats)]
    if dataset.root is None:
        first = yield from embedded.render_label_sets(wanted, seed=RENDER_SEED, size=dataset.task.size)
        second = yield from embedded.render_label_sets(wanted, seed=RENDER_SEED + 1, size=dataset.task.size)
        images = np.stack([first, second]).reshape(2, len(conditions), repeats, *first.shape[1:])
        return RealImages(images, np.empty((*images.shape[:3], 0), np.int64), "new renders of the same labels")
    task = dataset.task
    chosen = np.stack([_most_alike(task, dataset.labels, condition, 2 * repeats) for condition in conditions])
    exact = (dataset.labels[chosen] == task.multi_hot(list(conditions))[:, None]).all(2).mean()
    chosen = chosen.reshape(len(conditions), repeats, 2).transpose(2, 0, 1)
    source = f"training images, {100 * exact:.0f} % with the same labels and the others with the most alike"
    return RealImages(dataset.images[chosen], same_scenes(dataset.names)[chosen], source)


def _most_alike(task: Task, labels: np.ndarray, condition: LabelSet, count: int) -> np.ndarray:
    """Return the indices of ``count`` images whose labels differ least from a condition, ties in an order that hashing fixes."""
    differing = (labels != task.multi_hot([condition])).sum(1)
    digest = hashlib.sha256("/".join(condition).encode()).digest()
    ties = np.random.default_rng(np.frombuffer(digest, np.uint32)).permutation(len(labels))
    order = np.lexsort((ties, differing))
    return np.resize(order[:count], count)


def scene_of(image: str) -> str:
    """Return the name of an image's scene: ``NAME`` of ``NAME_0.png``; a file without a number is a scene of its own."""
    stem = image.rpartition(".")[0] or image
    base, _, number = stem.rpartition("_")
    return base if base and number.isdigit() else stem


def same_scenes(images: Sequence[str]) -> np.ndarray:
    """Return, for each image name, the indices of all images of the same scene, itself included: (N, E); smaller scenes repeat indices.

    Images ``NAME_0.png``, ``NAME_1.png`` are of the same scene; a file without a number is a scene of its own.
    """
    scenes: dict[str, list[int]] = {}
    keys = list(map(scene_of, images))
    for index, key in enumerate(keys):
        scenes.setdefault(key, []).append(index)
    most = min(max(map(len, scenes.values())), 16)
    return np.array([np.resize([index, *(i for i in scenes[key] if i != index)], most) for index, key in enumerate(keys)], dtype=np.int64)
