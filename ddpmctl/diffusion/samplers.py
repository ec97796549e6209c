"""Samplers: each a short generator that walks from pure noise to a clean image.

``times`` falls from T to 0. A sampler yields a ``Frame`` for every time but the first, so the
last has t = 0 and holds the finished images.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ddpmctl.diffusion.objectives import Prediction
from ddpmctl.diffusion.schedules import Schedule
from ddpmctl.registry import SAMPLERS

if TYPE_CHECKING:
    from torch import Tensor

Denoise = Callable[["Tensor", int], Prediction]
"""(x_t (B, 3, H, W), t) -> x0_hat and eps_hat."""
Noise = Callable[[], "Tensor"]
"""() -> the next standard normal noise of the batch, (B, 3, H, W)."""


class Frame(NamedTuple):
    """The state after a step: x_t (B, 3, H, W), and x0_hat, the clean image that the step aimed at.

    ``pure_noise`` marks the start, where no step has been taken and x0_hat says nothing.
    """

    t: int
    x_t: Tensor
    x0_hat: Tensor
    pure_noise: bool = False


Sampler = Callable[[Denoise, "Tensor", Sequence[int], Schedule, Noise, float], Iterator[Frame]]


def spaced_times(timesteps: int, steps: int | None) -> list[int]:
    """Return steps + 1 times from T down to 0, evenly spaced ("trailing", Lin et al. 2023, table 2).

    Args:
        timesteps: T of the schedule.
        steps: network evaluations per image; None walks through every t.
    """
    count = timesteps if steps is None else min(steps, timesteps)
    return [round(timesteps * (count - i) / count) for i in range(count + 1)]


@SAMPLERS.register("ddpm")
def ddpm(denoise: Denoise, x: Tensor, times: Sequence[int], schedule: Schedule, noise: Noise, eta: float) -> Iterator[Frame]:
    """ancestral sampling with variance beta_t; Ho et al. 2020, algorithm 2."""
    bar = schedule.alpha_bar
    for t, s in itertools.pairwise(times):
        prediction = denoise(x, t)
        alpha = float(bar[t] / bar[s])  # alpha_t where t - s = 1, else the product over the steps left out
        x = (x - prediction.eps * ((1 - alpha) / float(schedule.noise[t]))) / math.sqrt(alpha)
        if s > 0:
            x = x + math.sqrt(1 - alpha) * noise()
        yield Frame(s, x, prediction.x0)


@SAMPLERS.register("ddim")
def ddim(denoise: Denoise, x: Tensor, times: Sequence[int], schedule: Schedule, noise: Noise, eta: float) -> Iterator[Frame]:
    """implicit sampling, --eta of ancestral noise; Song et al. 2021, eq. 12 and 16."""
    for t, s in itertools.pairwise(times):
        bar_t, bar_s = float(schedule.alpha_bar[t]), _clean(schedule, s)
        prediction = denoise(x, t)
        sigma = eta * math.sqrt((1 - bar_s) / (1 - bar_t) * (1 - bar_t / bar_s))
        x = math.sqrt(bar_s) * prediction.x0 + math.sqrt(max(1 - bar_s - sigma**2, 0.0)) * prediction.eps
        if sigma > 0:
            x = x + sigma * noise()
        yield Frame(s, x, prediction.x0)


@SAMPLERS.register("dpm++2m")
def dpm_plus_plus_2m(denoise: Denoise, x: Tensor, times: Sequence[int], schedule: Schedule, noise: Noise, eta: float) -> Iterator[Frame]:
    """second-order multistep solver of the probability flow; Lu et al. 2022b, algorithm 2."""
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
    """Return alpha_bar_t, and exactly 1 at index 0, where the image is clean whatever beta_0 is."""
    return float(schedule.alpha_bar[t]) if t else 1.0
