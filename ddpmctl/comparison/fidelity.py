"""Differences of fidelity between arms that were sampled on the same conditions and the same noise."""

from __future__ import annotations

import collections.abc
import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ddpmctl.comparison.verdict import Arm
from ddpmctl.evaluation.fidelity import PreparedReference, Statistic, jackknife
from ddpmctl.evaluation.results import all_images
from ddpmctl.progress import Progress
from ddpmctl.statistics.distributions import t_quantile
from ddpmctl.statistics.intervals import LEVEL, Interval


@dataclass(frozen=True)
class FidelityDifference:
    """One measure of two arms.

    Attributes:
        first, second: the value of each arm, the mean over its training seeds.
        difference: ``first`` - ``second``.
        floor: the value of real images.
    """

    key: str
    name: str
    first: float
    second: float
    difference: Interval
    floor: float


@dataclass(frozen=True)
class FidelityContrast:
    """All measures of a pair of arms."""

    first: str
    second: str
    differences: tuple[FidelityDifference, ...]


def fidelity_contrasts(arms: Sequence[Arm], prepared: PreparedReference) -> collections.abc.Generator[Progress, None, tuple[FidelityContrast, ...]]:
    """Yield progress and return the differences of every pair; the rows of the arms must have every image."""
    yield Progress("fidelity", 0, 1)
    sets = [[prepared.images(all_images(row.answers)) for row in arm.rows] for arm in arms]
    pairs, count = list(itertools.combinations(range(len(arms)), 2)), len(prepared.definitions)
    differences: dict[tuple[int, int], list[FidelityDifference]] = {pair: [] for pair in pairs}
    for number, (definition, floor) in enumerate(zip(prepared.definitions, prepared.floors, strict=True), start=1):
        measured = [[definition.of(images) for images in seeds] for seeds in sets]
        for i, j in pairs:
            interval, means = _difference(measured[i], measured[j], prepared.real.conditions)
            differences[i, j].append(FidelityDifference(definition.key, definition.name, *means, interval, floor.estimate))
        yield Progress("fidelity", number, count)
    return tuple(FidelityContrast(arms[i].name, arms[j].name, tuple(differences[i, j])) for i, j in pairs)


def _difference(first: Sequence[Statistic], second: Sequence[Statistic], conditions: int) -> tuple[Interval, tuple[float, float]]:
    """Return the difference with its interval, and both means.

    The interval is the jackknife's over conditions, paired; where an arm has several training seeds, their spread is added in quadrature.
    """
    means: list[float] = []
    seeds: list[list[float]] = []

    def statistic(kept: object) -> float:
        values = [[of(kept) for of in arm] for arm in (first, second)]  # type: ignore[arg-type]
        if not seeds:  # the first call is for all conditions
            seeds.extend(values)
            means.extend(statistics.fmean(arm) for arm in values)
        return statistics.fmean(values[0]) - statistics.fmean(values[1])

    found = jackknife(statistic, conditions)
    variance = sum(statistics.variance(arm) / len(arm) for arm in seeds if len(arm) > 1)
    df = sum(len(arm) - 1 for arm in seeds)
    reach = math.hypot(found.high - found.estimate, t_quantile((1 + LEVEL) / 2, df) * math.sqrt(variance) if df else 0.0)
    return Interval(found.estimate, found.estimate - reach, found.estimate + reach), (means[0], means[1])
