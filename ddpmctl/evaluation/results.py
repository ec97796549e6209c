"""Results of an evaluation: what the classifier found in one checkpoint's images, by condition file."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ddpmctl.config import Config, SamplingConfig
from ddpmctl.evaluation.misses import Misses, account_for
from ddpmctl.evaluation.scores import Score, score, top_k_hits
from ddpmctl.labels import CLASSES, LabelSet, multi_hot
from ddpmctl.progress import Progress
from ddpmctl.statistics.tallies import Tally, concatenated

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True)
class FileResults:
    """What a classifier said of one checkpoint's pictures for one condition file.

    Attributes:
        conditions: the label sets asked for.
        probabilities: float32, (conditions, repeats, 24).
        pictures: the first picture of each condition, uint8, (conditions, 3, 64, 64).
    """

    conditions: tuple[LabelSet, ...]
    probabilities: NDArray[np.float32]
    images: NDArray[np.uint8]

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

    def first(self, repeats: int) -> FileResults:
        """Return the answers to the first pictures of each condition."""
        return FileResults(self.conditions, self.probabilities[:, :repeats], self.images)

    def _wanted(self) -> Tensor:
        return torch.from_numpy(multi_hot(self.requested)).float()


@dataclass(frozen=True)
class CheckpointResult:
    """A checkpoint has been scored, now or, where ``kept``, at an earlier call.

    Attributes:
        sha256: of the checkpoint's file.
        recorded: accuracies that its file carries, by condition file.
        answers: what the classifier said, by condition file.
        config: the settings used, with the number of sampler steps taken.
        foreign: the file carries no settings; what it cannot say was assumed.
    """

    path: Path
    sha256: str
    epoch: int | None
    loss: float | None
    recorded: dict[str, float]
    answers: dict[str, FileResults]
    config: Config
    foreign: bool
    kept: bool

    @property
    def scores(self) -> dict[str, Score]:
        """The pooled score of each condition file."""
        return {name: answers.score for name, answers in self.answers.items()}

    @property
    def sampling(self) -> SamplingConfig:
        """The sampling settings used."""
        return self.config.sampling


@dataclass(frozen=True)
class Failed:
    """A file could not be used; the others go on."""

    path: Path
    reason: str


EvaluationEvent = Progress | CheckpointResult | Failed


def pooled_tally(answers: Mapping[str, FileResults], names: Sequence[str]) -> Tally:
    """Return one tally over several condition files."""
    return concatenated([answers[name].tally for name in names])
