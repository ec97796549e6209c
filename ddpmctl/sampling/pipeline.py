"""The sampling pipeline: final images in batches, or every frame."""

from __future__ import annotations

import collections.abc
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from ddpmctl.config import SamplingConfig
from ddpmctl.device import ComputeDevice, release_memory
from ddpmctl.diffusion.denoiser import Diffusion, Guidance
from ddpmctl.diffusion.randomness import ImageNoise, Key
from ddpmctl.diffusion.samplers import Frame, own_options, sampler_times
from ddpmctl.distributed.job import SINGLE, Job
from ddpmctl.errors import DataError, out_of_memory
from ddpmctl.iclevr import ICLEVR
from ddpmctl.progress import Progress
from ddpmctl.registry import SAMPLERS
from ddpmctl.sampling.recognition import Recogniser, log_probability_of_labels
from ddpmctl.sampling.requests import BATCH, Batch, ImageRequest, describe_sampling, in_batches, with_actual_steps
from ddpmctl.task import Task

R = TypeVar("R")
Progressing: TypeAlias = collections.abc.Generator[Progress, None, R]
CHOICE_TIME = 0.1  # t / T at which a particle is chosen: shapes are decided, and the recogniser was trained at this noise
# Values of ``tries``. If fewer particles share a noise, samples are further from the data (docs/experiments.md). But where labels do not name objects,
# as with one label an image, the noise may decide the whole image, and other noise is needed earlier.
TRIES_OF_OBJECTS = 16
TRIES_OF_NAMES = 4


class NotFiniteError(DataError):
    """A network's images have values that are infinite or not a number."""


