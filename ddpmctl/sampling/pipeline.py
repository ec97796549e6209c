"""The sampling pipeline: final images in batches, or every frame."""

from __future__ import annotations

import collections.abc
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from ddpmctl.config import Config, SamplingConfig
from ddpmctl.device import ComputeDevice, release_memory
from ddpmctl.diffusion.denoiser import Diffusion, Guidance
from ddpmctl.diffusion.randomness import ImageNoise
from ddpmctl.diffusion.samplers import Frame, own_options, sampler_times
from ddpmctl.distributed.job import SINGLE, Job
from ddpmctl.errors import DataError, UsageError, out_of_memory
from ddpmctl.iclevr import ICLEVR
from ddpmctl.nets.recognition import none_or_one, none_or_some
from ddpmctl.progress import Progress
from ddpmctl.registry import NETWORKS, SAMPLERS
from ddpmctl.sampling.requests import BATCH, Batch, ImageRequest, describe_sampling, in_batches, with_actual_steps
from ddpmctl.task import Task

R = TypeVar("R")
Progressing: TypeAlias = collections.abc.Generator[Progress, None, R]
CHOICE_TIME = 0.1  # t / T at which a particle is chosen: shapes are decided, and the recogniser was trained at this noise


class NotFiniteError(DataError):
    """A network's images have values that are infinite or not a number."""


@runtime_checkable
class Recogniser(Protocol):
    """A network that recognises the objects in x_t."""

    def find_objects(self, x_t: Tensor, time: Tensor) -> Tensor:
        """Return for each cell of x_t (B, 3, H, W) at t / T (B,) the logits of the objects that it shows, (B, C, h, w)."""


