"""Confidence intervals by the cluster bootstrap over conditions (Efron 1979; Davison & Hinkley 1997, section 3.8).

A condition is resampled with all its images and labels, because these are not independent.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ddpmctl.statistics.distributions import NORMAL, t_quantile

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ddpmctl.statistics.tallies import Tally

DRAWS = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence limits."""

    estimate: float
    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        """Return whether a value is between the limits."""
        return self.low <= value <= self.high


@functools.lru_cache(maxsize=8)
def resamples(conditions: int) -> NDArray[np.float64]:
    """Return the count of each condition in each draw: (draws, conditions)."""
    rng = np.random.default_rng([0, 0, conditions])
    counts = rng.multinomial(conditions, np.full(conditions, 1 / conditions), size=DRAWS).astype(np.float64)
    counts.setflags(write=False)
    return counts


def accuracy_interval(tally: Tally) -> Interval:
    """Return the pooled accuracy with its confidence interval.

    Bootstrap percentiles, widened for few conditions (Hesterberg 2015, section 5.3). At an accuracy of 0 or 1 there is
    no variance to resample, so the limit is the exact binomial one for the number of conditions.
    """
    accuracy, count = tally.accuracy, tally.conditions
    if accuracy in (0.0, 1.0):
        far = ((1 - LEVEL) / 2) ** (1 / count)
        return Interval(accuracy, far, 1.0) if accuracy else Interval(accuracy, 0.0, 1 - far)
    counts = resamples(count)
    drawn = (counts @ tally.mean_hits) / (counts @ tally.labels)
    low, high = widened_percentiles(drawn, count)
    return Interval(accuracy, max(low, 0.0), min(high, 1.0))


def widened_percentiles(drawn: NDArray[np.float64], count: int) -> tuple[float, float]:
    """Return the limits for ``LEVEL`` from bootstrap draws of ``count`` clusters.

    Plain percentiles are too narrow by sqrt((n - 1) / n) and by the ratio of the t and the normal quantile.
    """
    if count < 2:  # no information about the variance
        return -math.inf, math.inf
    tail = NORMAL.cdf(math.sqrt(count / (count - 1)) * t_quantile((1 - LEVEL) / 2, count - 1))
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)
