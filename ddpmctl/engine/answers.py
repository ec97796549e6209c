"""A classifier's answers to a checkpoint's pictures, kept by content: more repeats are added to those that are there."""

from __future__ import annotations

import functools
import hashlib
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ddpmctl.data.cache import cache_folder
from ddpmctl.data.labels import CLASSES, multi_hot
from ddpmctl.engine.generate import IMAGE_SHAPE
from ddpmctl.errors import DdpmctlError
from ddpmctl.evaluator.misses import Misses, account_for
from ddpmctl.evaluator.scores import Score, score, top_k_hits
from ddpmctl.files import atomic_write
from ddpmctl.statistics.tallies import Tally, joined

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from ddpmctl.engine.judge import Judgement

LabelSet = tuple[str, ...]


@dataclass(frozen=True)
class Answers:
    """What a classifier said of one checkpoint's pictures for one condition file.

    Attributes:
        conditions: the label sets asked for.
        probabilities: float32, (conditions, repeats, 24).
        pictures: the first picture of each condition, uint8, (conditions, 3, 64, 64).
    """

    conditions: tuple[LabelSet, ...]
    probabilities: NDArray[np.float32]
    pictures: NDArray[np.uint8]

    @property
    def repeats(self) -> int:
        """Pictures of each condition."""
        return int(self.probabilities.shape[1])

    @property
    def flat(self) -> Tensor:
        """The answers picture by picture, a condition's together: (conditions * repeats, 24)."""
        return torch.from_numpy(self.probabilities.reshape(-1, len(CLASSES)))

    @property
    def requested(self) -> list[LabelSet]:
        """The labels asked for, picture by picture as in ``flat``."""
        return [labels for labels in self.conditions for _ in range(self.repeats)]

    @functools.cached_property
    def score(self) -> Score:
        """The pooled score of all pictures."""
        return score(self.flat, self._wanted())

    @functools.cached_property
    def tally(self) -> Tally:
        """The hits, condition by condition, as the lab counts them."""
        hits = np.array(top_k_hits(self.flat, self._wanted())).reshape(len(self.conditions), self.repeats)
        return Tally(hits, np.array([len(labels) for labels in self.conditions]))

    @functools.cached_property
    def misses(self) -> Misses:
        """What became of the objects that the pictures do not show."""
        return account_for(self.flat, self.requested)

    def first(self, repeats: int) -> Answers:
        """Return the answers to the first pictures of each condition."""
        return Answers(self.conditions, self.probabilities[:, :repeats], self.pictures)

    def _wanted(self) -> Tensor:
        return torch.from_numpy(multi_hot(self.requested)).float()


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


def pooled_tally(answers: Mapping[str, Answers], names: Sequence[str]) -> Tally:
    """Return one tally over several condition files."""
    return joined([answers[name].tally for name in names])


def _file(key: str) -> Path:
    return cache_folder() / "results" / f"{key}.npz"
