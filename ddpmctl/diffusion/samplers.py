"""Samplers and the spacings of their steps.

A sampler is a generator. ``times`` decreases from T to 0; the sampler yields a ``Frame`` for every time except the first.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from ddpmctl.config import SamplingConfig, Value
from ddpmctl.diffusion.objectives import Prediction
from ddpmctl.diffusion.schedules import Schedule
from ddpmctl.registry import SAMPLERS, SPACINGS

if TYPE_CHECKING:
    from torch import Tensor

Denoise = Callable[["Tensor", int], Prediction]
"""(x_t (B, 3, H, W), t) -> x0_hat and eps_hat."""
Noise = Callable[[], "Tensor"]
"""() -> the next standard normal noise of the batch, (B, 3, H, W)."""


class Frame(NamedTuple):
    """The state after a step: x_t and the x0_hat that the step used, both (B, 3, H, W).

    ``pure_noise`` marks the initial state, where x0_hat has no meaning.
    """

    t: int
    x_t: Tensor
    x0_hat: Tensor
    pure_noise: bool = False


Sampler = Callable[..., Iterator[Frame]]
"""(denoise, x_T, times, schedule, noise, *, own options) -> frames; an own option is a keyword with the name of a sampling setting."""
S = TypeVar("S", bound=Callable[..., Iterator[Frame]])


def sampler_times(sampler: str, spacing: str, schedule: Schedule, steps: int | None) -> list[int]:
    """Return the times of a sampler's steps, decreasing from T to 0.

    ``steps`` is the number of sampler steps; None: the sampler's default; T or more: every t.
    """
    if steps is None:
        steps = SAMPLERS.get(sampler).auto_steps
    if steps is None or steps >= schedule.timesteps:
        return list(range(schedule.timesteps, -1, -1))
    times: list[int] = SPACINGS.get(spacing)(schedule, steps)
    return times


def own_options(sampler: Sampler, config: SamplingConfig) -> dict[str, Value]:
    """Return the sampling settings that are keywords of a sampler, such as ddim's eta."""
    keywords = [p.name for p in inspect.signature(sampler).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    return {name: getattr(config, name) for name in keywords}


@SPACINGS.register("even")
def even(schedule: Schedule, steps: int) -> list[int]:
    """evenly in t, "trailing"; Lin et al. 2023, table 2."""
    return [round(schedule.timesteps * (steps - i) / steps) for i in range(steps + 1)]


@SPACINGS.register("quadratic")
def quadratic(schedule: Schedule, steps: int) -> list[int]:
    """evenly in sqrt(t), with short steps at low noise; Song et al. 2021, appendix D.2."""
    return _by_power(schedule, steps, 2)


@SPACINGS.register("cubic")
def cubic(schedule: Schedule, steps: int) -> list[int]:
    """evenly in the cube root of t, with still shorter steps at low noise"""
    return _by_power(schedule, steps, 3)


def _by_power(schedule: Schedule, steps: int, power: int) -> list[int]:
    return _decreasing(schedule.timesteps, [schedule.timesteps * (1 - i / steps) ** power for i in range(1, steps)])


@SPACINGS.register("log-snr")
def even_in_log_snr(schedule: Schedule, steps: int) -> list[int]:
    """evenly in log SNR; Lu et al. 2022, section 3.4."""
    return _nearest(schedule, np.linspace(_first_log_snr(schedule), schedule.log_snr[1], steps))


@SPACINGS.register("karras")
def karras(schedule: Schedule, steps: int) -> list[int]:
    """evenly in (noise / signal)^(1/7); Karras et al. 2022, eq. 5."""
    largest, smallest = (math.exp(-log_snr / 2) for log_snr in (_first_log_snr(schedule), float(schedule.log_snr[1])))
    sigma = np.linspace(largest ** (1 / 7), smallest ** (1 / 7), steps) ** 7
    return _nearest(schedule, -2 * np.log(sigma))


LOWEST_LOG_SNR = -10.0  # at pure noise, log SNR has no lower bound


def _first_log_snr(schedule: Schedule) -> float:
    return max(float(schedule.log_snr[-1]), LOWEST_LOG_SNR)


def _nearest(schedule: Schedule, log_snr: np.ndarray) -> list[int]:
    """Return T, the times with the nearest log SNR, and 0: strictly decreasing, steps + 1 times.

    ``log_snr`` (steps,) increases and starts with the value at T.
    """
    return _decreasing(schedule.timesteps, [1 + int(np.abs(schedule.log_snr[1:] - wanted).argmin()) for wanted in log_snr[1:]])


def _decreasing(last: int, between: Sequence[float]) -> list[int]:
    """Return ``last``, the times ``between`` rounded and moved as little as makes all times differ, and 0."""
    times = [last]
    for index, wanted in enumerate(between):
        highest, lowest = times[-1] - 1, len(between) - index  # leave enough times for the remaining steps
        times.append(min(max(round(wanted), lowest), highest))
    return [*times, 0]


def auto_steps(count: int | None) -> Callable[[S], S]:
    """Return a decorator that sets a sampler's default number of steps; None: all T."""

    def mark(sampler: S) -> S:
        sampler.auto_steps = count  # type: ignore[attr-defined]
        return sampler

    return mark


@SAMPLERS.register("ddpm")
@auto_steps(None)
def ddpm(denoise: Denoise, x: Tensor, times: Sequence[int], schedule: Schedule, noise: Noise) -> Iterator[Frame]:
    """ancestral sampling with variance beta_t; Ho et al. 2020, algorithm 2."""
    bar = schedule.alpha_bar
    for t, s in itertools.pairwise(times):
        prediction = denoise(x, t)
        alpha = float(bar[t] / bar[s])  # alpha_t if t - s = 1, else the product of the skipped alphas
        x = (x - prediction.eps * ((1 - alpha) / float(schedule.noise[t]))) / math.sqrt(alpha)
        if s > 0:
            x = x + math.sqrt(1 - alpha) * noise()
        yield Frame(s, x, prediction.x0)


@SAMPLERS.register("ddim")
@auto_steps(50)
def ddim(denoise: Denoise, x: Tensor, times: Sequence[int], schedule: Schedule, noise: Noise, *, eta: float = 0.0) -> Iterator[Frame]:
    """implicit sampling, --eta scales the noise; Song et al. 2021, eq. 12 and 16."""
    for t, s in itertools.pairwise(times):
        bar_t, bar_s = float(schedule.alpha_bar[t]), _clean(schedule, s)
        prediction = denoise(x, t)
        sigma = eta * math.sqrt((1 - bar_s) / (1 - bar_t) * (1 - bar_t / bar_s))
        x = math.sqrt(bar_s) * prediction.x0 + math.sqrt(max(1 - bar_s - sigma**2, 0.0)) * prediction.eps
        if sigma > 0:
            x = x + sigma * noise()
        yield Frame(s, x, prediction.x0)


@SAMPLERS.register("dpm++2m")
@auto_steps(16)
def dpm_plus_plus_2m(denoise: Denoise, x: Tensor, times: Sequence[int], schedule: Schedule, noise: Noise) -> Iterator[Frame]:
    """second-order multistep ODE solver; Lu et al. 2022b, algorithm 2."""
    x0_before, h_before = None, 0.0
    for t, s in itertools.pairwise(times):
        prediction = denoise(x, t)
        if s == 0:  # lambda_0 is infinite: the limit of the first-order step is x0_hat
            x = prediction.x0
        else:
            h = float(schedule.log_snr[s] - schedule.log_snr[t]) / 2  # lambda = log(signal / noise) = log_snr / 2
            x0 = prediction.x0
            if x0_before is not None:
                x0 = x0 + (h / (2 * h_before)) * (x0 - x0_before)
            x = float(schedule.noise[s] / schedule.noise[t]) * x - float(schedule.signal[s]) * math.expm1(-h) * x0
            x0_before, h_before = prediction.x0, h
        yield Frame(s, x, prediction.x0)


def _clean(schedule: Schedule, t: int) -> float:
    """Return alpha_bar_t, and exactly 1 at t = 0, whatever beta_0 is."""
    return float(schedule.alpha_bar[t]) if t else 1.0