@dataclass(frozen=True)
class SamplingPipeline:
    """A network with its diffusion, sampling settings, device and task; ``name`` is used in messages, such as the path of its file."""

    net: nn.Module
    diffusion: Diffusion
    sampling: SamplingConfig
    compute: ComputeDevice
    name: str = "the network"
    task: Task = ICLEVR

    @property
    def steps(self) -> int:
        """Sampler steps per image."""
        return len(self.times()) - 1

    @property
    def work(self) -> int:
        """Upper bound on the sampler steps per image: every particle down to ``CHOICE_TIME``, then the whole trajectory of the one that is kept."""
        return self.steps + self._trials * len(self.times_to_choice()[:-1])

    @property
    def nfe(self) -> int:
        """Upper bound on the network calls (NFE) per image. A guided step takes two calls. Once a particle is accepted, no more are tried."""
        return self._calls(self.times()[:-1]) + self._trials * (self._calls(self.times_to_choice()[:-1]) + 1)

    @property
    def _trials(self) -> int:
        return self.sampling.particles if self.sampling.particles > 1 else 0

    def _calls(self, times: Sequence[int]) -> int:
        guidance, last = self.guidance(), self.diffusion.schedule.timesteps
        return len(times) + sum(guidance.at(t / last) > 0 for t in times)

    def describe(self) -> str:
        """Return sampler, steps, guidance and network calls as text."""
        doubled = " (two per guided step)" if self.sampling.guidance > 0 else ""
        limit = "at most " if self._trials and self.sampling.accept < 1 else ""
        return f"{describe_sampling(with_actual_steps(self.sampling, self.diffusion.schedule))}: {limit}{self.nfe} network calls per image{doubled}"

    def times(self) -> list[int]:
        """Return the times of the sampler's steps, decreasing from T to 0."""
        return sampler_times(self.sampling.sampler, self.sampling.spacing, self.diffusion.schedule, self.sampling.steps)

    def times_to_choice(self) -> list[int]:
        """Return the sampler's times from T to the first with t / T <= ``CHOICE_TIME``, or to the last before 0 if there is none."""
        times, limit = self.times(), CHOICE_TIME * self.diffusion.schedule.timesteps
        return times[: 1 + next(i for i, (t, after) in enumerate(itertools.pairwise(times)) if t <= limit or after == 0)]

    def guidance(self) -> Guidance:
        """Return the guidance weight, and where it is applied."""
        return Guidance(self.sampling.guidance, self.sampling.guidance_from, self.sampling.guidance_to)

    def choose(self, requests: Sequence[ImageRequest]) -> Progressing[Sequence[ImageRequest]]:
        """Yield progress, counted in sampler steps of all images, and return the requests, each with the noise of the particle that is kept.

        Each request is sampled from one noise after another, at most ``particles``, down to ``CHOICE_TIME``. The first is kept for which the network
        finds that x_t shows what was requested and nothing else, with a probability of at least ``accept``, or else the likeliest of all; see
        ``label_log_probabilities``.
        """
        if not self._trials:
            return requests
        times, total = self.times_to_choice(), len(requests) * self.work
        kept, likelihoods, undecided = list(requests), [-math.inf] * len(requests), list(range(len(requests)))
        enough = math.log(self.sampling.accept) if self.sampling.accept < 1 else math.inf
        done = 0
        for number in range(self._trials):
            trials = [_particle(requests[index], number) for index in undecided]
            x_t = torch.empty(0)
            for frame in self._frames(trials, times):
                x_t = frame.x_t
                if not frame.pure_noise:
                    done += len(trials)
                    yield Progress("sampling", done, total)
            for index, trial, likelihood in zip(undecided, trials, self._log_likelihoods(trials, x_t, times[-1]), strict=True):
                if likelihood > likelihoods[index]:
                    kept[index], likelihoods[index] = trial, likelihood
            undecided = [index for index in undecided if likelihoods[index] < enough]
            done += (len(trials) - len(undecided)) * (self._trials - 1 - number) * (len(times) - 1)  # steps that an accepted particle saves count as done
            if not undecided:
                break
        return kept

    def _log_likelihoods(self, requests: Sequence[ImageRequest], x_t: Tensor, t: int) -> list[float]:
        """Return for each image the log-probability that x_t at t shows what was requested and nothing else."""
        assert isinstance(self.net, Recogniser)  # see require_recogniser
        labels = label_tensor(requests, self.task).to(x_t.device)
        time = torch.full((len(x_t),), t / self.diffusion.schedule.timesteps, device=x_t.device)
        with torch.inference_mode(), self.compute.autocast():
            absent, present = label_log_probabilities(self.net, x_t, time, self.task).unbind(1)
        found: list[float] = torch.where(labels > 0, present, absent).sum(1).tolist()
        return found

    def frames(self, requests: Sequence[ImageRequest]) -> Iterator[Frame]:
        """Yield the frames of a batch from pure noise (t = T) to the images (t = 0): float32 (B, 3, H, W) on the device.

        The noise is that of the requests; with several particles, ``choose`` comes first.

        Raises:
            NotFiniteError: the images are not finite.
        """
        return self._frames(requests, self.times())

    def _frames(self, requests: Sequence[ImageRequest], times: Sequence[int]) -> Iterator[Frame]:
        device = self.compute.device
        labels = label_tensor(requests, self.task).to(device)
        noise = ImageNoise([r.key for r in requests], self.task.image_shape, device)
        sampler = SAMPLERS.get(self.sampling.sampler)
        x = noise().contiguous(memory_format=torch.channels_last)
        yield Frame(times[0], x, x, pure_noise=True)
        denoise = self.diffusion.denoiser(self.net, labels, self.guidance())
        steps = sampler(denoise, x, times, self.diffusion.schedule, noise, **own_options(sampler, self.sampling))
        while True:
            # Enter the contexts for each step, so that the caller does not run in inference mode between steps.
            with torch.inference_mode(), self.compute.autocast():
                frame = next(steps, None)
            if frame is None:
                return
            # What is not finite stays so until the last frame; to look at each one would make a GPU wait.
            if frame.t == times[-1] and not torch.isfinite(frame.x_t).all():
                raise NotFiniteError(f"{self.name}: its images are not finite")
            yield frame

    def batches(self, requests: Sequence[ImageRequest], batch_size: int = BATCH) -> Iterator[Progress | Tensor]:
        """Yield progress, and the finished images in order: float32 (B, 3, H, W) in [-1, 1] on the device.

        If a batch does not fit in memory, it is repeated at half the size, with the same noise.
        """
        start, size, total = 0, batch_size, len(requests) * self.work
        yield Progress("sampling", 0, total)
        while start < len(requests):
            part, before = requests[start : start + size], start * self.work
            fits = True
            try:
                chosen = yield from _offset(self.choose(part), before, total)
                done = before + len(part) * (self.work - self.steps)
                for frame in self.frames(chosen):
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


