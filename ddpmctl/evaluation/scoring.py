"""Scoring a network: make the pictures that the condition files ask for, and ask the classifier."""

from __future__ import annotations

import collections.abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpmctl.evaluation.classifiers import Classifier
from ddpmctl.evaluation.scores import Score, score
from ddpmctl.progress import Progress
from ddpmctl.sampling.pipeline import BATCH, ImageRequest, SamplingPipeline, label_tensor, requests_for, to_uint8


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
    evaluator: Classifier,
    conditions: Mapping[str, Sequence[tuple[str, ...]]],
    *,
    seed: int,
    repeats: int = 1,
    batch_size: int = BATCH,
) -> collections.abc.Generator[Progress, None, dict[str, ScoredImages]]:
    """Make ``repeats`` pictures of every condition and return what the classifier sees, by condition file.

    The files' conditions share batches; each picture's noise is a function of (seed, file, condition,
    repeat) alone, so every network is judged on the same noise.
    """
    requests = {name: requests_for(name, sets, seed=seed, repeats=repeats) for name, sets in conditions.items()}
    return (yield from score_requests(pipeline, evaluator, requests, batch_size=batch_size))


def score_requests(
    pipeline: SamplingPipeline, evaluator: Classifier, requests: Mapping[str, list[ImageRequest]], *, batch_size: int = BATCH
) -> collections.abc.Generator[Progress, None, dict[str, ScoredImages]]:
    """Make pictures and return what the classifier sees, under the names under which they were asked for; at least one is asked for."""
    everything = [request for group in requests.values() for request in group]
    images, answers = [], []
    for item in pipeline.batches(everything, batch_size):
        if isinstance(item, Tensor):
            images.append(to_uint8(item))
            answers.append(evaluator(item))
        else:
            yield item
    return by_condition_file(requests, images, answers)


def by_condition_file(requests: Mapping[str, list[ImageRequest]], images: Sequence[Tensor], answers: Sequence[Tensor]) -> dict[str, ScoredImages]:
    """Return pictures and answers, which come in batches over all that was asked for, under the names under which they were asked for."""
    sizes = [len(group) for group in requests.values()]
    split = zip(requests.items(), torch.split(torch.cat(list(images)), sizes), torch.split(torch.cat(list(answers)), sizes), strict=True)
    return {name: ScoredImages(group, images, probabilities) for (name, group), images, probabilities in split}


def score_batch(pipeline: SamplingPipeline, evaluator: Classifier, batch: Sequence[ImageRequest]) -> tuple[Tensor, Tensor]:
    """Make one batch of pictures and return them, uint8 (B, 3, 64, 64), with what the classifier sees, float32 (B, 24), both on the CPU."""
    made = [item for item in pipeline.batches(batch, len(batch)) if isinstance(item, Tensor)]
    return torch.cat([to_uint8(images) for images in made]), torch.cat([evaluator(images) for images in made]).cpu()
