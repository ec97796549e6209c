"""Training of the built-in classifier on rendered images."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpmctl.benchmark.embedded import collected
from ddpmctl.benchmark.raycast import render
from ddpmctl.benchmark.scenes import OBJECTS, Scenes, draw_scenes
from ddpmctl.checkpoints.format import save_tensors
from ddpmctl.config import DeviceConfig
from ddpmctl.device import ComputeDevice, make_compute_device
from ddpmctl.diffusion.randomness import derived_seed, generator
from ddpmctl.errors import UsageError
from ddpmctl.evaluation.classifiers import FORMAT, Classifier, CompactClassifier, lab_network, load_classifier
from ddpmctl.evaluation.scores import Score, score
from ddpmctl.iclevr import ICLEVR
from ddpmctl.progress import Progress
from ddpmctl.task import Task

# The embedded benchmark uses seed 0; training scenes and check scenes use other seed ranges.
SEEN_SEEDS = 2**32
CHECK_SEEDS = 2 * 2**32

SCENES, STEPS, BATCH = 12_000, 2_400, 128
CHECK_SCENES = 2_000
LEARNING_RATE = {"compact": 3e-3, "resnet18": 1e-3}  # by network
NETWORKS = tuple(LEARNING_RATE)
WARM_UP = 100  # steps
WEIGHT_DECAY = 0.01
LOG_EVERY = 50  # steps

# Largest augmentations of images in [-1, 1].
SIDE = ICLEVR.size
SHIFT = 4  # pixels of SIDE
LIGHT = 0.1  # brightness, and relative contrast
BLUR = 0.6  # weight of a 3x3 box blur
NOISE = 0.06  # standard deviation


@dataclass(frozen=True)
class ClassifierStep:
    """One logged step; ``loss`` is the mean binary cross-entropy since the last logged step."""

    step: int
    loss: float
    seconds: float


@dataclass(frozen=True)
class ClassifierTrained:
    """The classifier is saved; ``scores`` on new renders, by number of objects (1, 2, 3)."""

    path: Path
    loss: float
    seconds: float
    scores: dict[int, Score]


ClassifierEvent = Progress | ClassifierStep | ClassifierTrained


def train_classifier(
    out: Path, *, network: str = "compact", steps: int = STEPS, scenes: int = SCENES, batch: int = BATCH,
    check_scenes: int = CHECK_SCENES, seed: int = 0, compute: ComputeDevice | None = None,
) -> Iterator[ClassifierEvent]:  # fmt: skip
    """Train a classifier on renders, write it to ``out``, and check it on other renders.

    The defaults are those of the built-in classifier (about fifteen minutes on two cores).

    Args:
        network: "compact", or "resnet18": the lab's network, written in the lab's format.
        scenes: training scenes, three images each (12,288 bytes per image).
        check_scenes: scenes of the check, three images each.
        seed: seed of scenes, weights, order and augmentation.
        compute: None for the best available device.

    Raises:
        UsageError: ``out`` cannot be written to, or the network is unknown.
    """
    if network not in NETWORKS:
        raise UsageError(f"--network: {network!r} is none of {', '.join(NETWORKS)}")
    compute = compute or make_compute_device(DeviceConfig())
    start = time.perf_counter()
    drawn = draw_scenes(scenes, seed=SEEN_SEEDS + seed % SEEN_SEEDS, triples="any")
    images = torch.from_numpy((yield from collected(render(drawn), OBJECTS * scenes)))
    labels = _labels(drawn)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, "evaluator weights"))
        net = with_logits(network)
    net = net.to(compute.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    loss = math.nan
    for event in _fit(net, images, labels, lr=LEARNING_RATE[network], steps=steps, batch=batch, seed=seed, compute=compute):
        yield event
        loss = event.loss if isinstance(event, ClassifierStep) else loss
    weights = {name: value.half() if value.ndim == 4 else value for name, value in net.cpu().state_dict().items()}
    known = {"network": network, "steps": steps, "scenes": scenes, "batch": batch, "seed": seed, "loss": loss}
    if network == "compact":
        save_tensors(out, {"format": FORMAT, "known": known, "weights": weights})
    else:
        save_tensors(out, {"model": weights, "known": known})
    yield ClassifierTrained(out, loss, time.perf_counter() - start, check_classifier(load_classifier(out), check_scenes, seed=seed))


def with_logits(name: str, task: Task = ICLEVR) -> nn.Module:
    """Return a network from images to logits, with random weights."""
    if name == "compact":
        return CompactClassifier(task)
    net = lab_network(task)
    # The loss needs logits. A sigmoid has no weights, so the file still fits the lab's network.
    net.fc = nn.Sequential(nn.Linear(512, task.columns), nn.Identity())
    return net


def check_classifier(classifier: Classifier, scenes: int = CHECK_SCENES, *, seed: int = 0) -> dict[int, Score]:
    """Return the scores on renders of ``scenes`` scenes by number of objects (1, 2, 3).

    For every seed, the scenes are not in the embedded benchmark or in the data of :func:`train_classifier`.
    """
    drawn = draw_scenes(scenes, seed=CHECK_SEEDS + seed % SEEN_SEEDS, triples="any")
    outputs = torch.cat([classifier(_centred(torch.from_numpy(part).flatten(0, 1).permute(0, 3, 1, 2))) for part in render(drawn)]).numpy()
    labels = _labels(drawn).numpy()
    return {count: score(outputs[count - 1 :: OBJECTS], labels[count - 1 :: OBJECTS]) for count in range(1, OBJECTS + 1)}


def _labels(scenes: Scenes) -> Tensor:
    """Return the multi-hot labels of all frames, float32 (3 N, C)."""
    added = F.one_hot(torch.from_numpy(scenes.classes), ICLEVR.columns)  # (N, 3, C)
    return added.cumsum(dim=1).flatten(0, 1).float()


def _fit(
    net: nn.Module, images: Tensor, labels: Tensor, *, lr: float, steps: int, batch: int, seed: int, compute: ComputeDevice
) -> Iterator[Progress | ClassifierStep]:
    """Train in place with AdamW on the binary cross-entropy."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=WEIGHT_DECAY)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2)
    random = generator(seed, "evaluator training")
    start, losses = time.perf_counter(), torch.zeros((), device=compute.device)
    net.train()
    for step, chosen in zip(range(1, steps + 1), object_batches(labels.sum(1).long(), batch, random), strict=False):
        inputs = augment(_centred(images[chosen]), random).to(compute.device).contiguous(memory_format=torch.channels_last)
        with compute.autocast():
            logits = net(inputs)
        loss = F.binary_cross_entropy_with_logits(logits.float(), labels[chosen].to(compute.device))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        rate.step()
        losses += loss.detach()
        since = step % LOG_EVERY or LOG_EVERY
        if since == LOG_EVERY or step == steps:
            yield ClassifierStep(step, losses.item() / since, time.perf_counter() - start)
            losses.zero_()
        yield Progress("training", step, steps)