def require_recogniser(config: Config) -> None:
    """Check that settings with several particles have a network that learns to recognise objects.

    Raises:
        UsageError: they have not.
    """
    if config.sampling.particles == 1:
        return
    if not recognises_objects(config.model.net):
        raise UsageError(f"--particles: the network {config.model.net} does not recognise objects; give --particles 1")
    if config.training.label_loss == 0:
        raise UsageError("--particles: a network trained with --label-loss 0 does not recognise objects; give --particles 1")


def label_log_probabilities(net: Recogniser, x_t: Tensor, time: Tensor, task: Task) -> Tensor:
    """Return two log-probabilities for each class, (B, 2, C): if it is not requested, x_t (B, 3, H, W) at t / T (B,) is right; if it is, x_t is right.

    An object that is not requested must be absent, and a requested one must be there exactly once. Other labels may be seen any number of times.
    """
    logits = net.find_objects(x_t, time).float()
    return none_or_one(logits) if task.names_objects else none_or_some(logits)


def recognises_objects(net: str) -> bool:
    """Return whether a registered network recognises the objects in x_t; see ``Recogniser``."""
    return hasattr(NETWORKS.get(net), "find_objects")


def _particle(request: ImageRequest, number: int) -> ImageRequest:
    """Return the request with the noise of particle ``number``; particle 0 has the request's own noise."""
    return replace(request, key=(*request.key, "particle", number)) if number else request


def _offset(task: Progressing[R], before: int, total: int) -> Progressing[R]:
    """Run a part of a larger task: add ``before`` to its progress, of ``total``."""
    try:
        while True:
            item = next(task)
            yield Progress(item.stage, before + item.done, total)
    except StopIteration as end:
        value: R = end.value
        return value


def sample_batch(pipeline: SamplingPipeline, batch: Batch) -> Progressing[list[Tensor]]:
    """Yield progress and return the images of one batch, in several parts if memory was short: float32 on the device."""
    made = []
    for item in pipeline.batches(batch.requests, len(batch.requests)):
        if isinstance(item, Tensor):
            made.append(item)
        elif item.done or not batch.start:
            yield Progress(item.stage, batch.start * pipeline.work + item.done, batch.total * pipeline.work)
    return made


def sample_images(pipeline: SamplingPipeline, requests: Sequence[ImageRequest], batch_size: int = BATCH, job: Job = SINGLE) -> Progressing[Tensor]:
    """Yield progress and return the images, uint8 (N, 3, H, W) on the CPU; only rank 0 gets them."""

    def make(batch: Batch) -> Progressing[Tensor]:
        return torch.cat([to_uint8(images) for images in (yield from sample_batch(pipeline, batch))])

    made = [torch.empty((0, *pipeline.task.image_shape), dtype=torch.uint8)]
    for item in job.map_ordered(make, in_batches(requests, batch_size)):
        if isinstance(item, Tensor):
            made.append(item)
        else:
            yield item
    return torch.cat(made)


def to_uint8(images: Tensor) -> Tensor:
    """Convert images in [-1, 1] to uint8 on the CPU."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def label_tensor(requests: Sequence[ImageRequest], task: Task = ICLEVR) -> Tensor:
    """Return the requested labels, multi-hot float32 (B, C)."""
    return torch.from_numpy(task.multi_hot([r.labels for r in requests])).float()
