"""Training of a classifier on the images of a data set: nine tenths train it, and the last tenth says how good it is."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpmctl.checkpoints.format import save_tensors
from ddpmctl.data.dataset import Dataset
from ddpmctl.data.reference import scene_of
from ddpmctl.device import ComputeDevice, without_copy
from ddpmctl.diffusion.randomness import derived_seed, generator
from ddpmctl.errors import UsageError
from ddpmctl.evaluation.classifier_training import LEARNING_RATE, LOG_EVERY, WARM_UP, WEIGHT_DECAY, ClassifierStep, augment, object_batches, with_logits
from ddpmctl.evaluation.classifiers import FORMAT, Classifier, classifier_from
from ddpmctl.evaluation.misses import recall
from ddpmctl.evaluation.scores import Score, score, top_k_hits
from ddpmctl.iclevr import ICLEVR
from ddpmctl.progress import Progress
from ddpmctl.statistics.intervals import Interval, accuracy_interval
from ddpmctl.statistics.tallies import Tally
from ddpmctl.task import LabelSet

FEWEST = 40  # images
MOST_CHECKED = 2000  # images of the last tenth
FEW = 20_000  # images; fewer are trained in small batches, so that a short training has more steps
BATCHES = {True: 32, False: 128}  # images a step, by whether the images are few
MINUTES = 5.0


@dataclass(frozen=True)
class Checked:
    """What a classifier finds in images that it has not seen.

    Attributes:
        score: counts over the images.
        accuracy, exact: pooled accuracy and exact match, with 95 % intervals over images.
        classes: (found, shown) by class.
    """

    score: Score
    accuracy: Interval
    exact: Interval
    classes: dict[str, tuple[int, int]]

    def to_dict(self) -> dict[str, object]:
        """Return the figures as plain values."""
        classes = {name: {"found": found, "shown": shown} for name, (found, shown) in self.classes.items()}
        return {**asdict(self.score), "accuracy": asdict(self.accuracy), "exact_match": asdict(self.exact), "classes": classes}


@dataclass(frozen=True)
class OwnTrained:
    """The classifier is saved."""

    path: Path
    seconds: float
    checked: Checked


OwnEvent = Progress | ClassifierStep | OwnTrained


def train_on_images(
    out: Path, dataset: Dataset, compute: ComputeDevice, *, minutes: float = MINUTES, steps: int | None = None, network: str = "compact",
    mirror: bool | None = None, seed: int = 0,
) -> Iterator[OwnEvent]:  # fmt: skip
    """Train a classifier on nine tenths of a data set's images, write it to ``out``, and check it on up to 2,000 of the others.

    Args:
        minutes: of training; the learning rate follows the clock. Not used where ``steps`` are given.
        network: "compact", or "resnet18".
        mirror: whether images are mirrored at random; None: only i-CLEVR's, since a mirrored digit is another one.

    Raises:
        UsageError: the images have no labels or are too few, or ``out`` cannot be written.
    """
    task, start = dataset.task, time.perf_counter()
    if not task.classes:
        raise UsageError(f"{dataset.name}: its images have no labels, so there is nothing to classify")
    if len(dataset.images) < FEWEST:
        raise UsageError(f"{dataset.name}: has {len(dataset.images)} images; a classifier needs at least {FEWEST}")
    kept = ~last_tenth(dataset.names)
    if network not in LEARNING_RATE:
        raise UsageError(f"--network: {network!r} is none of {', '.join(LEARNING_RATE)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, "evaluator weights"))
        net = with_logits(network, task).to(compute.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    mirrored = task.classes == ICLEVR.classes if mirror is None else mirror
    yield from _fit(net, dataset, np.flatnonzero(kept), compute, minutes=minutes, steps=steps, rate=LEARNING_RATE[network], mirror=mirrored, seed=seed)
    weights = {name: value.half() if value.ndim == 4 else value for name, value in net.cpu().state_dict().items()}
    content = {"format": FORMAT, "weights": weights} if network == "compact" else {"model": weights}
    net.load_state_dict(weights)  # rounded, as they are loaded again
    checked = check_on_images(classifier_from(net, task), dataset)
    figures = {"accuracy": checked.accuracy.estimate, "low": checked.accuracy.low, "high": checked.accuracy.high, **asdict(checked.score)}
    known = {"network": network, "seed": seed, "data": dataset.key, "heldout": figures}
    save_tensors(out, {**content, "task": task.to_dict(), "known": known})
    yield OwnTrained(out, time.perf_counter() - start, checked)


def check_on_images(classifier: Classifier, dataset: Dataset) -> Checked:
    """Return what a classifier finds in the last tenth of a data set's images, up to 2,000 of them."""
    task = dataset.task
    chosen = np.flatnonzero(last_tenth(dataset.names))[:MOST_CHECKED]
    images, wanted = dataset.images[chosen], dataset.labels[chosen]
    outputs = classifier(torch.from_numpy(np.array(images)).float() / 127.5 - 1).numpy()
    requests: list[LabelSet] = [tuple(task.classes[index] for index in np.flatnonzero(row)) for row in wanted[:, : len(task.classes)]]
    found, labelled = score(outputs, wanted), np.flatnonzero(wanted.any(1))
    hits = np.array(top_k_hits(outputs, wanted))[labelled]
    right = ((outputs > 0.5) == wanted.astype(bool)).all(1)
    nothing = Interval(0.0, 0.0, 1.0)  # where no image of the tenth has a label
    accuracy = accuracy_interval(Tally(hits[:, None], wanted[labelled].sum(1, dtype=np.int64))) if len(labelled) else nothing
    exact = accuracy_interval(Tally(right[:, None].astype(np.int64), np.ones(len(right), np.int64)))
    return Checked(found, accuracy, exact, recall(outputs, requests, task)["class"])


