"""A sampler as a table of numbers, which any program can carry out.

Every sampler here is linear: with the images x, the network's output and the predicted clean images x0, a step is

    x0    = p x + q output + r
    next  = a x + b x0 + c x0 of the step before + d noise + e

The numbers are found by running the sampler itself on random values and solving for them, so that a new sampler or objective needs nothing here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpmctl.diffusion.objectives import Prediction
from ddpmctl.diffusion.samplers import own_options
from ddpmctl.errors import UsageError
from ddpmctl.registry import SAMPLERS
from ddpmctl.sampling.pipeline import SamplingPipeline

PROBES = 64  # random values for the five numbers of a step
EXACT = 1e-9  # of the values, that may remain unexplained


@dataclass(frozen=True)
class Step:
    """One step of a sampler.

    Attributes:
        time: t / T, as the network gets it.
        guidance: the guidance weight w; where it is not 0, output = (1 + w) output with labels - w output without.
        x0: p, q, r.
        next: a, b, c, d, e.
        noise: whether the step draws noise; d is 0 where it does not.
    """

    time: float
    guidance: float
    x0: tuple[float, float, float]
    next: tuple[float, float, float, float, float]
    noise: bool


def sampling_plan(pipeline: SamplingPipeline) -> list[Step]:
    """Return the steps of a pipeline's sampler, from pure noise to the images.

    Raises:
        UsageError: the sampler is not linear in this way.
    """
    rng = torch.Generator().manual_seed(0)
    schedule, objective, last = pipeline.diffusion.schedule, pipeline.diffusion.objective, pipeline.diffusion.schedule.timesteps
    sampler, times, guidance = SAMPLERS.get(pipeline.sampling.sampler), pipeline.times(), pipeline.guidance()
    entered: list[tuple[Tensor, Tensor, Prediction]] = []
    drawn: dict[int, Tensor] = {}

    def values() -> Tensor:
        return torch.randn((1, PROBES), generator=rng, dtype=torch.float64)

    def denoise(x: Tensor, t: int) -> Prediction:
        out = values()
        prediction = objective.prediction(out, x, float(schedule.signal[t]), float(schedule.noise[t]))
        entered.append((x, out, prediction))
        return prediction

    def noise() -> Tensor:
        drawn[len(entered) - 1] = values()
        return drawn[len(entered) - 1]

    frames = list(sampler(denoise, values(), times, schedule, noise, **own_options(sampler, pipeline.sampling)))
    steps = []
    for number, ((x, out, prediction), frame) in enumerate(zip(entered, frames, strict=True)):
        before = entered[number - 1][2].x0 if number else torch.zeros_like(x)
        extra = drawn.get(number, torch.zeros_like(x))
        p, q, r = _solved(pipeline, prediction.x0, x, out)
        a, b, c, d, e = _solved(pipeline, frame.x_t, x, prediction.x0, before, extra)
        time = times[number] / last
        steps.append(Step(time, guidance.at(time), (p, q, r), (a, b, c, d, e), number in drawn))
    return steps


def plan_as_dict(pipeline: SamplingPipeline) -> dict[str, Any]:
    """Return the plan and what else a program needs to know, as plain values."""
    task = pipeline.task
    return {"size": task.size, "labels": list(task.classes), "columns": task.columns, "steps": [asdict(step) for step in sampling_plan(pipeline)]}


def _solved(pipeline: SamplingPipeline, result: Tensor, *parts: Tensor) -> list[float]:
    """Return the factors of ``parts``, and a constant, that make ``result``: the parts that are zero have the factor 0."""
    used = [float(part.abs().max()) > 0 for part in parts]
    columns = [part[0].numpy() for part, use in zip(parts, used, strict=True) if use]
    table = np.stack([*columns, np.ones(PROBES)], axis=1)
    wanted = result[0].numpy()
    found, *_ = np.linalg.lstsq(table, wanted, rcond=None)
    if np.abs(table @ found - wanted).max() > EXACT * max(1.0, np.abs(wanted).max()):
        raise UsageError(f"--sampler: {pipeline.sampling.sampler} is not linear, so it cannot be written as a table of numbers; give another one")
    factors = iter(found[:-1].tolist())
    return [*(next(factors) if use else 0.0 for use in used), float(found[-1]) if abs(found[-1]) > EXACT else 0.0]
