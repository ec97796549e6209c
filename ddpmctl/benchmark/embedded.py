"""The embedded benchmark: rendered images that replace the lab's training set, which may not be redistributed.

Names, label sets, conditions and images are a pure function of (seed, scenes). A smaller benchmark is a prefix of a larger one.
The label statistics are those of the lab's data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator, Sequence

import numpy as np

from ddpmctl.benchmark.label_sets import held_out_triples, lab_conditions
from ddpmctl.benchmark.scenes import OBJECTS, SIDE, arrange, draw_classes, draw_scenes
from ddpmctl.errors import UsageError
from ddpmctl.iclevr import CLASSES, INDEX
from ddpmctl.progress import Progress

SCENES = 6003
IMAGES_PER_SCENE = 3
RENDERER_VERSION = 1  # increase it when a pixel or a label changes


def conditions() -> dict[str, list[tuple[str, ...]]]:
    """Return the conditions: the lab's ``test`` and ``new_test``, and ``heldout``, which is not in the training data."""
    return {"test": lab_conditions("test"), "new_test": lab_conditions("new_test"), "heldout": list(held_out_triples())}


def image_names(scenes: int) -> list[str]:
    """Return the file names of the images in order, three per scene."""
    return [f"CLEVR_train_{scene:06d}_{frame}.png" for scene in range(scenes) for frame in range(IMAGES_PER_SCENE)]


def train_labels(scenes: int, *, seed: int = 0) -> dict[str, list[str]]:
    """Return {file name: labels} in order; frame f of a scene shows its first f + 1 objects."""
    classes = draw_classes(scenes, seed=seed)
    sets = ([CLASSES[index] for index in row[: frame + 1]] for row in classes for frame in range(IMAGES_PER_SCENE))
    return dict(zip(image_names(scenes), sets, strict=True))


def render_benchmark(scenes: int = SCENES, *, seed: int = 0, width: int = SIDE, height: int = SIDE) -> Iterator[np.ndarray]:
    """Yield the images in the order of :func:`image_names`, in chunks: uint8 (m, height, width, 3)."""
    from ddpmctl.benchmark.raycast import render

    for images in render(draw_scenes(scenes, seed=seed), width=width, height=height):
        yield images.reshape(-1, height, width, 3)


def rendered(scenes: int, size: int, start: int = 0) -> Iterator[Progress | np.ndarray]:
    """Yield progress, and the images from number ``start`` on: uint8 (B, 3, size, size)."""
    count, done = IMAGES_PER_SCENE * scenes, 0
    yield Progress("rendering", start, count)
    for chunk in render_benchmark(scenes, width=size, height=size):
        done += len(chunk)
        if done > start:
            yield np.ascontiguousarray(chunk.transpose(0, 3, 1, 2)[max(0, start - done + len(chunk)) :])
            yield Progress("rendering", done, count)


def collected(chunks: Iterator[np.ndarray], count: int, size: int = SIDE) -> Generator[Progress, None, np.ndarray]:
    """Yield progress and return ``count`` images from chunks (..., size, size, 3) as one array, uint8 (count, 3, size, size)."""
    images = np.empty((count, 3, size, size), dtype=np.uint8)
    done = 0
    yield Progress("rendering", done, count)
    for chunk in chunks:
        flat = chunk.reshape(-1, size, size, 3)
        images[done : done + len(flat)] = flat.transpose(0, 3, 1, 2)
        done += len(flat)
        yield Progress("rendering", done, count)
    return images


def render_label_sets(label_sets: Sequence[Sequence[str]], *, seed: int, size: int = SIDE) -> Generator[Progress, None, np.ndarray]:
    """Yield progress and return one new image of each label set, uint8 (N, 3, size, size).

    With every seed, the scenes differ from those of the training set.

    Raises:
        UsageError: a label set has more than three objects.
    """
    from ddpmctl.benchmark.raycast import render

    if too_many := next((labels for labels in label_sets if len(labels) > OBJECTS), None):
        raise UsageError(f"{', '.join(too_many)}: the embedded benchmark has images of up to {OBJECTS} objects")
    rng = np.random.default_rng([seed, len(label_sets)])
    rows = [[*(INDEX[name] for name in labels), *rng.permutation([i for i, name in enumerate(CLASSES) if name not in labels])] for labels in label_sets]
    scenes = arrange(np.array([row[:OBJECTS] for row in rows], dtype=np.int64).reshape(-1, OBJECTS), seed=seed)
    frames = yield from collected(render(scenes, width=size, height=size), OBJECTS * len(label_sets), size)
    # Frame f shows the first f + 1 objects, so the objects that fill a scene up are not in the image.
    return frames[[OBJECTS * index + len(labels) - 1 for index, labels in enumerate(label_sets)]]


def fingerprint(scenes: int, *, seed: int = 0) -> str:
    """Return a short hexadecimal cache key of a benchmark."""
    return hashlib.sha256(f"{RENDERER_VERSION}/{seed}/{scenes}".encode()).hexdigest()[:16]


def scene_count(scenes: int | None) -> int:
    """Return the number of scenes; None means all.

    Raises:
        UsageError: out of range.
    """
    if scenes is None:
        return SCENES
    if not 1 <= scenes <= SCENES:
        raise UsageError(f"--scenes {scenes}: the embedded benchmark has 1 to {SCENES} scenes")
    return scenes
