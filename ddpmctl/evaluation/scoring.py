"""Scoring a network: make the pictures that the condition files ask for, and ask the classifier."""

from __future__ import annotations

import collections.abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ddpmctl.evaluation.classifiers import Classifier
from ddpmctl.evaluation.scores import Score, score
from ddpmctl.labels import LabelSet
from ddpmctl.progress import Progress
from ddpmctl.sampling.pipeline import BATCH, Batch, ImageRequest, SamplingPipeline, in_batches, label_tensor, requests_for, sample_batch, to_uint8


@dataclass(frozen=True)
class ScoredImages:
    """The pictures made for one condition file and the classifier's answers.

    Attributes:
        pictures: uint8, (N, 3, 64, 64).
        probabilities: float32, (N, 24).
    """

    requests: list[ImageRequest]
    images: Tensor
    probabilities: Tensor

    @property
    def score(self) -> Score:
        """The pooled score of all pictures."""
        return score(self.probabilities, label_tensor(self.requests))


def score_conditions(
    pipeline: SamplingPipeline,
    classifier: Classifier,
    conditions: Mapping[str, Sequence[LabelSet]],
    *,
    seed: int,
    repeats: int = 1,
    batch_size: int = BATCH,
) -> collections.abc.Generator[Progress, None, dict[str, ScoredImages]]:
    """Make ``repeats`` images of every condition and return what the classifier finds in them, by condition file.

    The files' conditions share batches. Each image's noise is a function of (seed, file, condition, repeat) alone, so every network is
    scored on the same noise.
    """
    requests = {name: requests_for(name, sets, seed=seed, repeats=repeats) for name, sets in conditions.items()}
    parts = []
    for batch in in_batches([request for group in requests.values() for request in group], batch_size):
        parts.append((yield from score_batch(pipeline, classifier, batch)))
    return by_condition_file(requests, parts)


class ScoredBatch(NamedTuple):
    """One batch's images, uint8 (B, 3, 64, 64), and the classifier's probabilities for them, float32 (B, 24), on the CPU."""

    images: Tensor
    probabilities: Tensor


def score_batch(pipeline: SamplingPipeline, classifier: Classifier, batch: Batch) -> collections.abc.Generator[Progress, None, ScoredBatch]:
    """Make one batch of images and return them with what the classifier finds."""
    made = yield from sample_batch(pipeline, batch)
    return ScoredBatch(torch.cat([to_uint8(images) for images in made]), torch.cat([classifier(images) for images in made]).cpu())


def by_condition_file(requests: Mapping[str, list[ImageRequest]], parts: Sequence[ScoredBatch]) -> dict[str, ScoredImages]:
    """Return batches over all requests, in order, under the names of the condition files that they are for."""
    sizes = [len(group) for group in requests.values()]
    images, probabilities = (torch.split(torch.cat(tensors), sizes) for tensors in zip(*parts, strict=True))
    return {name: ScoredImages(group, *found) for (name, group), *found in zip(requests.items(), images, probabilities, strict=True)}
