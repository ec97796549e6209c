"""The sampling pipeline: final images in batches, or every frame."""

from __future__ import annotations

import collections.abc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from ddpmctl.config import SamplingConfig
from ddpmctl.device import ComputeDevice, out_of_memory, release_memory
from ddpmctl.diffusion.denoiser import Diffusion, Guidance
from ddpmctl.diffusion.randomness import ImageNoise, Key
from ddpmctl.diffusion.samplers import Frame, own_options, sampler_times
from ddpmctl.diffusion.schedules import Schedule
from ddpmctl.distributed.job import SINGLE, Job
from ddpmctl.labels import multi_hot
from ddpmctl.progress import Progress
from ddpmctl.registry import SAMPLERS

R = TypeVar("R")
Progressing: TypeAlias = collections.abc.Generator[Progress, None, R]
IMAGE_SHAPE = (3, 64, 64)
BATCH = 64


@dataclass(frozen=True)
class ImageRequest:
    """One image to sample: its labels and its noise key; equal keys give equal noise."""

    labels: tuple[str, ...]
    key: Key


def requests_for(name: str, conditions: Sequence[tuple[str, ...]], *, seed: int, repeats: int = 1, first: int = 0) -> list[ImageRequest]:
    """Return requests for images ``first`` to ``repeats`` - 1 of each condition of a file, condition by condition."""
    return [ImageRequest(labels, (seed, name, index, copy)) for index, labels in enumerate(conditions) for copy in range(first, repeats)]


@dataclass(frozen=True)
class SamplingPipeline:
    """A network with its diffusion, sampling settings and device."""

    net: nn.Module
    diffusion: Diffusion
    sampling: SamplingConfig
    compute: ComputeDevice

    @property
    def steps(self) -> int:
        """Sampler steps per image."""
        return len(self._times()) - 1

    @property
    def nfe(self) -> int:
        """Network calls per image; a guided step needs two."""
        guidance, last = self._guidance(), self.diffusion.schedule.timesteps
        return self.steps + sum(guidance.at(t / last) > 0 for t in self._times()[:-1])

    def describe(self) -> str:
        """Return sampler, steps, guidance and network calls as text."""
        doubled = " (two per guided step)" if self.sampling.guidance > 0 else ""
        return f"{describe_sampling(with_actual_steps(self.sampling, self.diffusion.schedule))}: {self.nfe} network calls per image{doubled}"

    def _times(self) -> list[int]:
        return sampler_times(self.sampling.sampler, self.sampling.spacing, self.diffusion.schedule, self.sampling.steps)

    def _guidance(self) -> Guidance:
        return Guidance(self.sampling.guidance, self.sampling.guidance_from, self.sampling.guidance_to)

    def frames(self, requests: Sequence[ImageRequest]) -> Iterator[Frame]:
        """Yield the frames of a batch from pure noise (t = T) to the images (t = 0): float32 (B, 3, 64, 64) on the device."""
        device = self.compute.device
        labels = torch.from_numpy(multi_hot([r.labels for r in requests])).float().to(device)
        noise = ImageNoise([r.key for r in requests], IMAGE_SHAPE, device)
        times, sampler = self._times(), SAMPLERS.get(self.sampling.sampler)
        x = noise().contiguous(memory_format=torch.channels_last)
        yield Frame(times[0], x, x, pure_noise=True)
        denoise = self.diffusion.denoiser(self.net, labels, self._guidance())
        steps = sampler(denoise, x, times, self.diffusion.schedule, noise, **own_options(sampler, self.sampling))
        while True:
            # Enter the contexts for each step, so that the caller does not run in inference mode between steps.
            with torch.inference_mode(), self.compute.autocast():
                frame = next(steps, None)
            if frame is None:
                return
            yield frame

    def batches(self, requests: Sequence[ImageRequest], batch_size: int = BATCH) -> Iterator[Progress | Tensor]:
        """Yield progress, and the finished images in order: float32 (B, 3, 64, 64) in [-1, 1] on the device.

        If a batch does not fit in memory, it is repeated at half the size, with the same noise.
        """
        start, size, total = 0, batch_size, len(requests) * self.steps
        yield Progress("sampling", 0, total)
        while start < len(requests):
            part, done = requests[start : start + size], start * self.steps
            fits = True
            try:
                for frame in self.frames(part):
                    if not frame.pure_noise:
                        done += len(part)
                        yield Progress("sampling", done, total)
                    if frame.t == 0:
                        yield frame.x_t.clamp(-1, 1)
            except Exception as error:
                if len(part) == 1 or not out_of_memory(error):
                    raise
                fits = False
            # Outside of the handler: there, the error still references the tensors.
            if fits:
                start += len(part)
            else:
                size = len(part) // 2
                release_memory(self.compute)


def with_actual_steps(sampling: SamplingConfig, schedule: Schedule) -> SamplingConfig:
    """Return the settings with the actual number of steps instead of auto."""
    return replace(sampling, steps=len(sampler_times(sampling.sampler, sampling.spacing, schedule, sampling.steps)) - 1)


def describe_sampling(sampling: SamplingConfig) -> str:
    """Return sampling settings as text; spacing and guidance interval only if not the default."""
    spacing = "" if sampling.spacing == SamplingConfig.spacing else f" spaced by {sampling.spacing}"
    guided = (sampling.guidance_from, sampling.guidance_to)
    where = f" for t / T from {guided[0]:g} to {guided[1]:g}" if sampling.guidance > 0 and guided != (0, 1) else ""
    return f"{sampling.sampler}, {sampling.steps} steps{spacing}, guidance {sampling.guidance:g}{where}"


class Batch(NamedTuple):
    """The requests of one batch, which starts at ``start`` of ``total``."""

    requests: Sequence[ImageRequest]
    start: int
    total: int


def in_batches(requests: Sequence[ImageRequest], batch_size: int = BATCH) -> Iterator[Batch]:
    """Yield requests in batches; ranks take whole batches, so that the images do not depend on their number."""
    for start in range(0, len(requests), batch_size):
        yield Batch(requests[start : start + batch_size], start, len(requests))


def sample_batch(pipeline: SamplingPipeline, batch: Batch) -> Progressing[list[Tensor]]:
    """Yield progress and return the images of one batch, in several parts if memory was short: float32 on the device."""
    made = []
    for item in pipeline.batches(batch.requests, len(batch.requests)):
        if isinstance(item, Tensor):
            made.append(item)
        elif item.done or not batch.start:
            yield Progress(item.stage, batch.start * pipeline.steps + item.done, batch.total * pipeline.steps)
    return made


def sample_images(pipeline: SamplingPipeline, requests: Sequence[ImageRequest], batch_size: int = BATCH, job: Job = SINGLE) -> Progressing[Tensor]:
    """Yield progress and return the images, uint8 (N, 3, 64, 64) on the CPU; only rank 0 gets them."""

    def make(batch: Batch) -> Progressing[Tensor]:
        return torch.cat([to_uint8(images) for images in (yield from sample_batch(pipeline, batch))])

    made = [torch.empty((0, *IMAGE_SHAPE), dtype=torch.uint8)]
    for item in job.map_ordered(make, in_batches(requests, batch_size)):
        if isinstance(item, Tensor):
            made.append(item)
        else:
            yield item
    return torch.cat(made)


def to_uint8(images: Tensor) -> Tensor:
    """Convert images in [-1, 1] to uint8 on the CPU."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def label_tensor(requests: Sequence[ImageRequest]) -> Tensor:
    """Return the requested labels, multi-hot float32 (B, 24)."""
    return torch.from_numpy(multi_hot([r.labels for r in requests])).float()
