"""Contrasts between arms that were scored on the same conditions and the same noise.

An arm is one or more checkpoints that differ only in the training seed. A contrast is a weighted sum of the arms'
accuracies: (1, -1) is a difference, (1, -1, -1, 1) / 2 an interaction of two factors. Its error has two sources:
the sample of conditions and images, and the training seeds.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ddpmctl.statistics.distributions import t_quantile
from ddpmctl.statistics.intervals import DRAWS, LEVEL, Interval, resamples, widened_percentiles

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ddpmctl.statistics.tallies import Tally

POWER = 0.8
MOST_REPEATS = 1000
MOST_SEEDS = 100
TRAINING_COST = 50  # of one run, in images per condition: quick's five minutes of training are about 50 images of each of 96 conditions


@dataclass(frozen=True)
class Spread:
    """The variance components of a contrast.

    Attributes:
        conditions: the variance from the sample of conditions.
        images: the variance from the images of a condition; NaN if there is one image per condition.
        seeds: the variance from the training seeds; 0 if no arm has two seeds.
        repeats: images per condition.
        df: degrees of freedom of the conditions.
        seeds_df: degrees of freedom of ``seeds``; 0 if no arm has two seeds.
        weights: the squared non-zero weights of the arms.
        one_seed: the variance between the training seeds of an arm, without the variance of their images.
    """

    conditions: float
    images: float
    seeds: float
    repeats: int
    df: int
    seeds_df: int
    weights: tuple[float, ...] = ()
    one_seed: float = 0.0

    def error(self, repeats: int | None = None, seeds: int | None = None) -> float:
        """Return the standard error, optionally for other numbers of images per condition and training seeds per arm."""
        images = 0.0 if math.isnan(self.images) else self.images * self.repeats / (repeats or self.repeats)
        return math.sqrt(self.conditions + images + self._seeds(seeds)[0])

    def detectable(self, repeats: int | None = None, seeds: int | None = None) -> float:
        """Return the smallest difference that a test at 5 % finds with a power of 80 %."""
        df = self._total_df(seeds)
        return (t_quantile((1 + LEVEL) / 2, df) + t_quantile(POWER, df)) * self.error(repeats, seeds)

    def repeats_for(self, difference: float, seeds: int | None = None) -> int | None:
        """Return the fewest images per condition that detect a difference with a power of 80 %; None if no number does."""
        if math.isnan(self.images) or self.detectable(MOST_REPEATS, seeds) > difference:
            return None
        low, high = 0, MOST_REPEATS  # low is too few, high is enough
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.detectable(middle, seeds) <= difference else (middle, high)
        return high

    def cheapest_for(self, difference: float) -> tuple[int, int | None] | None:
        """Return the images per condition and training seeds per arm that detect a difference with a power of 80 % at the lowest cost.

        The cost is the images per condition of all seeds of an arm, and ``TRAINING_COST`` for each seed more than now. Neither number falls
        below its present value; None for the seeds leaves them as they are, and None altogether means that no numbers are enough.
        More seeds leave the variance from conditions and images as it is, which is on the safe side.
        """
        now = 1 + self.seeds_df / max(len(self.weights), 1)  # per arm, on average
        more = range(math.floor(now) + 1, MOST_SEEDS + 1) if self.one_seed else range(0)
        plans = []
        for seeds in (None, *more):
            if (repeats := self.repeats_for(difference, seeds)) is not None:
                repeats, count = max(repeats, self.repeats), seeds or now
                plans.append((count * repeats + TRAINING_COST * (count - now), repeats, seeds))
        return min(plans, key=lambda plan: plan[0])[1:] if plans else None

    def _seeds(self, seeds: int | None) -> tuple[float, int]:
        """Return the variance from training seeds and its degrees of freedom, for ``seeds`` per arm."""
        if seeds is None:
            return self.seeds, self.seeds_df
        return self.one_seed * sum(self.weights) / seeds, len(self.weights) * (seeds - 1)

    def _total_df(self, seeds: int | None = None) -> float:
        """Return Satterthwaite's degrees of freedom of the total variance."""
        rest = self.conditions + (0.0 if math.isnan(self.images) else self.images)
        part, df = self._seeds(seeds)
        parts = rest**2 / self.df + (part**2 / df if df else 0.0)
        return (rest + part) ** 2 / parts if parts else float(self.df)


@dataclass(frozen=True)
class Contrast:
    """A weighted sum of accuracies with its interval and p-value."""

    interval: Interval
    p: float
    spread: Spread

    @property
    def estimate(self) -> float:
        """The weighted sum itself."""
        return self.interval.estimate


