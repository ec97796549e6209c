"""Measurements of how close samples come to renders of the same labels."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.utils import make_grid

from ddpmctl.benchmark import embedded
from ddpmctl.benchmark.embedded import SCENES, train_labels
from ddpmctl.benchmark.scenes import OBJECTS
from ddpmctl.checkpoints.format import load_checkpoint
from ddpmctl.config import Config
from ddpmctl.data.dataset import Dataset, load_conditions
from ddpmctl.data.reference import RealImages, real_images
from ddpmctl.device import make_compute_device
from ddpmctl.evaluation.classifiers import Block, Classifier, ConvNorm, load_classifier
from ddpmctl.evaluation.evaluate import pipeline_for
from ddpmctl.evaluation.fidelity import PreparedReference, Reference, measure_fidelity
from ddpmctl.sampling.pipeline import sample_images
from ddpmctl.sampling.requests import requests_for
from tests.benchmarks.data import benchmark_data, finish

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {  # of images (N, 3, H, W), for ``two_samples``
    "whole images": lambda images: images,
    "averages of 2x2 pixels": lambda images: F.avg_pool2d(images, 2),
    "averages of 4x4 pixels": lambda images: F.avg_pool2d(images, 4),
    "the 12 upper rows, above the objects": lambda images: images[:, :, :12],
}
TWO_SAMPLES_SEED = 5 * 2**32  # other scenes than those of training and of ``real_images``
Figures = dict[str, Any]


def fidelity(images: Sequence[str]) -> Figures:
    """Measure kept images against new renders of the same labels; returns each file's measures and their floor.

    Where held-out label sets are among them, these are also measured alone, as ``heldout``, and beside them the three-object sets of the lab's files that
    training showed, as ``seen``.
    """
    data, evaluator = benchmark_data(), load_classifier()
    trained = load_conditions(None).trained_sets
    found: Figures = {}
    for path in images:
        with np.load(path) as content:
            kept = {kind: content[kind] for kind in content.files}
        repeats = len(kept["test"]) // len(data.conditions["test"])
        sets = [labels for kind in kept for labels in data.conditions[kind]]
        kinds = [kind for kind in kept for _ in data.conditions[kind]]
        real = finish(real_images(data, sets, repeats))
        samples = np.concatenate(list(kept.values())).reshape(real.images[0].shape)
        _beside(samples[:, 0], real.images[0][:, 0], Path(path).with_suffix(".png"))
        measured = functools.partial(_measured, samples, real, data, evaluator)
        of_file = found[Path(path).stem] = measured(range(len(sets)))
        of_file["too_many"] = {"samples": _too_many(samples, sets), "floor": _too_many(real.images[0], sets)}
        if "heldout" in kept:
            of_file["heldout"] = measured([index for index, kind in enumerate(kinds) if kind == "heldout"])
            of_file["seen"] = measured([index for index, labels in enumerate(sets) if len(labels) == OBJECTS and frozenset(labels) in trained])
    return found


def _measured(samples: np.ndarray, real: RealImages, data: Dataset, evaluator: Classifier, chosen: Sequence[int]) -> Figures:
    """Measure the samples (conditions, repeats, 3, 64, 64) of the chosen conditions against real images of the same."""
    reference = Reference(real.images[0][chosen], real.images[1][chosen], data.images, real.same_scene[:, chosen])
    measures = finish(measure_fidelity(samples[chosen], PreparedReference(reference, evaluator))).measures
    return {m.key: {"samples": m.samples.estimate, "floor": m.floor.estimate, "floor_low": m.floor.low, "floor_high": m.floor.high} for m in measures}


def _too_many(images: np.ndarray, sets: Sequence[tuple[str, ...]]) -> float:
    """Return the share of images (conditions, repeats, 3, 64, 64) that show more coloured regions than objects were requested.

    The classifier says which classes an image shows, not how often, so it does not see a second object of a requested class. Objects that touch or hide
    each other are one region, so the share is a lower bound. Conditions with gray objects are left out.
    """
    coloured = [index for index, labels in enumerate(sets) if not any(label.startswith("gray") for label in labels)]
    counts = _regions(torch.from_numpy(images[coloured]).flatten(0, 1)).view(len(coloured), -1)
    requested = torch.tensor([len(sets[index]) for index in coloured])
    return float((counts > requested[:, None]).float().mean())


def _regions(images: Tensor) -> Tensor:
    """Count the connected regions of at least 6 saturated pixels in each image, uint8 (N, 3, 64, 64) -> (N,)."""
    inside = (images.float().amax(1) - images.float().amin(1) > 45)[:, None]
    number = torch.arange(1.0, 64 * 64 + 1).view(1, 1, 64, 64) * inside
    for _ in range(80):  # spreads each region's largest number over the region
        number = F.max_pool2d(number, 3, 1, 1) * inside
    return torch.tensor([int((one[one > 0].unique(return_counts=True)[1] >= 6).sum()) for one in number])


def _beside(samples: np.ndarray, real: np.ndarray, path: Path) -> None:
    """Draw the sample of every fourth condition, eight in a row, above a render of the same labels."""
    every = [torch.from_numpy(np.ascontiguousarray(images[::4][:16])).split(8) for images in (samples, real)]
    rows = torch.cat([row for pair in zip(*every, strict=True) for row in pair])
    grid = make_grid(rows, nrow=8, padding=1, pad_value=255).repeat_interleave(2, 1).repeat_interleave(2, 2)
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(path)


def two_samples(checkpoints: Sequence[str], count: int, seconds: float) -> Figures:
    """Train a network for some seconds to tell samples from renders of the same labels; return how often it is right on others.

    ``count`` samples and renders are for training, a fifth as many for the check. 0.5 would be chance. One network is trained for each of
    ``VIEWS``, which show where the difference lies.
    """
    compute, rng = make_compute_device(Config().device), torch.Generator().manual_seed(0)
    known = list(train_labels(SCENES).values())
    sets = [tuple(known[index]) for index in torch.randperm(len(known), generator=rng)[: count + count // 5].tolist()]
    real = torch.from_numpy(finish(embedded.render_label_sets(sets, seed=TWO_SAMPLES_SEED)))
    found: Figures = {"count": count, "seconds": seconds}
    for path in checkpoints:
        pipeline = pipeline_for(load_checkpoint(Path(path)), {}, compute)
        made = finish(sample_images(pipeline, requests_for("two samples", sets, seed=0)))
        found[Path(path).stem] = {name: _right(view(made.float()), view(real.float()), count, seconds) for name, view in VIEWS.items()}
    return found


def _right(made: Tensor, real: Tensor, count: int, seconds: float) -> float:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(ConvNorm(3, 16, 3), nn.ReLU(), Block(16, 32, 2), Block(32, 64, 2), Block(64, 64), nn.Conv2d(64, 1, 1))
    net = net.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.05)
    images = torch.cat((made[:count], real[:count]))
    truth = torch.cat((torch.ones(count), torch.zeros(count)))
    rng, start = torch.Generator().manual_seed(1), time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds:
        chosen = torch.randint(len(images), (64,), generator=rng)
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - spent / seconds)
        loss = F.binary_cross_entropy_with_logits(net(images[chosen] / 127.5 - 1).mean((1, 2, 3)), truth[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval()
    with torch.inference_mode():
        says = [torch.cat([net(part / 127.5 - 1).mean((1, 2, 3)) for part in images[count:].split(64)]) > 0 for images in (made, real)]
    return float((says[0].float().mean() + (~says[1]).float().mean()) / 2)
