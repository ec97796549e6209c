"""Objectives: their targets, and x0 and eps from a network's output."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpmctl.benchmark.embedded import render_benchmark
from ddpmctl.config import DiffusionConfig
from ddpmctl.diffusion.objectives import DATA_MEAN, DATA_STD, SMALLEST_SIGNAL
from ddpmctl.diffusion.schedules import make_schedule
from ddpmctl.registry import OBJECTIVES, SCHEDULES


def pair(shape: tuple[int, ...] = (4, 3, 8, 8), dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(3)
    return torch.rand(shape, generator=rng, dtype=dtype) * 2 - 1, torch.randn(shape, generator=rng, dtype=dtype)


def scales(config: DiffusionConfig) -> list[tuple[float, float]]:
    schedule = make_schedule(config)
    return [(float(schedule.signal[t]), float(schedule.noise[t])) for t in range(1, schedule.timesteps + 1)]


@pytest.mark.parametrize("schedule", SCHEDULES.names())
@pytest.mark.parametrize("objective", OBJECTIVES.names())
def test_the_exact_target_gives_x0_and_eps_at_every_noise_level(objective: str, schedule: str) -> None:
    entry, (x0, eps) = OBJECTIVES.get(objective), pair()
    for signal, noise in scales(DiffusionConfig(schedule=schedule, timesteps=200)):
        x_t = signal * x0 + noise * eps
        target = entry.target(x0, eps, torch.tensor(signal, dtype=x0.dtype), torch.tensor(noise, dtype=x0.dtype))
        found = entry.prediction(target, x_t, signal, noise)
        torch.testing.assert_close(found.eps, eps, rtol=1e-9, atol=1e-9)
        if signal >= SMALLEST_SIGNAL:
            torch.testing.assert_close(found.x0, x0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("objective", OBJECTIVES.names())
def test_errors_of_the_output_have_a_bounded_gain(objective: str) -> None:
    x0, eps = pair()
    for signal, noise in [(0.0, 1.0), (1e-9, 1.0), (1.0, 1e-9), (1.0, 0.0)]:
        out = OBJECTIVES.get(objective).prediction(x0, eps, signal, noise)
        for end in out:
            assert end.abs().max() <= 2 * 10 / SMALLEST_SIGNAL


@pytest.mark.parametrize("signal", [0.999, 0.6, 0.05])
def test_objectives_agree_on_inexact_predictions(signal: float) -> None:
    """A prediction (x0, eps) that is consistent with x_t is the same under every objective."""
    noise, (x_t, x0) = math.sqrt(1 - signal**2), pair()
    eps = (x_t - signal * x0) / noise
    for name in OBJECTIVES.names():
        entry = OBJECTIVES.get(name)
        found = entry.prediction(entry.target(x0, eps, torch.tensor(signal), torch.tensor(noise)), x_t, signal, noise)
        torch.testing.assert_close(found.x0, x0, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.eps, eps, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "target"), [("eps", lambda x0, eps, a, b: eps), ("x0", lambda x0, eps, a, b: x0), ("v", lambda x0, eps, a, b: a * eps - b * x0)]
)
def test_targets_equal_their_formulas(name: str, target: Callable[..., Tensor]) -> None:
    x0, eps = pair()
    signal, noise = (torch.tensor(s, dtype=x0.dtype) for s in (0.8, 0.6))
    torch.testing.assert_close(OBJECTIVES.get(name).target(x0, eps, signal, noise), target(x0, eps, 0.8, 0.6))


@pytest.mark.parametrize("schedule", SCHEDULES.names())
def test_edms_target_has_unit_variance_for_data_of_the_stated_mean_and_deviation(schedule: str) -> None:
    rng = torch.Generator().manual_seed(0)
    x0 = DATA_MEAN + DATA_STD * torch.randn(200_000, generator=rng, dtype=torch.float64)
    eps = torch.randn(200_000, generator=rng, dtype=torch.float64)
    for signal, noise in scales(DiffusionConfig(schedule=schedule, timesteps=200))[::25]:
        target = OBJECTIVES.get("edm").target(x0, eps, torch.tensor(signal), torch.tensor(noise))
        # The target is uncorrelated with x_t, so 0, the initial output, is the best output without knowledge.
        x_t = signal * x0 + noise * eps
        assert target.mean().item() == pytest.approx(0, abs=0.01)
        assert target.std().item() == pytest.approx(1, abs=0.01)
        assert torch.corrcoef(torch.stack((target, x_t)))[0, 1].abs().item() < 0.01


def test_the_stated_mean_and_deviation_are_those_of_the_embedded_benchmark() -> None:
    images = np.concatenate(list(render_benchmark(100))) / 127.5 - 1
    assert images.mean() == pytest.approx(DATA_MEAN, abs=0.01)
    assert images.std() == pytest.approx(DATA_STD, abs=0.01)
