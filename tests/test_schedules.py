"""Noise schedules: their formulas in float64, and common properties."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ddpmctl.config import Config
from ddpmctl.diffusion.schedules import Schedule, make_schedule
from ddpmctl.registry import SCHEDULES

STEPS = (2, 50, 400, 1000)


def schedule_of(name: str, timesteps: int = 400, **settings: float) -> Schedule:
    return make_schedule(Config().replace(schedule=name, timesteps=timesteps, **settings).diffusion)


def product_of(betas: list[float]) -> np.ndarray:
    """exp(cumsum(log(1 - beta))) with index 0 included, summed exactly at every index."""
    logs = [math.log1p(-beta) for beta in betas]
    return np.array([math.exp(math.fsum(logs[: t + 1])) for t in range(len(logs))])


@pytest.mark.parametrize("timesteps", STEPS)
@pytest.mark.parametrize(("b1", "b2"), [(1e-4, 0.02), (1e-3, 0.3)])
def test_linear_is_the_reports_formula(timesteps: int, b1: float, b2: float) -> None:
    schedule = schedule_of("linear", timesteps, beta_1=b1, beta_2=b2)
    betas = [(b2 - b1) * t / timesteps + b1 for t in range(timesteps + 1)]
    np.testing.assert_allclose(schedule.beta, betas, rtol=1e-12)
    np.testing.assert_allclose(schedule.alpha_bar, product_of(betas), rtol=1e-12)
    assert schedule.beta[0] == pytest.approx(b1)
    assert schedule.beta[-1] == pytest.approx(b2)


@pytest.mark.parametrize("timesteps", STEPS)
@pytest.mark.parametrize(("b1", "b2", "period"), [(1e-4, 0.02, 50.0), (1e-3, 0.3, 7.5)])
def test_cosine_periodic_is_the_reports_formula(timesteps: int, b1: float, b2: float, period: float) -> None:
    schedule = schedule_of("cosine-periodic", timesteps, beta_1=b1, beta_2=b2, period=period)
    betas = [(b2 - b1) / 2 * math.cos(2 * math.pi * t / period) + (b2 + b1) / 2 for t in range(timesteps + 1)]
    np.testing.assert_allclose(schedule.beta, betas, rtol=1e-9)
    np.testing.assert_allclose(schedule.alpha_bar, product_of(betas), rtol=1e-12)


@pytest.mark.parametrize("timesteps", STEPS)
def test_cosine_is_eq_17_of_nichol_and_dhariwal(timesteps: int) -> None:
    schedule = schedule_of("cosine", timesteps)

    def f(t: int) -> float:
        return math.cos((t / timesteps + 0.008) / 1.008 * math.pi / 2) ** 2

    unclipped = [1 - f(t) / f(t - 1) for t in range(1, timesteps + 1)]
    np.testing.assert_allclose(schedule.beta[1:], [min(beta, 0.999) for beta in unclipped], rtol=1e-9)
    assert schedule.beta[0] == 0
    assert schedule.beta.max() == 0.999  # f(T) = 0, so the last beta would be 1
    untouched = [t for t in range(1, timesteps) if max(unclipped[:t]) < 0.999]
    np.testing.assert_allclose(schedule.alpha_bar[untouched], [f(t) / f(0) for t in untouched], rtol=1e-9)


@pytest.mark.parametrize(("timesteps", "signal"), [(400, 0.132), (1000, 0.006)])
def test_the_signal_left_at_the_end_of_the_reports_schedule(timesteps: int, signal: float) -> None:
    schedule = schedule_of("linear", timesteps)
    assert round(math.sqrt(schedule.alpha_bar[-1]), 3) == signal
    assert round(float(schedule.signal[-1]), 3) == signal


@pytest.mark.parametrize("timesteps", STEPS)
@pytest.mark.parametrize("name", SCHEDULES.names())
def test_every_schedule_is_a_forward_process(name: str, timesteps: int) -> None:
    schedule = schedule_of(name, timesteps)
    bar = schedule.alpha_bar
    assert schedule.timesteps == timesteps
    for values in (schedule.beta, bar, schedule.signal, schedule.noise, schedule.log_snr):
        assert values.shape == (timesteps + 1,)
        assert values.dtype == np.float64
    assert np.all(np.diff(bar) < 0)
    assert np.all((bar > 0) & (bar <= 1))
    assert np.all((schedule.beta >= 0) & (schedule.beta < 1))
    np.testing.assert_allclose(bar, product_of(list(schedule.beta)), rtol=1e-9)
    np.testing.assert_allclose(schedule.signal, np.sqrt(bar))
    np.testing.assert_allclose(schedule.signal**2 + schedule.noise**2, 1)
    assert bar[0] == pytest.approx(1 - schedule.beta[0])
    assert bar[0] >= 0.98, "index 0 means clean, but for the report's beta_0"


@pytest.mark.parametrize("name", SCHEDULES.names())
def test_snr_and_log_snr_are_consistent(name: str) -> None:
    schedule = schedule_of(name)
    assert schedule.terminal_snr == pytest.approx(schedule.alpha_bar[-1] / (1 - schedule.alpha_bar[-1]))
    assert math.log(schedule.terminal_snr) == pytest.approx(schedule.log_snr[-1])
    np.testing.assert_allclose(np.exp(schedule.log_snr[1:] / 2), schedule.signal[1:] / schedule.noise[1:], rtol=1e-9)
    assert np.all(np.diff(schedule.log_snr) < 0)


def test_only_the_cosine_schedule_ends_in_pure_noise() -> None:
    assert schedule_of("cosine").terminal_snr < 1e-6
    assert schedule_of("linear").terminal_snr == pytest.approx(0.132**2 / (1 - 0.132**2), rel=0.01)
