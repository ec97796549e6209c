"""Replicas of a network in data-parallel training; a single process is one replica and exchanges nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from ddpmctl.distributed.job import SINGLE, Job

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class Replicas:
    """A single replica: nothing is exchanged."""

    def __init__(self, job: Job = SINGLE) -> None:
        """Take the job whose processes train."""
        self.job = job

    def wrap(self, net: nn.Module, *, sync_bn: bool) -> nn.Module:
        """Return the network, wrapped so that gradients are averaged over the replicas.

        With ``sync_bn``, batch norm uses the whole batch, as in one process; without, each process its own images.
        """
        return net

    def without_reduction(self, net: nn.Module) -> AbstractContextManager[object]:
        """Return the context in which gradients stay local, to be reduced with those of a later part of the batch."""
        return nullcontext()

    def waiting(self) -> AbstractContextManager[None]:
        """Return the context of waiting for other replicas, in which their errors become PeerError."""
        return nullcontext()

    def agree(self, loss: Tensor, signal: int) -> tuple[Tensor, int]:
        """Return the whole batch's loss from this replica's part of it, and the signal that any replica received.

        Args:
            loss: a scalar; the parts add up.
            signal: number of the signal that this process received, 0 for none.

        Returns:
            The loss, and the number of a signal for which all replicas stop; always 0 for a single process, whose caller stops by itself.
        """
        return loss, 0

    def step_seconds(self, own: float) -> float:
        """Return the duration of a step that all replicas record: for several, rank 0's of the previous step."""
        return own


@contextmanager
def replicas(job: Job, device: torch.device) -> Iterator[Replicas]:
    """Yield the replicas of a job, which train on ``device``: over nccl on GPUs, over gloo on CPUs.

    Raises:
        UsageError: several processes cannot train on this kind of device.
        PeerError: another process is gone.
    """
    if job.is_single:
        yield Replicas()
        return
    from ddpmctl.distributed.ddp import data_parallel_replicas

    with data_parallel_replicas(job, device) as several:
        yield several
