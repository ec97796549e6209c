"""The training state and the one training step that every recipe shares."""

from __future__ import annotations

import collections
import dataclasses
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ddpmctl.config import Config
from ddpmctl.data.dataset import Dataset
from ddpmctl.diffusion.denoiser import Diffusion, TrainingLoss
from ddpmctl.diffusion.randomness import derived_seed, generator
from ddpmctl.engine.machine import Machine
from ddpmctl.engine.optimizers import make_optimizers, set_lr
from ddpmctl.errors import DataError
from ddpmctl.registry import NETWORKS

STEPS_AHEAD = 4  # that a GPU may have queued
STATE_FORMAT = "ddpmctl training state 1"


def make_network(config: Config) -> nn.Module:
    """Return the config's network with its initial weights, a pure function of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(config.training.seed, "weights"))
        net: nn.Module = NETWORKS.get(config.model.net)(config.model)
    return net


def ema_average(decay: float) -> Any:
    """Return torch's averaging function with a decay that rises to ``decay``, min(decay, (1 + n) / (10 + n)).

    Without the rise, a short run's average would still remember its random start.
    """

    @torch.no_grad()
    def average(averaged: list[Tensor], current: list[Tensor], count: Tensor | int) -> None:
        n = float(count)
        weight = 1 - min(decay, (1 + n) / (10 + n))
        # torch hands tensors over by dtype: whole numbers, such as batch norm's count of batches, cannot be averaged.
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, weight)
        else:
            torch._foreach_copy_(averaged, current)

    return average


@dataclass
class Counters:
    """How far a run has come; with the config and the seed they determine all that follows.

    Attributes:
        seconds: of training steps alone, over all resumptions.
        epoch_loss: sum of loss x images since the epoch began.
        logged_loss, logged_images: the same since the last logged step.
        scored_epoch: the last epoch after which a checkpoint was scored and saved.
        last_loss: mean loss of the last whole epoch.
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
    epoch_loss: float = 0.0
    logged_loss: float = 0.0
    logged_images: int = 0


