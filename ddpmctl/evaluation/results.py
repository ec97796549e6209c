"""Results of an evaluation, by checkpoint and condition file."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ddpmctl.config import Config, SamplingConfig
from ddpmctl.evaluation.misses import Misses, account_for
from ddpmctl.evaluation.scores import Score, score, top_k_hits
from ddpmctl.iclevr import ICLEVR
from ddpmctl.progress import Progress
from ddpmctl.statistics.tallies import Tally, concatenated
from ddpmctl.task import LabelSet, Task

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class FileResults:
    """Classifier outputs for one checkpoint's images of one condition file.

    Attributes:
        conditions: the requested label sets.
        probabilities: float32 (conditions, repeats, C).
        images: the first image of each condition, or all of them: uint8 (conditions, 1 or repeats, 3, H, W).
    """

    conditions: tuple[LabelSet, ...]
    probabilities: NDArray[np.float32]
    images: NDArray[np.uint8]
    task: Task = ICLEVR

    @property
    def repeats(self) -> int:
        """Images per condition."""
        return int(self.probabilities.shape[1])

    @property
    def has_every_image(self) -> bool:
        """Whether ``images`` holds all images."""
        return int(self.images.shape[1]) == self.repeats

    @property
    def flat(self) -> NDArray[np.float32]:
        """The probabilities image by image: (conditions * repeats, C)."""
        return self.probabilities.reshape(-1, self.task.columns)

    @property
    def requested(self) -> list[LabelSet]:
        """The requested labels of each image, in the order of ``flat``."""
        return [labels for labels in self.conditions for _ in range(self.repeats)]

    @functools.cached_property
    def score(self) -> Score:
        """The pooled score of all images."""
        return score(self.flat, self._wanted())

    @functools.cached_property
    def tally(self) -> Tally:
        """The hits of each image by condition."""
        hits = np.array(top_k_hits(self.flat, self._wanted())).reshape(len(self.conditions), self.repeats)
        return Tally(hits, np.array([len(labels) for labels in self.conditions]))

    @functools.cached_property
    def misses(self) -> Misses:
        """Counts of missing and extra objects."""
        return account_for(self.flat, self.requested, self.task)

    def first(self, repeats: int) -> FileResults:
        """Return the results of the first images of each condition."""
        return FileResults(self.conditions, self.probabilities[:, :repeats], self.images[:, :repeats], self.task)

    def _wanted(self) -> NDArray[np.uint8]:
        return self.task.multi_hot(self.requested)


@dataclass(frozen=True)
class CheckpointResult:
    """The results of one checkpoint.

    Attributes:
        sha256: hash of the file.
        recorded: accuracies stored in the file or its name, by condition file.
        answers: results by condition file.
        config: the settings used, with the actual number of sampler steps.
        foreign: the file has no settings, so they were assumed.
        kept: all results are from the cache.
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
    """A checkpoint that could not be scored."""

    path: Path
    reason: str


EvaluationEvent = Progress | Failed


def all_images(answers: Mapping[str, FileResults]) -> NDArray[np.uint8]:
    """Return the images of all condition files, uint8 (conditions, repeats, 3, H, W), of results that have every image."""
    return np.concatenate([one.images for one in answers.values()])


def pooled_tally(answers: Mapping[str, FileResults], names: Sequence[str]) -> Tally:
    """Return the tally of several condition files together."""
    return concatenated([answers[name].tally for name in names])
