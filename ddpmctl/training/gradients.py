"""The gradients of one training batch, accumulated over micro-batches, and a check that they are finite."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddpmctl.config import Config
from ddpmctl.device import ComputeDevice, release_memory
from ddpmctl.diffusion.denoiser import TrainingLoss
from ddpmctl.diffusion.randomness import generator
from ddpmctl.distributed.job import split
from ddpmctl.distributed.replicas import Replicas
from ddpmctl.errors import DivergedError, UsageError, out_of_memory


class Diverged(DivergedError):
    """NaN or inf in the loss, the gradients or the weights; ``diagnosis`` holds the details as plain values."""

    def __init__(self, message: str, diagnosis: dict[str, Any]) -> None:
        """Take the message and the diagnosis."""
        super().__init__(message)
        self.diagnosis = diagnosis


@dataclass
class Gradients:
    """Computes a batch's gradients and stores them in the network's parameters.

    Attributes:
        net: the network; ``forward`` calls it, wrapped and compiled.
        images: uint8, (N, 3, H, W), all training images.
        labels: multi-hot, (N, C).
    """

    config: Config
    compute: ComputeDevice
    replicas: Replicas
    net: nn.Module
    forward: Callable[..., Tensor]
    loss: TrainingLoss
    images: Tensor
    labels: Tensor

    def __call__(self, chosen: Tensor, step: int, fraction: float = 0.0) -> Tensor:
        """Return this replica's part of the mean loss over the batch of images ``chosen``; noise is a function of (seed, step).

        ``fraction`` is the used part of the training budget, on which the distribution of t may depend.

        Raises:
            UsageError: the batch does not fit in memory; names settings that fit.
        """
        size = self.config.run.micro_batch or len(chosen)
        try:
            with self.replicas.waiting():
                return self._accumulate(chosen, size, step, fraction)
        except Exception as error:
            if not out_of_memory(error):
                raise
        # Outside of the handler: within it, the traceback keeps the tensors of the failed attempt in memory.
        raise self._memory_advice(chosen, size, step)

    def _accumulate(self, chosen: Tensor, size: int, step: int, fraction: float = 0.0) -> Tensor:
        job = self.replicas.job
        share = split(len(chosen), job.size, job.rank)
        own = chosen[share]
        x0 = (self._batch(own).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        rng = generator(self.config.training.seed, "step", step, device=self.compute.device)
        batch = self.loss.draw(x0, self.labels[own].float(), rng, count=len(chosen), share=share, fraction=fraction)
        self.net.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.compute.device)
        most = -(-len(chosen) // job.size)
        parts = -(-most // size)  # the same number on every rank: the last part all-reduces the gradients
        for number, part in enumerate(batch.parts(parts), start=1):
            with nullcontext() if number == parts else self.replicas.without_reduction(self.forward):  # type: ignore[arg-type]
                with self.compute.autocast():
                    loss = self.loss(self.forward, part) * (len(part.x_t) / len(chosen))
                # DDP averages the gradients over the ranks, but the sum is needed.
                (loss * job.size if job.size > 1 else loss).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    def _batch(self, own: Tensor) -> Tensor:
        """Return images by number, on the device; a set that does not fit there stays in main memory, or on the disk."""
        device = self.compute.device
        if self.images.device == own.device:
            return self.images[own]
        return self.images[own.to(self.images.device)].to(device, non_blocking=True)

    def _memory_advice(self, chosen: Tensor, size: int, step: int) -> UsageError:
        """Return the error for a batch that does not fit, with a ``--micro-batch`` that does."""
        where = f"do not fit in the memory of {self.compute.describe()}"
        if not self.replicas.job.is_single:  # trying sizes would need all ranks
            own = min(size, -(-len(chosen) // self.replicas.job.size))
            return UsageError(f"--batch-size: {own} images at a time {where}; try --micro-batch {max(1, own // 2)}")
        fitting = min(size, len(chosen)) // 2
        while fitting and not self._fits(chosen, fitting, step):
            fitting //= 2
        if not fitting:
            return UsageError(f"--width: not even one image of this network fits in the memory of {self.compute.describe()}")
        return UsageError(
            f"--batch-size: {min(size, len(chosen))} images at a time {where}; "
            f"--micro-batch {fitting} does, and accumulates {-(-len(chosen) // fitting)} of them for the same step"
        )

    def _fits(self, chosen: Tensor, size: int, step: int) -> bool:
        self.net.zero_grad(set_to_none=True)
        release_memory(self.compute)
        try:
            self._accumulate(chosen, size, step)
        except Exception as error:
            if not out_of_memory(error):
                raise
            return False
        return True


def require_finite(net: nn.Module, loss: Tensor, known: dict[str, Any]) -> None:
    """Check loss and gradients before an optimizer uses them; synchronises with the device once.

    Args:
        net: holds the gradients.
        loss: a scalar.
        known: the step's part of the diagnosis: "step", "epoch", "lr", "batch_indices".

    Raises:
        Diverged: one of them is NaN or inf.
    """
    gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(gradients.values()))))
    loss_value, norm_value = torch.stack((loss, norm)).tolist()
    if math.isfinite(loss_value) and math.isfinite(norm_value):
        return
    what = "gradient norm" if math.isfinite(loss_value) else "loss"
    raise Diverged(
        f"the {what} is not finite at step {known['step']} (epoch {known['epoch']}, learning rate {known['lr']:g})",
        {
            **known, "loss": str(loss_value), "gradient_norm": str(norm_value), "batch_indices": known["batch_indices"].tolist(),
            "gradients_not_finite": [name for name, value in gradients.items() if not torch.isfinite(value).all()],
        },
    )  # fmt: skip
