"""Requests for images, their batches, and sampling settings as text: the parts of sampling that need no network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from ddpmctl.config import SamplingConfig
from ddpmctl.diffusion.samplers import sampler_times
from ddpmctl.diffusion.schedules import Schedule

if TYPE_CHECKING:
    from ddpmctl.diffusion.randomness import Key

BATCH = 64


@dataclass(frozen=True)
class ImageRequest:
    """One image to sample.

    Attributes:
        labels: what it is to show.
        key: of its noise; equal keys give equal noise.
        particle: the number of the particle that is kept, if there are several; see ``SamplingPipeline.choose``.
    """

    labels: tuple[str, ...]
    key: Key
    particle: int = 0


def requests_for(name: str, conditions: Sequence[tuple[str, ...]], *, seed: int, repeats: int = 1, first: int = 0) -> list[ImageRequest]:
    """Return requests for images ``first`` to ``repeats`` - 1 of each condition of a file, condition by condition."""
    return [ImageRequest(labels, (seed, name, index, copy)) for index, labels in enumerate(conditions) for copy in range(first, repeats)]


class Batch(NamedTuple):
    """The requests of one batch, which starts at ``start`` of ``total``."""

    requests: Sequence[ImageRequest]
    start: int
    total: int


def in_batches(requests: Sequence[ImageRequest], batch_size: int = BATCH) -> Iterator[Batch]:
    """Yield requests in batches; ranks take whole batches, so that the images do not depend on their number."""
    for start in range(0, len(requests), batch_size):
        yield Batch(requests[start : start + batch_size], start, len(requests))


def with_actual_steps(sampling: SamplingConfig, schedule: Schedule) -> SamplingConfig:
    """Return the settings with the actual number of steps instead of auto."""
    return replace(sampling, steps=len(sampler_times(sampling.sampler, sampling.spacing, schedule, sampling.steps)) - 1)


def describe_sampling(sampling: SamplingConfig) -> str:
    """Return sampling settings as text; spacing and guidance interval only if not the default."""
    spacing = "" if sampling.spacing == SamplingConfig.spacing else f" spaced by {sampling.spacing}"
    guided = (sampling.guidance_from, sampling.guidance_to)
    where = f" for t / T from {guided[0]:g} to {guided[1]:g}" if sampling.guidance > 0 and guided != (0, 1) else ""
    accepted = f"at most {sampling.particles} particles, accepted at {sampling.accept:g}" if sampling.accept < 1 else f"{sampling.particles} particles"
    again = f", noised again to t / T = {sampling.retry_from:g}" if sampling.retry_from < 1 else ""
    chosen = f", one of {accepted}{again}" if sampling.particles > 1 else ""
    return f"{sampling.sampler}, {sampling.steps} steps{spacing}, guidance {sampling.guidance:g}{where}{chosen}"