def last_tenth(names: Sequence[str]) -> np.ndarray:
    """Return which images, bool (N,), do not train the classifier: one of ten scenes, by the hash of its name, so that it stays so when images are added."""
    chosen = {scene: int.from_bytes(hashlib.sha256(scene.encode("utf-8", "surrogateescape")).digest()[:4], "big") % 10 == 0 for scene in map(scene_of, names)}
    held = np.array([chosen[scene_of(name)] for name in names], dtype=bool)
    if not held.any():  # so few that hashes leave out none
        held[:: max(2, len(held) // 4)] = True
    return held


def _fit(
    net: nn.Module, dataset: Dataset, kept: np.ndarray, compute: ComputeDevice,
    *, minutes: float, steps: int | None, rate: float, mirror: bool, seed: int,
) -> Iterator[Progress | ClassifierStep]:  # fmt: skip
    """Train in place with AdamW on the binary cross-entropy; the learning rate falls to 0 over the steps, or over the minutes."""
    images, every = without_copy(dataset.images), torch.from_numpy(dataset.labels)
    few = len(kept) < FEW
    rate *= (BATCHES[few] / BATCHES[False]) ** 0.5
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=WEIGHT_DECAY)
    random, rows = generator(seed, "evaluator training"), torch.from_numpy(kept)
    start, losses = time.perf_counter(), torch.zeros((), device=compute.device)
    net.train()
    for done, chosen in enumerate(object_batches(every[rows].sum(1).long().clamp(min=1), BATCHES[few], random)):
        spent = time.perf_counter() - start
        fraction = min(1.0, spent / (60 * minutes) if steps is None else done / steps)
        if fraction >= 1 and done:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (done + 1) / WARM_UP) * (1 + math.cos(math.pi * fraction)) / 2
        numbers = rows[chosen]
        inputs = augment(_centred(images[numbers]), random, mirror=mirror).to(compute.device).contiguous(memory_format=torch.channels_last)
        with compute.autocast():
            logits = net(inputs)
        loss = F.binary_cross_entropy_with_logits(logits.float(), every[numbers].float().to(compute.device))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses += loss.detach()
        if (done + 1) % LOG_EVERY == 0:
            yield ClassifierStep(done + 1, losses.item() / LOG_EVERY, time.perf_counter() - start)
            losses.zero_()
        yield Progress("training", done + 1, steps) if steps is not None else Progress("training", min(int(spent), int(60 * minutes)), math.ceil(60 * minutes))


def _centred(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1
