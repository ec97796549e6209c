"""The trainer: network, average, optimizers and data, and the training step of all recipes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ddpmctl.config import Config
from ddpmctl.cuda_graph import CudaGraph
from ddpmctl.data.dataset import Dataset
from ddpmctl.device import ComputeDevice, fits, without_copy
from ddpmctl.diffusion.denoiser import Diffusion, TrainingLoss
from ddpmctl.diffusion.randomness import derived_seed, generator
from ddpmctl.distributed.replicas import Replicas
from ddpmctl.errors import UsageError
from ddpmctl.iclevr import ICLEVR
from ddpmctl.registry import NETWORKS
from ddpmctl.sampling.recognition import recognises_objects, require_recogniser
from ddpmctl.task import Task
from ddpmctl.training.gradients import Gradients, require_finite
from ddpmctl.training.optimizers import MatrixMuon, make_optimizers, set_lr

MEAN_OF = 3000  # training images, at most, whose mean a network starts from


@runtime_checkable
class Centred(Protocol):
    """A network whose output starts at the mean of the training images."""

    def centre(self, mean: Tensor) -> None:
        """Take over the mean, (3, H, W) in [-1, 1]."""


@dataclass
class Counters:
    """Progress of a run; with the config and the seed it determines the remaining steps.

    Attributes:
        seconds: duration of the training steps, including those before a resume.
        epoch_loss: sum of loss x images since the epoch began.
        logged_loss, logged_images: the same since the last logged step.
        scored_epoch: the last epoch after which a checkpoint was scored and saved.
        last_loss: mean loss of the last whole epoch.
        lr: learning rate of the last step.
        lr_scale: factor of the learning rate from rollbacks.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    images_seen: int = 0
    seconds: float = 0.0
    epoch_images: int = 0
    epoch_seconds: float = 0.0
    scored_epoch: int = 0
    last_loss: float = 0.0
    best: float = -1.0
    lr: float = 0.0
    lr_scale: float = 1.0
    rollbacks: int = 0
    epoch_loss: float = 0.0
    logged_loss: float = 0.0
    logged_images: int = 0


