"""A classifier's answers to a checkpoint's pictures, kept by content: more repeats are added to those that are there."""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ddpmctl.data.cache import cache_folder
from ddpmctl.errors import DdpmctlError
from ddpmctl.evaluation.results import Answers
from ddpmctl.files import atomic_write
from ddpmctl.labels import CLASSES, LabelSet
from ddpmctl.sampling.pipeline import IMAGE_SHAPE

if TYPE_CHECKING:

    from ddpmctl.evaluation.scoring import Judgement

def key_of(content: Sequence[object], name: str, conditions: Sequence[LabelSet]) -> str:
    """Return the name under which answers are kept: the hash of all that they depend on but the number of repeats."""
    return hashlib.sha256(json.dumps([*content, name, list(map(list, conditions))], sort_keys=True).encode()).hexdigest()


def kept_answers(key: str, conditions: Sequence[LabelSet]) -> Answers | None:
    """Return the answers kept under a key; None where there are none, or none that can be used."""
    try:
        with _file(key).open("rb") as file, np.load(file, allow_pickle=False) as content:
            probabilities, pictures = content["probabilities"], content["pictures"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, DdpmctlError):
        return None  # never kept, or damaged (numpy passes on whatever zipfile makes of it): then it is measured again
    count = len(conditions)
    fits = probabilities.ndim == 3 and probabilities.shape[::2] == (count, len(CLASSES)) and probabilities.shape[1] > 0
    sound = fits and probabilities.dtype == np.float32 and bool(np.isfinite(probabilities).all())
    if not sound or pictures.dtype != np.uint8 or pictures.shape != (count, *IMAGE_SHAPE):
        return None
    return Answers(tuple(conditions), probabilities, pictures)


def keep_answers(key: str, answers: Answers) -> None:
    """Keep answers for later calls; where the cache cannot be written, that costs time at the next call and nothing else."""
    try:
        file = _file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as temporary, temporary.open("wb") as handle:
            np.savez(handle, probabilities=answers.probabilities, pictures=answers.pictures)
    except (OSError, DdpmctlError):
        pass


def extended(kept: Answers | None, conditions: Sequence[LabelSet], judgement: Judgement) -> Answers:
    """Return kept answers with those to more pictures of each condition behind them."""
    count = len(conditions)
    more = judgement.probabilities.float().cpu().numpy().reshape(count, -1, len(CLASSES))
    if kept is not None:
        return Answers(kept.conditions, np.concatenate([kept.probabilities, more], axis=1), kept.pictures)
    firsts = judgement.pictures.numpy().reshape(count, -1, *IMAGE_SHAPE)[:, 0]
    return Answers(tuple(conditions), more, np.ascontiguousarray(firsts))


def _file(key: str) -> Path:
    return cache_folder() / "results" / f"{key}.npz"
