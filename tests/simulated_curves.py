"""Simulated curves of recorded scores with known truth, for the tests and the benchmark of their differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ddpmctl.statistics.blocks import BlockEstimate

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Curves = Callable[[np.random.Generator, int, int, float], NDArray[np.float64]]

LABELS = 72  # that the lab's file test.json requests


def curves(rng: np.random.Generator, count: int, epochs: int, correlation: float) -> NDArray[np.float64]:
    """Return curves (count, epochs) of standard deviation 1 whose neighbouring values are correlated: AR(1)."""
    values = rng.standard_normal((count, epochs))
    for epoch in range(1, epochs):
        values[:, epoch] = correlation * values[:, epoch - 1] + math.sqrt(1 - correlation**2) * values[:, epoch]
    return values


def accuracies(rng: np.random.Generator, count: int, epochs: int, correlation: float) -> NDArray[np.float64]:
    """Return curves (count, epochs) of the share of hits among ``LABELS``, binomial around an accuracy whose logit (mean 0.5, sd 0.3) is AR(1)."""
    return rng.binomial(LABELS, 1 / (1 + np.exp(-0.5 - 0.3 * curves(rng, count, epochs, correlation)))) / LABELS


def called(estimate: Callable[[NDArray[np.float64]], BlockEstimate], gaps: NDArray[np.float64]) -> float:
    """Return the share of series (count, epochs) whose estimate is called different from 0 at 5 %."""
    return float(np.mean([estimate(series).p < 0.05 for series in gaps]))