def contrast(arms: Sequence[Sequence[Tally]], weights: Sequence[float]) -> Contrast:
    """Return a contrast of arms.

    The interval is a bootstrap over conditions; the p-value flips the sign of each condition's difference (Fisher's
    randomisation test). Both add a Student's t error with the variance of the training seeds to each draw.

    Args:
        arms: the checkpoints of each arm, all on the same conditions with the same number of images.
        weights: one per arm, summing to 0.

    Raises:
        ValueError: the arms have different conditions or images, or the weights do not fit.
    """
    labels = _common_labels(arms, weights)
    count, total = len(labels), float(labels.sum())
    used = [(weight, arm) for weight, arm in zip(weights, arms, strict=True) if weight]
    per_image = sum(weight * np.mean([tally.hits for tally in arm], axis=0) for weight, arm in used)  # (conditions, repeats)
    gaps = np.asarray(per_image).mean(axis=1)
    estimate = float(gaps.sum() / total)
    spread = _spread(np.asarray(per_image), labels, used)
    counts = resamples(count)
    noise = math.sqrt(spread.seeds) * _student(spread.seeds_df) if spread.seeds else 0.0
    low, high = widened_percentiles((counts @ gaps) / (counts @ labels) + noise, count)
    flipped = np.abs(_signs(count) @ gaps / total + noise)
    as_large = int((flipped >= abs(estimate) - 1e-12).sum())  # tolerance for rounding
    return Contrast(Interval(estimate, low, high), (1 + as_large) / (1 + len(flipped)), spread)


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values adjusted for multiple comparisons (Holm 1979)."""
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        highest = max(highest, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = highest
    return adjusted


def _common_labels(arms: Sequence[Sequence[Tally]], weights: Sequence[float]) -> NDArray[np.int64]:
    tallies = [tally for arm in arms for tally in arm]
    if len(weights) != len(arms) or abs(sum(weights)) > 1e-9 or not any(weights) or not all(arms):
        raise ValueError("a contrast needs one weight per arm, not all zero, summing to zero, and a checkpoint in each arm")
    first = tallies[0]
    if any(t.hits.shape != first.hits.shape or not np.array_equal(t.labels, first.labels) for t in tallies):
        raise ValueError("arms must be scored on the same conditions with the same number of images")
    return first.labels


def _spread(per_image: NDArray[np.float64], labels: NDArray[np.int64], arms: Sequence[tuple[float, Sequence[Tally]]]) -> Spread:
    count, repeats = per_image.shape
    total = float(labels.sum())
    gaps = per_image.mean(axis=1)
    # Linearised ratio: the contribution of each condition to the error of sum(gaps) / sum(labels).
    parts = gaps - gaps.sum() / total * labels
    whole = float((parts**2).sum()) * count / max(count - 1, 1) / total**2
    images = float(per_image.var(axis=1, ddof=1).sum()) / repeats / total**2 if repeats > 1 else math.nan
    conditions = max(0.0, whole - images) if repeats > 1 else whole
    if repeats > 1:
        images = whole - conditions  # keeps the sum equal to ``whole``
    degrees = sum(len(arm) - 1 for _, arm in arms)
    squared = tuple(weight**2 for weight, _ in arms)
    seeds, one_seed = 0.0, 0.0
    if degrees:
        within = sum(float(np.var([t.accuracy for t in arm], ddof=1)) * (len(arm) - 1) for _, arm in arms if len(arm) > 1) / degrees
        # The accuracies of seeds also differ because of their images, which are counted above.
        one_seed = max(0.0, within - _residual(arms, degrees, total))
        seeds = one_seed * sum(weight**2 / len(arm) for weight, arm in arms)
    return Spread(conditions, images, seeds, repeats, max(count - 1, 1), degrees, squared, one_seed)


def _residual(arms: Sequence[tuple[float, Sequence[Tally]]], degrees: int, total: float) -> float:
    """Return the residual variance of a checkpoint's accuracy after removing the effects of seed and condition."""
    squares = 0.0
    for _, arm in arms:
        hits = np.stack([tally.mean_hits for tally in arm])  # (seeds, conditions)
        labels = arm[0].labels
        own = hits - hits.sum(axis=1, keepdims=True) / total * labels  # remove the effect of the seed
        own = own - own.mean(axis=0)  # remove the effect of the condition
        squares += float((own**2).sum())
    count = len(arms[0][1][0].labels)
    return squares * count / max(count - 1, 1) / degrees / total**2


@functools.lru_cache(maxsize=8)
def _signs(conditions: int) -> NDArray[np.float64]:
    rng = np.random.default_rng([0, 1, conditions])
    signs = rng.integers(0, 2, size=(DRAWS, conditions)).astype(np.float64) * 2 - 1
    signs.setflags(write=False)
    return signs


@functools.lru_cache(maxsize=8)
def _student(df: int) -> NDArray[np.float64]:
    draws: NDArray[np.float64] = np.random.default_rng([0, 2, df]).standard_t(df, size=DRAWS)
    draws.setflags(write=False)
    return draws
