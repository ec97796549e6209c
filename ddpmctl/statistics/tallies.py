"""Counts of requested labels found, by condition and image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Tally:
    """The hits of one checkpoint.

    Attributes:
        hits: (conditions, repeats), requested labels found in each image.
        labels: (conditions,), labels that each condition requests, at least 1.
    """

    hits: NDArray[np.int64]
    labels: NDArray[np.int64]

    def __post_init__(self) -> None:
        """Raise ValueError for inconsistent shapes or counts."""
        if self.hits.ndim != 2 or self.labels.shape != self.hits.shape[:1] or not self.hits.size:
            raise ValueError(f"the shapes of hits {self.hits.shape} and labels {self.labels.shape} do not match")
        if (self.labels < 1).any() or (self.hits < 0).any() or (self.hits > self.labels[:, None]).any():
            raise ValueError("hits must lie between 0 and the labels requested")

    @property
    def conditions(self) -> int:
        """The number of conditions."""
        return len(self.labels)

    @property
    def repeats(self) -> int:
        """Images per condition."""
        return int(self.hits.shape[1])

    @property
    def accuracy(self) -> float:
        """Hits / labels over all images."""
        return float(self.hits.sum() / (self.labels.sum() * self.repeats))

    @property
    def mean_hits(self) -> NDArray[np.float64]:
        """Mean hits of each condition over its images: (conditions,)."""
        mean: NDArray[np.float64] = self.hits.mean(axis=1)
        return mean


def concatenated(tallies: Sequence[Tally]) -> Tally:
    """Return one tally over the conditions of several files, with equal repeats."""
    return Tally(np.concatenate([tally.hits for tally in tallies]), np.concatenate([tally.labels for tally in tallies]))
