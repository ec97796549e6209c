"""Cache of classifier outputs for a checkpoint's images; more repeats are appended."""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ddpmctl.data.cache import cache_folder, mark_used
from ddpmctl.errors import DdpmctlError
from ddpmctl.evaluation.results import FileResults
from ddpmctl.files import atomic_write
from ddpmctl.labels import CLASSES, LabelSet
from ddpmctl.sampling.pipeline import IMAGE_SHAPE

if TYPE_CHECKING:
    from ddpmctl.evaluation.scoring import ScoredImages


def result_key(content: Sequence[object], name: str, conditions: Sequence[LabelSet]) -> str:
    """Return the cache key: the hash of everything that the results depend on, except the number of repeats."""
    return hashlib.sha256(json.dumps([*content, name, list(map(list, conditions))], sort_keys=True).encode()).hexdigest()


def load_results(key: str, conditions: Sequence[LabelSet]) -> FileResults | None:
    """Return cached results, or None if they are missing or damaged."""
    try:
        with _file(key).open("rb") as file, np.load(file, allow_pickle=False) as content:
            probabilities, images = content["probabilities"], content["images"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, DdpmctlError):
        return None  # numpy passes on all errors of zipfile
    count = len(conditions)
    fits = probabilities.ndim == 3 and probabilities.shape[::2] == (count, len(CLASSES)) and probabilities.shape[1] > 0
    sound = fits and probabilities.dtype == np.float32 and bool(np.isfinite(probabilities).all())
    if not sound or images.dtype != np.uint8 or images.shape != (count, *IMAGE_SHAPE):
        return None
    mark_used(_file(key))
    return FileResults(tuple(conditions), probabilities, images)


def save_results(key: str, answers: FileResults) -> None:
    """Cache results; ignore a cache folder that cannot be written."""
    try:
        file = _file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as temporary, temporary.open("wb") as handle:
            np.savez(handle, probabilities=answers.probabilities, images=answers.images)
    except (OSError, DdpmctlError):
        pass


def with_more_repeats(kept: FileResults | None, conditions: Sequence[LabelSet], scored_images: ScoredImages) -> FileResults:
    """Return cached results with the results of more images of each condition appended."""
    count = len(conditions)
    more = scored_images.probabilities.float().cpu().numpy().reshape(count, -1, len(CLASSES))
    if kept is not None:
        return FileResults(kept.conditions, np.concatenate([kept.probabilities, more], axis=1), kept.images)
    firsts = scored_images.images.numpy().reshape(count, -1, *IMAGE_SHAPE)[:, 0]
    return FileResults(tuple(conditions), more, np.ascontiguousarray(firsts))


def _file(key: str) -> Path:
    return cache_folder() / "results" / f"{key}.npz"
