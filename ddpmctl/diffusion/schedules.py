"""Noise schedules in float64: beta and alpha_bar at t = 0..T, where t = 0 is the clean image."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ddpmctl.config import DiffusionConfig
from ddpmctl.registry import SCHEDULES

Array = npt.NDArray[np.float64]
BetaFunction = Callable[[DiffusionConfig, Array], Array]


@dataclass(frozen=True)
class Schedule:
    """A discrete forward process q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I).

    Attributes:
        beta: (T + 1,), float64. The report's formulas include index 0.
    """

    beta: Array

    @property
    def timesteps(self) -> int:
        """T, the largest t."""
        return len(self.beta) - 1

    @cached_property
    def alpha_bar(self) -> Array:
        """Cumulative product of 1 - beta, index 0 included, (T + 1,)."""
        bar: Array = np.exp(np.cumsum(np.log1p(-self.beta)))
        return bar

    @cached_property
    def signal(self) -> Array:
        """sqrt(alpha_bar_t), (T + 1,): the scale of x_0 in x_t."""
        scale: Array = np.sqrt(self.alpha_bar)
        return scale

    @cached_property
    def noise(self) -> Array:
        """sqrt(1 - alpha_bar_t), (T + 1,): the scale of eps in x_t."""
        scale: Array = np.sqrt(1 - self.alpha_bar)
        return scale

    @cached_property
    def log_snr(self) -> Array:
        """log(alpha_bar_t / (1 - alpha_bar_t)), (T + 1,); infinite where alpha_bar is 1."""
        with np.errstate(divide="ignore"):
            ratio: Array = np.log(self.alpha_bar) - np.log1p(-self.alpha_bar)
        return ratio

    @property
    def terminal_snr(self) -> float:
        """alpha_bar_T / (1 - alpha_bar_T); samplers assume 0, pure noise."""
        return float(self.alpha_bar[-1] / (1 - self.alpha_bar[-1]))


def make_schedule(config: DiffusionConfig) -> Schedule:
    """Return the schedule of a config."""
    betas: BetaFunction = SCHEDULES.get(config.schedule)
    return Schedule(betas(config, np.arange(config.timesteps + 1, dtype=np.float64)))


@SCHEDULES.register("linear")
def linear(config: DiffusionConfig, t: Array) -> Array:
    """beta rises linearly from beta_1 (at t = 0) to beta_2 (at t = T); Ho et al. 2020, section 4."""
    return (config.beta_2 - config.beta_1) * t / config.timesteps + config.beta_1


@SCHEDULES.register("cosine-periodic")
def cosine_periodic(config: DiffusionConfig, t: Array) -> Array:
    """beta is a cosine between beta_2 and beta_1 with a period of --period steps; the report's."""
    swing: Array = (config.beta_2 - config.beta_1) / 2 * np.cos(2 * math.pi * t / config.period)
    return swing + (config.beta_2 + config.beta_1) / 2


@SCHEDULES.register("cosine")
def cosine(config: DiffusionConfig, t: Array) -> Array:
    """alpha_bar falls as a squared cosine; Nichol & Dhariwal 2021, eq. 17, betas at most 0.999."""
    offset = 0.008
    bar = np.cos((t / config.timesteps + offset) / (1 + offset) * math.pi / 2) ** 2
    beta = np.zeros_like(t)  # eq. 17 divides by f(0), so beta_0 = 0
    beta[1:] = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
    return beta