@dataclass
class Trainer:
    """Network, average, optimizers and data, with one step over them."""

    config: Config
    machine: Machine
    dataset: Dataset
    counters: Counters = field(default_factory=Counters)

    def __post_init__(self) -> None:
        """Build everything on the device."""
        device, training = self.machine.device, self.config.training
        self.net = make_network(self.config).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.forward = self.machine.compiled(self.net)
        self.optimizers = make_optimizers(self.net, training)
        self.average = None
        if training.ema is not None:
            self.average = AveragedModel(self.net, multi_avg_fn=ema_average(training.ema), use_buffers=True)
        self.diffusion = Diffusion.of(self.config.diffusion)
        self.loss = TrainingLoss(self.diffusion, training, device)
        self.images = torch.from_numpy(self.dataset.images).to(device)
        self.labels = torch.from_numpy(self.dataset.labels).to(device)
        self._order: tuple[int, Tensor] | None = None
        self._sums = {name: torch.zeros((), device=device) for name in ("epoch_loss", "logged_loss")}
        self._queued: collections.deque[torch.cuda.Event] = collections.deque()

    @property
    def batches_per_epoch(self) -> int:
        """Steps in one pass over the images; the last batch may be smaller."""
        return -(-len(self.images) // self.config.training.batch_size)

    @property
    def parameters(self) -> int:
        """Numbers that are trained."""
        return sum(p.numel() for p in self.net.parameters())

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

    def weights(self) -> dict[str, Tensor]:
        """Return the weights to sample with: the average where one is kept."""
        net = self.net if self.average is None else self.average.module
        return {name: value.detach().cpu().contiguous() for name, value in net.state_dict().items()}

    def sampling_network(self) -> nn.Module:
        """Return the network to sample with, in evaluation mode; ``step`` sets training mode again."""
        net: nn.Module = self.net if self.average is None else self.average.module
        return net.eval()

    def step(self) -> float:
        """Train on the next batch and return the learning rate that was used.

        The batch, its t, noise and dropped labels are pure functions of (seed, step).
        """
        start = time.perf_counter()
        counters, training = self.counters, self.config.training
        chosen = self._batch_indices()
        x0 = (self.images[chosen].float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        labels = self.labels[chosen].float()
        rng = generator(training.seed, "step", counters.step, device=self.machine.device)
        lr = set_lr(self.optimizers, training, counters.step, self._decay_fraction())
        self.net.train()
        with self.machine.autocast():
            loss = self.loss(self.forward, x0, labels, rng)
        self.net.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in self.optimizers:
            optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.net)
        torch._foreach_add_(list(self._sums.values()), loss.detach() * len(chosen))  # stays on the device: reading it would wait for the step
        self._wait_for_earlier_steps()
        counters.step += 1
        counters.batch += 1
        counters.images_seen += len(chosen)
        counters.epoch_images += len(chosen)
        counters.logged_images += len(chosen)
        counters.seconds += time.perf_counter() - start
        counters.epoch_seconds += time.perf_counter() - start
        return lr

    def _wait_for_earlier_steps(self) -> None:
        """Let a GPU be at most a few steps behind, so that a budget in minutes counts its work and not the launching of it."""
        if self.machine.device.type != "cuda":
            return
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        self._queued.append(done)
        if len(self._queued) > STEPS_AHEAD:
            self._queued.popleft().synchronize()

    def _decay_fraction(self) -> float:
        training = self.config.training
        # By whole epochs, as in the report: lr (1 - epoch / epochs).
        return self.fraction if training.epochs is None else self.counters.epoch / training.epochs

    def _batch_indices(self) -> Tensor:
        counters, training = self.counters, self.config.training
        if self._order is None or self._order[0] != counters.epoch:
            order = torch.randperm(len(self.images), generator=generator(training.seed, "order", counters.epoch))
            self._order = (counters.epoch, order.to(self.machine.device))
        start = counters.batch * training.batch_size
        return self._order[1][start : start + training.batch_size]

    def mean_loss(self, since: str) -> float:
        """Return the mean loss since the epoch began (``"epoch"``) or since the last logged step (``"logged"``)."""
        images = self.counters.epoch_images if since == "epoch" else self.counters.logged_images
        return float(self._sums[f"{since}_loss"]) / max(images, 1)

    def end_epoch(self, loss: float) -> None:
        """Begin the next pass over the images; ``loss`` is the mean over the one that ends."""
        self.counters.last_loss = loss
        self.counters.epoch += 1
        self.counters.batch = self.counters.epoch_images = 0
        self.counters.epoch_seconds = 0.0
        self._sums["epoch_loss"].zero_()

    def end_logged(self) -> None:
        """Begin the next stretch of logged steps."""
        self.counters.logged_images = 0
        self._sums["logged_loss"].zero_()

    def state(self) -> dict[str, Any]:
        """Return all that is needed to go on, as tensors and plain values."""
        self.counters.epoch_loss, self.counters.logged_loss = float(self._sums["epoch_loss"]), float(self._sums["logged_loss"])
        return {
            "format": STATE_FORMAT,
            "config": self.config.to_dict(),
            "data": self.dataset.key,
            "counters": dict(self.counters.__dict__),
            "net": self.net.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def restore(self, state: Any, where: str) -> None:
        """Go on from ``state()``'s content.

        Raises:
            DataError: the state is of another format, or of other data or settings; ``where`` names it.
        """
        if not isinstance(state, dict) or state.get("format") != STATE_FORMAT:
            raise DataError(f"{where}: is no training state of this version")
        if state.get("data") != self.dataset.key:
            raise DataError(f"{where}: the run was trained on other data than {self.dataset.name}")
        try:
            self.net.load_state_dict(state["net"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.counters = Counters(**state["counters"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"{where}: does not fit the run's settings ({str(error).splitlines()[0]})") from None
        for name, total in self._sums.items():
            total.fill_(getattr(self.counters, name))


def probe_seconds_per_image(config: Config, machine: Machine) -> float:
    """Return the seconds that training takes per image, measured on the second of two small steps of a throwaway network."""
    count = min(config.training.batch_size, 8 if machine.device.type == "cpu" else 64)
    data = Dataset("probe", "", np.zeros((count, 3, 64, 64), np.uint8), np.zeros((count, 24), np.uint8), {}, None)
    trainer = Trainer(config.replace(batch_size=count, warmup=0), dataclasses.replace(machine, compile_mode="none"), data)
    trainer.step()
    trainer.end_epoch(trainer.mean_loss("epoch"))  # reading the loss waits for the device
    start = time.perf_counter()
    trainer.step()
    trainer.mean_loss("epoch")
    return (time.perf_counter() - start) / count
