"""The mean of a series whose neighbouring values are alike, and its change, by moving blocks (Kuensch 1989).

A block is a stretch of neighbouring values. The sums over all overlapping blocks vary as much as the values and their likeness make them vary,
so they give the variance of a mean. It is the variance of a moving-blocks bootstrap with infinitely many draws, in closed form.

- Blocks are of the values' distances from a straight line, so that a difference that grows in training does not count as noise.
- The block length is the larger of two: 4 times that of Politis & White (2004), which is the best for estimating the variance, but tests need
  longer blocks (Sun, Phillips & Jin 2008); and 1.5 sqrt(n), near the 1.3 sqrt(n) that Lazarus, Lewis, Stock & Watson (2018) recommend for tests
  with this variance. The factors are those at which ``python -m tests.benchmarks.curves`` finds few false differences.
- Few blocks make the variance uncertain: intervals use Student's t with (number of blocks - 1) degrees of freedom.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ddpmctl.statistics.distributions import t_cdf, t_quantile
from ddpmctl.statistics.intervals import LEVEL, Interval

if TYPE_CHECKING:
    from numpy.typing import NDArray

FEWEST = 20  # values; of 16 values, a mean of one standard deviation was found in 6 of 100 simulations (AR(1), correlation 0.5)
LONGER = 4  # times the best block length for estimating the variance
FLOOR = 1.5  # of the block length, in sqrt(n)
ROUNDING = 1e-12


@dataclass(frozen=True)
class BlockEstimate:
    """A weighted sum of a series with its interval and two-sided p-value.

    Attributes:
        error: its standard error.
        block: the block length, in values.
        df: degrees of freedom of the error.
    """

    estimate: float
    error: float
    block: int
    df: float

    @property
    def interval(self) -> Interval:
        """The interval for ``LEVEL``."""
        reach = t_quantile((1 + LEVEL) / 2, self.df) * self.error
        return Interval(self.estimate, self.estimate - reach, self.estimate + reach)

    @property
    def p(self) -> float:
        """The p-value of a sum of 0."""
        if not self.error:
            return float(not self.estimate)
        return 2 * t_cdf(-abs(self.estimate) / self.error, self.df)


def block_mean(series: NDArray[np.float64]) -> BlockEstimate:
    """Return the mean of a series (n,) in its order.

    Raises:
        ValueError: it has fewer than ``FEWEST`` values.
    """
    return _estimate(series, 0)


def block_change(series: NDArray[np.float64]) -> BlockEstimate:
    """Return the mean of the second half of a series (n,) minus that of the first; of an odd number, the middle is in the second.

    Raises:
        ValueError: it has fewer than ``FEWEST`` values.
    """
    return _estimate(series, len(series) // 2)


def block_length(residuals: NDArray[np.float64]) -> int:
    """Return the block length of Politis & White (2004, section 3.2) for the variance of a mean; ``residuals`` (n,) have mean 0."""
    n = len(residuals)
    least = max(5, math.ceil(math.sqrt(math.log10(n))))
    most = min(math.ceil(math.sqrt(n)) + least, n - 1)
    covariance = np.array([residuals[lag:] @ residuals[: n - lag] / n for lag in range(most + 1)])
    if covariance[0] <= ROUNDING**2:
        return 1
    alike = np.abs(covariance[1:] / covariance[0]) > 2 * math.sqrt(math.log10(n) / n)
    last = next((lag for lag in range(most - least + 1) if not alike[lag : lag + least].any()), int(np.flatnonzero(alike).max(initial=0)) + 1)
    window = min(2 * max(last, 1), most)
    lags = np.arange(1, window + 1)
    weighted = 2 * np.minimum(1, 2 * (1 - lags / window)) * covariance[1 : window + 1]  # both signs of a lag; a flat-top window
    slope, spectrum = float(weighted @ lags), float(covariance[0] + weighted.sum())
    return max(1, math.ceil((1.5 * n * (slope / spectrum) ** 2) ** (1 / 3))) if spectrum > 0 else n


def _estimate(series: NDArray[np.float64], first: int) -> BlockEstimate:
    """Return the mean of a series (n,) without its first values, minus the mean of these if there are any."""
    n = len(series)
    if n < FEWEST:
        raise ValueError(f"{n} values are too few: {FEWEST} are needed")
    weights = np.repeat([-1 / max(first, 1), 1 / (n - first)], [first, n - first])
    line = np.stack([np.ones(n), np.arange(n) - (n - 1) / 2])
    line /= np.linalg.norm(line, axis=1, keepdims=True)
    residuals = series - line @ series @ line
    residuals[np.abs(residuals) < ROUNDING] = 0
    block = min(max(LONGER * block_length(residuals), round(FLOOR * math.sqrt(n))), n // 2)
    # Residuals vary less than the errors, as the line is taken out: scaled so that the variance is unbiased for independent values.
    independent = _block_sums(weights**2, block).sum() - (_block_sums(line * weights, block) ** 2).sum()
    variance = (_block_sums(residuals * weights, block) ** 2).sum() * (weights @ weights) / independent
    estimate = float(weights @ series)
    return BlockEstimate(estimate if abs(estimate) > ROUNDING else 0.0, math.sqrt(variance), block, n / block - 1)


def _block_sums(values: NDArray[np.float64], block: int) -> NDArray[np.float64]:
    """Return the sums over all blocks along the last axis: (..., n) to (..., n - block + 1)."""
    sums = np.cumsum(np.concatenate([np.zeros((*values.shape[:-1], 1)), values], axis=-1), axis=-1)
    found: NDArray[np.float64] = sums[..., block:] - sums[..., :-block]
    return found
