"""Cache of classifier outputs for a checkpoint's images; more repeats are appended."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ddpmctl.data.cache import any_error_is_damage, cache_folder, mark_used
from ddpmctl.errors import DdpmctlError
from ddpmctl.evaluation.results import FileResults
from ddpmctl.files import atomic_write
from ddpmctl.iclevr import ICLEVR
from ddpmctl.task import LabelSet, Task

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ddpmctl.evaluation.scoring import ScoredImages


def result_key(content: Sequence[object], name: str, conditions: Sequence[LabelSet]) -> str:
    """Return the cache key: the hash of everything that the results depend on, except the number of repeats."""
    return hashlib.sha256(json.dumps([*content, name, list(map(list, conditions))], sort_keys=True).encode()).hexdigest()


def load_results(key: str, conditions: Sequence[LabelSet], task: Task = ICLEVR) -> FileResults | None:
    """Return cached results, or None if they are missing or damaged."""
    found: FileResults | None = None
    with any_error_is_damage(), _file(key).open("rb") as file, np.load(file, allow_pickle=False) as content:
        if content.zip.testzip() is not None:  # first: numpy reads only as far as an array's header says, and the checksum is compared at the end
            return None
        probabilities, images = content["probabilities"], content["images"]
        count = len(conditions)
        fits = probabilities.ndim == 3 and probabilities.shape[::2] == (count, task.columns) and probabilities.shape[1] > 0
        sound = fits and probabilities.dtype == np.float32 and bool(np.isfinite(probabilities).all())
        if sound and _are_images(images, probabilities.shape[:2], task):
            found = FileResults(tuple(conditions), probabilities, images, task)
    if found is not None:
        mark_used(_file(key))
    return found


def save_results(key: str, answers: FileResults) -> None:
    """Cache results; ignore a cache folder that cannot be written."""
    try:
        file = _file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as temporary, temporary.open("wb") as handle:
            np.savez(handle, probabilities=answers.probabilities, images=answers.images)
    except (OSError, DdpmctlError):
        pass


def with_more_repeats(kept: FileResults | None, conditions: Sequence[LabelSet], scored_images: ScoredImages, *, every_image: bool = False) -> FileResults:
    """Return the cached results followed by those of new images of each condition.

    Args:
        kept: what the cache has, or None.
        conditions: the requested label sets.
        scored_images: the new images, condition by condition.
        every_image: keep all images, if those of ``kept`` are complete too; otherwise the first of each condition, unless ``kept`` has more.
    """
    count, task = len(conditions), scored_images.task
    probabilities = scored_images.probabilities.float().cpu().numpy().reshape(count, -1, task.columns)
    images = scored_images.images.numpy().reshape(count, -1, *task.image_shape)
    if kept is not None:
        probabilities = np.concatenate([kept.probabilities, probabilities], axis=1)
        every_image = every_image or kept.images.shape[1] > 1
        images = np.concatenate([kept.images, images], axis=1) if kept.has_every_image else kept.images
    return FileResults(tuple(conditions), probabilities, np.ascontiguousarray(images if every_image else images[:, :1]), task)


def _are_images(images: NDArray[np.uint8], outputs: tuple[int, ...], task: Task) -> bool:
    """Return whether an array has the first image of each condition, or all of them; ``outputs`` is (conditions, repeats)."""
    return images.dtype == np.uint8 and images.shape in {(outputs[0], kept, *task.image_shape) for kept in (1, outputs[1])}


def _file(key: str) -> Path:
    return cache_folder() / "results" / f"{key}.npz"
