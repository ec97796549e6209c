"""Score a network: sample images of the conditions and classify them."""

from __future__ import annotations

import collections.abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ddpmctl.evaluation.scores import Score, score
from ddpmctl.iclevr import ICLEVR
from ddpmctl.progress import Progress
from ddpmctl.sampling.pipeline import SamplingPipeline, label_tensor, sample_batch, to_uint8
from ddpmctl.sampling.requests import BATCH, Batch, ImageRequest, in_batches, requests_for
from ddpmctl.task import LabelSet, Task

Judge: TypeAlias = Callable[[Tensor], Tensor]
"""Images (B, 3, H, W) in [-1, 1] to outputs (B, C) on the CPU: a classifier, or ``NoJudge``."""


@dataclass(frozen=True)
class NoJudge:
    """In the place of a classifier: it finds nothing."""

    task: Task

    def __call__(self, images: Tensor) -> Tensor:
        """Return zeros, (B, C)."""
        return torch.zeros(len(images), self.task.columns)


@dataclass(frozen=True)
class ScoredImages:
    """Images of one condition file, uint8 (N, 3, H, W), and classifier outputs, float32 (N, C)."""

    requests: list[ImageRequest]
    images: Tensor
    probabilities: Tensor
    task: Task = ICLEVR

    @property
    def score(self) -> Score:
        """The pooled score of all images."""
        return score(self.probabilities.numpy(), label_tensor(self.requests, self.task).numpy())


def score_conditions(
    pipeline: SamplingPipeline, classifier: Judge, conditions: Mapping[str, Sequence[LabelSet]], *, seed: int, repeats: int = 1, batch_size: int = BATCH
) -> collections.abc.Generator[Progress, None, dict[str, ScoredImages]]:
    """Sample ``repeats`` images of every condition and return images and classifier outputs by condition file.

    Each image's noise depends only on (seed, file, condition, repeat), so every network is scored on the same noise.
    """
    requests = {name: requests_for(name, sets, seed=seed, repeats=repeats) for name, sets in conditions.items()}
    parts = []
    for batch in in_batches([request for group in requests.values() for request in group], batch_size):
        parts.append((yield from score_batch(pipeline, classifier, batch)))
    return by_condition_file(requests, parts, pipeline.task)


class ScoredBatch(NamedTuple):
    """Images of one batch, uint8 (B, 3, H, W), and classifier outputs, float32 (B, C), on the CPU."""

    images: Tensor
    probabilities: Tensor


def score_batch(pipeline: SamplingPipeline, classifier: Judge, batch: Batch) -> collections.abc.Generator[Progress, None, ScoredBatch]:
    """Sample and classify one batch."""
    made = yield from sample_batch(pipeline, batch)
    return ScoredBatch(torch.cat([to_uint8(images) for images in made]), torch.cat([classifier(images) for images in made]).cpu())


def by_condition_file(requests: Mapping[str, list[ImageRequest]], parts: Sequence[ScoredBatch], task: Task = ICLEVR) -> dict[str, ScoredImages]:
    """Split the batches of all requests, in order, by condition file."""
    sizes = [len(group) for group in requests.values()]
    images, probabilities = (torch.split(torch.cat(tensors), sizes) for tensors in zip(*parts, strict=True))
    return {name: ScoredImages(group, *found, task) for (name, group), found in zip(requests.items(), zip(images, probabilities, strict=True), strict=True)}
