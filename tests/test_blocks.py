"""Means and changes of series whose neighbouring values are alike: closed forms, and simulations with known truth."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest

from ddpmctl.statistics.blocks import FEWEST, BlockEstimate, block_change, block_length, block_mean
from ddpmctl.statistics.distributions import t_quantile

from .simulated_curves import called, curves

if TYPE_CHECKING:
    from numpy.typing import NDArray


@pytest.mark.parametrize("epochs", [20, 60, 120, 300])
@pytest.mark.parametrize("estimate", [block_mean, block_change])
def test_without_a_difference_at_most_6_percent_are_called(estimate: Callable[[NDArray[np.float64]], BlockEstimate], epochs: int) -> None:
    rng = np.random.default_rng(epochs)
    first, second = (curves(rng, 2000, epochs, correlation=0.5) for _ in range(2))
    assert called(estimate, first - second) <= 0.06


def test_a_difference_of_one_standard_deviation_is_found() -> None:
    rng = np.random.default_rng(0)
    first, second = (curves(rng, 500, 120, correlation=0.5) for _ in range(2))
    assert called(block_mean, first - second + 1) > 0.85
    assert called(block_change, first - second + np.linspace(-2, 2, 120)) > 0.85


def test_alike_neighbours_widen_the_interval_as_much_as_they_must() -> None:
    """The variance of the mean of n values of an AR(1) series is (1 + r) / (1 - r) / n of theirs."""
    for correlation in (0.0, 0.5):
        found = [block_mean(series) for series in curves(np.random.default_rng(1), 200, 1000, correlation)]
        assert np.mean([one.error**2 for one in found]) == pytest.approx((1 + correlation) / (1 - correlation) / 1000, rel=0.1)


def test_the_interval_is_the_t_interval_of_the_blocks() -> None:
    found = block_mean(curves(np.random.default_rng(2), 1, 120, 0.5)[0])
    assert found.df == 120 / found.block - 1
    assert found.interval.high - found.estimate == pytest.approx(t_quantile(0.975, found.df) * found.error)
    shifted = block_mean(curves(np.random.default_rng(2), 1, 120, 0.5)[0] - found.interval.low)  # 0 is now the limit
    assert shifted.p == pytest.approx(0.05)


def test_a_steady_drift_is_a_change_and_no_noise() -> None:
    series, line = curves(np.random.default_rng(3), 1, 120, 0.5)[0], np.linspace(-5, 5, 120)
    assert block_mean(series + line).error == pytest.approx(block_mean(series).error)
    assert block_mean(series + line).estimate == pytest.approx(series.mean())
    assert block_change(series + line).error == pytest.approx(block_change(series).error)
    assert block_change(series + line).estimate == pytest.approx(series[60:].mean() - series[:60].mean() + line[60:].mean() - line[:60].mean())


def test_of_an_odd_number_the_middle_is_in_the_second_half() -> None:
    series = curves(np.random.default_rng(4), 1, 21, 0.5)[0]
    assert block_change(series).estimate == pytest.approx(series[10:].mean() - series[:10].mean())


def test_equal_curves_are_level_and_a_constant_difference_is_certain() -> None:
    level = block_mean(np.zeros(40))
    assert (level.estimate, level.error, level.p) == (0, 0, 1)
    apart = block_mean(np.full(40, 0.6) - 0.5)
    assert (apart.estimate, apart.error, apart.p) == (pytest.approx(0.1), 0, 0)
    assert block_change(np.full(40, 0.6) - 0.5).p == 1


def test_block_lengths_are_the_best_for_an_ar1_series() -> None:
    """(1.5 n)^(1/3) (2 r / (1 - r^2))^(2/3), Politis & White 2004: 20 for n = 3000 and r = 0.5; independent values need none."""
    for correlation, best in ((0.5, (1.5 * 3000) ** (1 / 3) * (1 / 0.75) ** (2 / 3)), (0.0, 1)):
        lengths = [block_length(series - series.mean()) for series in curves(np.random.default_rng(5), 40, 3000, correlation)]
        assert np.median(lengths) == pytest.approx(best, rel=0.15, abs=2)


def test_few_values_make_few_blocks_and_too_few_are_refused() -> None:
    few = block_mean(curves(np.random.default_rng(6), 1, FEWEST, 0.8)[0])
    assert 1 <= few.df < 3
    assert few.block >= math.sqrt(FEWEST)
    for estimate in (block_mean, block_change):
        for count in (0, 1, FEWEST - 1):
            with pytest.raises(ValueError, match=f"{count} values are too few: {FEWEST} are needed"):
                estimate(np.zeros(count))