def object_batches(objects: Tensor, batch: int, random: torch.Generator) -> Iterator[Tensor]:
    """Yield index batches of shuffled epochs; incomplete batches are dropped.

    An image of k objects occurs k times per epoch, because most errors are in images whose objects hide each other.
    """
    pool = torch.arange(len(objects)).repeat_interleave(objects)
    for _ in itertools.count():
        order = pool[torch.randperm(len(pool), generator=random)]
        yield from torch.split(order, batch)[: max(1, len(pool) // batch)]


def augment(images: Tensor, random: torch.Generator, *, mirror: bool = True) -> Tensor:
    """Return images (B, 3, H, W) in [-1, 1] with random flip (``mirror``), shift, brightness, contrast, blur and noise.

    Hue and size do not change, because they distinguish classes.
    """

    def draw() -> Tensor:
        return torch.rand(len(images), 1, 1, 1, generator=random)

    x, side = torch.where(draw() < 0.5, images.flip(3), images) if mirror else images, images.shape[-1]
    shift = SHIFT * side // SIDE
    down, right = torch.randint(2 * shift + 1, (2,), generator=random).tolist()
    x = F.pad(x, (shift,) * 4, mode="replicate")[:, :, down : down + side, right : right + side]
    x = x * (1 + LIGHT * (2 * draw() - 1)) + LIGHT * (2 * draw() - 1)
    blurred = F.avg_pool2d(F.pad(x, (1,) * 4, mode="replicate"), 3, 1)
    x = torch.lerp(x, blurred, BLUR * draw() * (draw() < 0.3))
    noise = torch.randn(x.shape, generator=random)
    return (x + NOISE * draw() * (draw() < 0.5) * noise).clamp(-1, 1)


def _centred(images: Tensor) -> Tensor:
    """Convert uint8 images to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1