def make_network(config: Config, task: Task = ICLEVR) -> nn.Module:
    """Return the config's network with its initial weights, a pure function of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(config.training.seed, "weights"))
        net: nn.Module = NETWORKS.get(config.model.net)(config.model, task)
    return net


def require_trainable(config: Config) -> None:
    """Check that the network can be trained with these settings.

    Raises:
        UsageError: it cannot.
    """
    name, net, objective = config.model.net, NETWORKS.get(config.model.net), config.diffusion.objective
    cannot = [("--label-loss", "recognise objects")] if config.training.label_loss and not recognises_objects(name) else []
    cannot += [("--error-loss", "estimate its errors")] if config.training.error_loss and not getattr(net, "estimates_errors", False) else []
    if cannot:
        option, ability = cannot[0]
        needed = [f"{flag} 0" for flag, _ in cannot] + ["--particles 1"] * (option == "--label-loss" and config.sampling.particles > 1)
        raise UsageError(f"{option}: the network {name} does not {ability}; give {' and '.join(needed)}, or --net fine-unet")
    require_recogniser(config)
    if objective not in getattr(net, "objectives", (objective,)):
        raise UsageError(f"--objective: the network {name} does not predict {objective}; give --objective {' or '.join(net.objectives)}")


def start_network(config: Config, images: np.ndarray, task: Task = ICLEVR) -> nn.Module:
    """Return the config's network as training starts, for training images uint8 (N, 3, H, W)."""
    net = make_network(config, task)
    if isinstance(net, Centred):
        some = images[:: -(-len(images) // MEAN_OF)]
        net.centre(torch.from_numpy(np.asarray(some.mean(0))) / 127.5 - 1)
    return net


def ema_average(decay: float) -> Any:
    """Return torch's averaging function with a decay that rises to ``decay``, min(decay, (1 + n) / (10 + n)).

    Without this warm-up, the average of a short run would still contain its random initial weights.
    """

    @torch.no_grad()
    def average(averaged: list[Tensor], current: list[Tensor], count: Tensor | int) -> None:
        n = float(count)
        weight = 1 - min(decay, (1 + n) / (10 + n))
        # torch groups the tensors by dtype; integers, such as batch norm's num_batches_tracked, cannot be averaged.
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, weight)
        else:
            torch._foreach_copy_(averaged, current)

    return average


@dataclass
class Trainer:
    """Network, average, optimizers and data, and one training step.

    With several replicas, each process has a trainer and takes its share of every batch; after each step all have the same weights.

    Attributes:
        received: returns the number of a signal that this process received, 0 for none.
        continued: returns how often this process went on after it was halted (SIGSTOP), which is no time of training.
        start: a state dict to start from, instead of random weights.
        stop: the signal for which all replicas stop after this step; 0 for none, and always for a single process.
    """

    config: Config
    compute: ComputeDevice
    dataset: Dataset
    counters: Counters = field(default_factory=Counters)
    replicas: Replicas = field(default_factory=Replicas)
    received: Callable[[], int] = int
    continued: Callable[[], int] = int
    start: Mapping[str, Tensor] | None = None
    stop: int = 0

    def __post_init__(self) -> None:
        """Build everything on the device."""
        device, training = self.compute.device, self.config.training
        net = start_network(self.config, self.dataset.images, self.dataset.task)
        if self.start is not None:
            net.load_state_dict(self.start)
        self.net = net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = None
        if training.ema is not None:
            self.average = AveragedModel(self.net, multi_avg_fn=ema_average(training.ema), use_buffers=True)
        alone = self.replicas.job.is_single and self.config.run.micro_batch is None
        self.forward = self.compute.compiled(self.replicas.wrap(self.net, sync_bn=self.config.run.sync_bn == "on"), alone=alone)
        self.optimizers = make_optimizers(self.net, training, self.compute.dtype)
        if isinstance(self.forward, CudaGraph):
            for optimizer in self.optimizers:
                if isinstance(optimizer, MatrixMuon):
                    optimizer.record()
        self.diffusion = Diffusion.of(self.config.diffusion)
        self.loss = TrainingLoss(self.diffusion, training, device)
        images = without_copy(self.dataset.images)
        self.images = images.to(device) if fits(device, images.numel()) else images  # else each batch is sent
        self.labels = torch.from_numpy(self.dataset.labels).to(device)
        self._order: tuple[int, Tensor] | None = None
        self.sums = {name: torch.zeros((), device=device) for name in ("epoch_loss", "logged_loss")}

    @property
    def batches_per_epoch(self) -> int:
        """Steps in one pass over the images; the last batch may be smaller."""
        return -(-len(self.images) // self.config.training.batch_size)

    @property
    def fraction(self) -> float:
        """Share of the budget that is used up, 0 to 1."""
        training, counters = self.config.training, self.counters
        if training.minutes is not None:
            return min(1.0, counters.seconds / (60 * training.minutes))
        assert training.epochs is not None
        return (counters.epoch + counters.batch / self.batches_per_epoch) / training.epochs

    @property
    def done(self) -> bool:
        """Whether the budget is used up."""
        return self.fraction >= 1

    @property
    def epoch_is_over(self) -> bool:
        """Whether the epoch's last batch is done, or the budget is used up within the epoch; ``end_epoch`` must follow."""
        return self.counters.batch == self.batches_per_epoch or (self.counters.batch > 0 and self.done)

    def weights(self) -> dict[str, Tensor]:
        """Return the weights to sample with: the average where one is kept."""
        return {name: value.detach().cpu().contiguous() for name, value in self.sampling_network().state_dict().items()}

    def sampling_network(self) -> nn.Module:
        """Return the network to sample with, in evaluation mode; ``step`` sets training mode again."""
        net: nn.Module = self.net if self.average is None else self.average.module
        return net.eval()

    def step(self) -> None:
        """Train on the next batch. The batch, its t, noise and dropped labels are pure functions of (seed, step).

        Raises:
            Diverged: the loss or a gradient is not finite; no optimizer step was taken.
            UsageError: the batch does not fit in memory; names settings that fit.
        """
        start, continued = time.perf_counter(), self.continued()
        counters, training = self.counters, self.config.training
        chosen = self._batch_indices()
        counters.lr = set_lr(self.optimizers, training, counters.step, self._decay_fraction(), counters.lr_scale)
        self.net.train()
        gradients = Gradients(self.config, self.compute, self.replicas, self.net, self.forward, self.loss, self.images, self.labels)
        loss, self.stop = self.replicas.agree(gradients(chosen, counters.step, self.fraction), self.received())
        require_finite(self.net, loss, {"step": counters.step + 1, "epoch": counters.epoch + 1, "lr": counters.lr, "batch_indices": chosen})
        for optimizer in self.optimizers:
            optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.net)
        torch._foreach_add_(list(self.sums.values()), loss * len(chosen))
        seconds = time.perf_counter() - start
        if self.continued() > continued:  # it was halted within this step, nobody knows for how long
            seconds = min(seconds, counters.seconds / max(counters.step, 1))
        counters.step += 1
        counters.batch += 1
        counters.images_seen += len(chosen)
        counters.epoch_images += len(chosen)
        counters.logged_images += len(chosen)
        seconds = self.replicas.step_seconds(seconds)
        counters.seconds += seconds
        counters.epoch_seconds += seconds

    def _decay_fraction(self) -> float:
        training = self.config.training
        # By whole epochs, as in the report: lr (1 - epoch / epochs).
        return self.fraction if training.epochs is None else self.counters.epoch / training.epochs

    def _batch_indices(self) -> Tensor:
        counters, training = self.counters, self.config.training
        if self._order is None or self._order[0] != counters.epoch:
            order = torch.randperm(len(self.images), generator=generator(training.seed, "order", counters.epoch))
            self._order = (counters.epoch, order.to(self.compute.device))
        start = counters.batch * training.batch_size
        return self._order[1][start : start + training.batch_size]

    def mean_loss(self, since: str) -> float:
        """Return the mean loss since the epoch began (``"epoch"``) or since the last logged step (``"logged"``)."""
        images = self.counters.epoch_images if since == "epoch" else self.counters.logged_images
        return float(self.sums[f"{since}_loss"]) / max(images, 1)

    def end_epoch(self, loss: float) -> None:
        """Start the next epoch; ``loss`` is the mean over the one that ended."""
        self.counters.last_loss = loss
        self.counters.epoch += 1
        self.counters.batch = self.counters.epoch_images = 0
        self.counters.epoch_seconds = 0.0
        self.sums["epoch_loss"].zero_()

    def end_logged(self) -> None:
        """Reset the loss that is averaged between logged steps."""
        self.counters.logged_images = 0
        self.sums["logged_loss"].zero_()

    def go_on_from(self, counters: Counters) -> None:
        """Take over the counters of a saved state."""
        self.counters, self._order = counters, None
        for name, total in self.sums.items():
            total.fill_(getattr(counters, name))
