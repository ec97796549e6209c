"""What a run will do, how long it will take and how much disk it needs, before its first step."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ddpmctl.config import Config, ModelConfig
from ddpmctl.diffusion.schedules import make_schedule
from ddpmctl.errors import UsageError
from ddpmctl.files import in_bytes, need_room
from ddpmctl.iclevr import ICLEVR
from ddpmctl.registry import NETWORKS
from ddpmctl.task import Task
from ddpmctl.training.gradients import Gradients
from ddpmctl.training.trainer import Trainer

GRID_BYTES = 800_000  # the two sample grids of one score
MOMENTS = {"muon": 1}  # moments stored per weight; the other optimizers are variants of Adam and store two


@dataclass(frozen=True)
class Plan:
    """What a training run is going to do.

    Attributes:
        seconds: estimated duration of the training steps, or None where it is not known.
        disk: space that the run needs, as text.
    """

    config: Config
    run: Path
    data: str
    images: int
    parameters: int
    device: str
    precision: str
    steps_per_epoch: int
    steps: int | None
    seconds: float | None
    terminal_snr: float
    evaluator: str
    disk: str


def make_plan(trainer: Trainer, run: Path, classifier: str) -> Plan:
    """Return what training will do; the duration for a number of epochs is estimated from two forward and backward passes.

    Args:
        trainer: before its first step; it is not changed. All ranks must call this.
        run: the run's folder.
        classifier: name of the classifier.
    """
    config, compute, job = trainer.config, trainer.compute, trainer.replicas.job
    training, images = config.training, len(trainer.images)
    seconds = 60 * training.minutes if training.minutes is not None else None
    if training.epochs is not None:
        own = seconds_per_image(trainer)
        seconds = training.epochs * images * job.from_leader(lambda: own) / job.size
    return Plan(
        config=config,
        run=run,
        data=trainer.dataset.name,
        images=images,
        parameters=network_size(config.model, trainer.dataset.task)[0],
        device=compute.describe() if job.is_single else f"{job.size} processes, each on {compute.describe()}",
        precision=compute.precision,
        steps_per_epoch=trainer.batches_per_epoch,
        steps=None if training.epochs is None else training.epochs * trainer.batches_per_epoch,
        seconds=seconds,
        terminal_snr=make_schedule(config.diffusion).terminal_snr,
        evaluator=classifier,
        disk=str(room_for(config, trainer.dataset.task)),
    )


@functools.cache
def network_size(config: ModelConfig, task: Task = ICLEVR) -> tuple[int, int]:
    """Return a network's number of parameters and the bytes of its state dict, without allocating its weights."""
    with torch.device("meta"):
        net = NETWORKS.get(config.net)(config, task)
    return sum(p.numel() for p in net.parameters()), sum(value.numel() * value.element_size() for value in net.state_dict().values())


def seconds_per_image(trainer: Trainer) -> float:
    """Return the seconds that one process takes for an image's gradients, measured on the second of two small batches.

    Weights and running statistics are not changed. All ranks must call this: batch norm may synchronise them.

    Raises:
        UsageError: the batch does not fit in memory; names settings that fit.
        PeerError: another process failed.
    """
    net, compute, config, size, task = trainer.net, trainer.compute, trainer.config, trainer.replicas.job.size, trainer.dataset.task
    limit = 8 if compute.device.type == "cpu" else 64
    # Without torch.compile, and one network call per process: only the wrapped network can accumulate gradients.
    count = min(config.training.batch_size, size * min(limit, config.run.micro_batch or limit))
    images, labels = (torch.zeros(count, *shape, dtype=torch.uint8, device=compute.device) for shape in (task.image_shape, (task.columns,)))
    gradients = Gradients(config, compute, trainer.replicas, net, net, trainer.loss, images, labels)
    chosen = torch.arange(count, device=compute.device)
    buffers = {name: value.clone() for name, value in net.named_buffers()}
    net.train()
    seconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
        float(gradients(chosen, 0))  # waits for the device
        seconds = time.perf_counter() - start
    net.zero_grad(set_to_none=True)
    for name, value in net.named_buffers():
        value.copy_(buffers[name])
    return seconds * size / count


@dataclass(frozen=True)
class Room:
    """Disk space that a run needs.

    Attributes:
        checkpoints: largest number of scored ones at a time; for a budget in minutes at least one.
        checkpoint_bytes, state_bytes: size of one file.
    """

    checkpoints: int
    checkpoint_bytes: int
    state_bytes: int

    @property
    def total(self) -> int:
        """Total bytes; while a state is written, the old one still exists."""
        return self.checkpoints * (self.checkpoint_bytes + GRID_BYTES) + 2 * self.state_bytes

    def __str__(self) -> str:
        """Describe the needed space."""
        return f"about {in_bytes(self.total)}: {self.checkpoints} checkpoint{'s' * (self.checkpoints != 1)} of {in_bytes(self.checkpoint_bytes)} and the state"


def room_for(config: Config, task: Task = ICLEVR) -> Room:
    """Return the disk space that a run needs, from the size of its network."""
    weights, training = network_size(config.model, task)[1], config.training
    scored = 1 if training.epochs is None else -(-training.epochs // training.save_every)
    kept = scored if config.run.keep is None else min(scored, config.run.keep + 3)  # the best, the last, and one more while it is written
    copies = 1 + (training.ema is not None) + MOMENTS.get(training.optimizer, 2)
    return Room(kept, weights, copies * weights)


def check_room(config: Config, folder: Path, task: Task, *, already: int = 0) -> None:
    """Check that a run on a task fits on the disk of ``folder``; ``already`` of its checkpoints exist.

    Raises:
        UsageError: it does not fit.
    """
    room = room_for(config, task)
    size = max(0, room.total - already * room.checkpoint_bytes)
    try:
        need_room(folder, size, "for the whole run")
    except UsageError as error:
        raise UsageError(f"{error} with --runs-dir, or keep fewer of the {room.checkpoints} checkpoints with --keep") from None