class _Found(NamedTuple):
    """The requests, each with the particle that was kept, and the x_t of these particles at ``CHOICE_TIME``, (B, 3, H, W)."""

    requests: Sequence[ImageRequest]
    x_t: Tensor


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

    @cached_property
    def work(self) -> int:
        """Upper bound on the sampler steps per image: one whole trajectory, and all other particles down to ``CHOICE_TIME``."""
        return self.steps + self._steps_after(0)

    @property
    def nfe(self) -> int:
        """Upper bound on the network calls (NFE) per image. A guided step takes two calls. Once a particle is accepted, no more are tried."""
        times, count = self.times(), self.sampling.particles
        further = sum(self._calls(times[self._skipped(number) : self.choice]) for number in range(1, count))
        return self._calls(times[:-1]) + further + (count if count > 1 else 0)

    @property
    def tries(self) -> int:
        """How many particles share one noise: the first starts from the noise itself, the others from the first one's x0_hat, noised again."""
        return TRIES_OF_OBJECTS if self.task.names_objects else TRIES_OF_NAMES

    def _skipped(self, number: int) -> int:
        """Return the number of sampler steps that particle ``number`` skips; one from new noise skips none."""
        return self.retry if number % self.tries else 0

    def _steps_after(self, number: int) -> int:
        """Return the number of sampler steps of all particles after particle ``number``."""
        return sum(self.choice - self._skipped(later) for later in range(number + 1, self.sampling.particles))

    @cached_property
    def choice(self) -> int:
        """Number of steps after which a particle is accepted or rejected: to the first time with t / T <= ``CHOICE_TIME``, or else to the last before 0."""
        times, limit = self.times(), CHOICE_TIME * self.diffusion.schedule.timesteps
        return next(i for i, (t, after) in enumerate(itertools.pairwise(times)) if t <= limit or after == 0)

    @cached_property
    def retry(self) -> int:
        """Number of steps that a particle skips if it is noised again: to the first time with t / T <= ``retry_from``, but fewer than ``choice``."""
        times, limit = self.times(), self.sampling.retry_from * self.diffusion.schedule.timesteps
        return next(i for i, t in enumerate(times) if t <= limit or i == max(0, self.choice - 1))

    def _calls(self, times: Sequence[int]) -> int:
        guidance, last = self.guidance(), self.diffusion.schedule.timesteps
        return len(times) + sum(guidance.at(t / last) > 0 for t in times)

    def describe(self) -> str:
        """Return sampler, steps, guidance and network calls as text."""
        doubled = " (two per guided step)" if self.sampling.guidance > 0 else ""
        limit = "at most " if self.sampling.particles > 1 and self.sampling.accept < 1 else ""
        return f"{describe_sampling(with_actual_steps(self.sampling, self.diffusion.schedule))}: {limit}{self.nfe} network calls per image{doubled}"

    def times(self) -> list[int]:
        """Return the times of the sampler's steps, decreasing from T to 0."""
        return sampler_times(self.sampling.sampler, self.sampling.spacing, self.diffusion.schedule, self.sampling.steps)

    def guidance(self) -> Guidance:
        """Return the guidance weight, and where it is applied."""
        return Guidance(self.sampling.guidance, self.sampling.guidance_from, self.sampling.guidance_to)

    def choose(self, requests: Sequence[ImageRequest]) -> Progressing[Sequence[ImageRequest]]:
        """Yield progress, counted in sampler steps of all images, and return the requests, each with the particle that is kept.

        The first particle is sampled from the noise of the request down to ``CHOICE_TIME``. For the next ``tries`` - 1, its x0_hat is noised again to
        ``retry_from``: where objects are is mostly kept, and what they are is decided anew (search over paths; Ma et al. 2025). Then comes a new noise,
        and so on. With new noise more often, images whose objects are easy to draw, such as large ones, would be kept more often than
        others. The first particle is kept for which the network finds that x_t shows what was requested and nothing else, with a probability of at least
        ``accept``, or else the likeliest of all; see ``log_probability_of_labels``.
        """
        if self.sampling.particles == 1:
            return requests
        return (yield from self._search(requests)).requests

    def _search(self, requests: Sequence[ImageRequest]) -> Progressing[_Found]:
        """Choose as ``choose`` does, and return also x_t of the kept particles at ``CHOICE_TIME``."""
        total, done, enough = len(requests) * self.work, 0, math.log(self.sampling.accept) if self.sampling.accept < 1 else math.inf
        kept, likelihoods, undecided = list(requests), [-math.inf] * len(requests), list(range(len(requests)))
        x_t, x0_hat = (torch.empty((len(requests), *self.task.image_shape), device=self.compute.device) for _ in range(2))
        for number in range(self.sampling.particles):
            tried = [replace(requests[index], particle=number) for index in undecided]
            frames = self._particle(tried, x0_hat[undecided] if number % self.tries else None)
            last = next(frames)
            for frame in frames:
                last, done = frame, done + len(tried)
                yield Progress("sampling", done, total)
            if number % self.tries == 0:
                x0_hat[undecided] = last.x0_hat
            for row, (index, likelihood) in enumerate(zip(undecided, self._log_likelihoods(tried, last.x_t, last.t), strict=True)):
                if not number or likelihood > likelihoods[index]:  # NaN, of images that are not finite, is never larger
                    kept[index], likelihoods[index], x_t[index] = tried[row], likelihood, last.x_t[row]
            undecided = [index for index in undecided if likelihoods[index] < enough]
            if not undecided:
                break
            done += (len(tried) - len(undecided)) * self._steps_after(number)  # an accepted image needs no more particles
        return _Found(kept, x_t.contiguous(memory_format=torch.channels_last))

    def _particle(self, requests: Sequence[ImageRequest], x0_hat: Tensor | None = None) -> Iterator[Frame]:
        """Yield the frames of each request's particle down to ``CHOICE_TIME``: from new noise, or of ``x0_hat`` (B, 3, H, W), noised again."""
        times, schedule, skipped = self.times(), self.diffusion.schedule, 0 if x0_hat is None else self.retry
        noise = self._noise(map(_own_key, requests))
        x, t = noise().contiguous(memory_format=torch.channels_last), times[skipped]
        if x0_hat is not None and skipped:
            x = (float(schedule.signal[t]) * x0_hat + float(schedule.noise[t]) * x).contiguous(memory_format=torch.channels_last)
            yield Frame(t, x, x0_hat)
        else:
            yield Frame(t, x, x, pure_noise=True)
        yield from self._run(requests, x, times[skipped : self.choice + 1], noise)

    def _rest(self, requests: Sequence[ImageRequest], x: Tensor) -> Iterator[Frame]:
        """Yield the frames of kept particles after ``CHOICE_TIME``, where they are x (B, 3, H, W). A sampler with memory starts anew there."""
        yield from self._run(requests, x, self.times()[self.choice :], self._noise((*request.key, "rest") for request in requests))

    def _noise(self, keys: Iterable[Key]) -> ImageNoise:
        return ImageNoise(list(keys), self.task.image_shape, self.compute.device)

    def _log_likelihoods(self, requests: Sequence[ImageRequest], x_t: Tensor, t: int) -> list[float]:
        """Return for each image the log-probability that x_t at t shows what was requested and nothing else."""
        assert isinstance(self.net, Recogniser)  # see require_recogniser
        labels = label_tensor(requests, self.task).to(x_t.device)
        time = torch.full((len(x_t),), t / self.diffusion.schedule.timesteps, device=x_t.device)
        with torch.inference_mode(), self.compute.autocast():
            found: list[float] = log_probability_of_labels(self.net, x_t, labels, time, self.task).tolist()
        return found

    def frames(self, requests: Sequence[ImageRequest]) -> Iterator[Frame]:
        """Yield the frames of a batch from pure noise (t = T) to the images (t = 0): float32 (B, 3, H, W) on the device.

        The noise is that of the requests; with several particles, ``choose`` comes first. The frames of a particle that was noised again are, as far as
        ``retry_from``, those of the particle whose x0_hat it was.

        Raises:
            NotFiniteError: the images are not finite.
        """
        firsts = [replace(request, particle=request.particle - request.particle % self.tries) for request in requests]
        if self.sampling.particles == 1:
            noise = self._noise(map(_own_key, firsts))
            x = noise().contiguous(memory_format=torch.channels_last)
            yield Frame(self.times()[0], x, x, pure_noise=True)
            yield from self._run(requests, x, self.times(), noise)
            return
        frames = list(self._particle(firsts))
        if again := [row for row, request in enumerate(requests) if request.particle % self.tries]:
            rows = torch.tensor(again, device=self.compute.device)
            for index, frame in enumerate(self._particle([requests[row] for row in again], frames[-1].x0_hat[rows]), start=self.retry):
                before = frames[index]
                frames[index] = before._replace(x_t=before.x_t.index_copy(0, rows, frame.x_t), x0_hat=before.x0_hat.index_copy(0, rows, frame.x0_hat))
        yield from frames
        yield from self._rest(requests, frames[-1].x_t)

    def _run(self, requests: Sequence[ImageRequest], x: Tensor, times: Sequence[int], noise: ImageNoise) -> Iterator[Frame]:
        """Yield the frames of the sampler's steps from x (B, 3, H, W) at the first of ``times``, for each of the others."""
        labels = label_tensor(requests, self.task).to(self.compute.device)
        sampler = SAMPLERS.get(self.sampling.sampler)
        denoise = self.diffusion.denoiser(self.net, labels, self.guidance())
        steps = sampler(denoise, x, times, self.diffusion.schedule, noise, **own_options(sampler, self.sampling))
        while True:
            # Enter the contexts for each step, so that the caller does not run in inference mode between steps.
            with torch.inference_mode(), self.compute.autocast():
                frame = next(steps, None)
            if frame is None:
                return
            # What is not finite stays so until the last frame; to look at each one would make a GPU wait.
            if frame.t == 0 and not torch.isfinite(frame.x_t).all():
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
                if self.sampling.particles == 1:
                    frames, done = self.frames(part), before
                else:
                    found = yield from _offset(self._search(part), before, total)
                    frames, done = self._rest(found.requests, found.x_t), before + len(part) * (self.work - self.steps + self.choice)
                for frame in frames:
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


def _own_key(request: ImageRequest) -> Key:
    """Return the key of the noise of the request's particle; the first one has the request's own."""
    return (*request.key, "particle", request.particle) if request.particle else request.key


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
