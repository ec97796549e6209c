"""Training over several processes: DistributedDataParallel, and batch norm over the whole batch; not imported by a single process."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from signal import SIGINT, SIGTERM
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddpmctl.distributed.job import Job
from ddpmctl.distributed.replicas import Replicas
from ddpmctl.errors import UsageError

# The argument's name in the installed torch: 2.15 deprecates the older name, the only one in 2.11.
SYNC_BUFFERS = next(name for name in ("forward_sync_buffers", "broadcast_buffers") if name in inspect.signature(DistributedDataParallel).parameters)
STEP_TIMEOUT = timedelta(hours=1)  # of a collective within a training step, for a GPU that hangs in a process that answers; rank 0 may save meanwhile


@contextmanager
def data_parallel_replicas(job: Job, device: torch.device) -> Iterator[DataParallelReplicas]:
    """Yield the replicas of a job in a process group of their own.

    Raises:
        UsageError: the device is neither CUDA nor CPU, or the backend is missing.
        PeerError: another process is gone.
    """
    if device.type not in ("cuda", "cpu"):
        raise UsageError(f"--device: several processes train on CUDA GPUs or on CPUs, not on {device.type}; give --device cpu, or run one process")
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not dist.is_backend_available(backend):
        raise UsageError(f"torchrun: this torch has no {backend}; run in one process, or install a torch that has it")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    job.from_leader(lambda: None)  # connects the processes
    with job.waiting():
        group = dist.new_group(backend=backend, timeout=STEP_TIMEOUT)
    yield DataParallelReplicas(job, device, group)
    dist.destroy_process_group(group)  # not after an error: it would wait for processes that are gone


class DataParallelReplicas(Replicas):
    """Several replicas: torch's DistributedDataParallel, and sums over a process group."""

    def __init__(self, job: Job, device: torch.device, group: Any) -> None:
        """Take the job, the device that this process trains on, and the process group."""
        super().__init__(job)
        self._device, self.group = device, group
        self._seconds = self._agreed_seconds = 0.0

    def wrap(self, net: nn.Module, *, sync_bn: bool) -> nn.Module:
        """Return the network in DistributedDataParallel; its weights become rank 0's.

        Without ``sync_bn``, running statistics differ between the processes, and rank 0 writes its own.
        """
        if sync_bn and self._device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(net, self.group)  # type: ignore[no-untyped-call]  # it replaces the modules in place
        elif sync_bn:
            _globalise_batch_norm(net, self.group)
        places = [torch.cuda.current_device()] if self._device.type == "cuda" else None
        # Buffers need no broadcast: with sync_bn they are equal, and without it training does not read them.
        unsynced: dict[str, Any] = {SYNC_BUFFERS: False}
        with self.job.waiting():
            return DistributedDataParallel(net, device_ids=places, process_group=self.group, gradient_as_bucket_view=True, **unsynced)

    def without_reduction(self, net: nn.Module) -> AbstractContextManager[object]:
        """Return DistributedDataParallel's ``no_sync``."""
        context: AbstractContextManager[object] = net.no_sync()  # type: ignore[operator]
        return context

    def waiting(self) -> AbstractContextManager[None]:
        """Return the context for code that waits for other processes; see ``Job.waiting``."""
        return self.job.waiting()

    def agree(self, loss: Tensor, signal: int) -> tuple[Tensor, int]:
        """Return the sum of the losses, bitwise equal on all ranks, and the signal to stop for; rank 0's step time is sent along."""
        values = [0.0, self._seconds if self.job.is_leader else 0.0, float(signal == SIGINT), float(signal == SIGTERM)]
        own = torch.tensor(values, dtype=torch.float64).to(self._device)
        own[0] = loss
        with self.job.waiting():
            total = sum_over_ranks(own, self.group)
            _, self._agreed_seconds, interrupted, terminated = total.tolist()
        return total[0].float(), SIGTERM if terminated else SIGINT if interrupted else 0

    def step_seconds(self, own: float) -> float:
        """Return rank 0's duration of the previous step, and store this one's for the next ``agree``."""
        self._seconds = own
        return self._agreed_seconds


def sum_over_ranks(values: Tensor, group: Any) -> Tensor:
    """Return the sum of a tensor over the ranks, bitwise equal on all; ``values`` is overwritten."""
    dist.all_reduce(values, group=group)
    return values


class _SumOverRanks(torch.autograd.Function):
    """A sum over the ranks, through which gradients flow back to each of them."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return sum_over_ranks(values.clone(), group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return sum_over_ranks(gradient.contiguous().clone(), ctx.group), None


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """Batch norm with the statistics of all ranks' images (Ioffe & Szegedy 2015), for devices that torch's SyncBatchNorm does not support."""

    group: Any

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (B, C, H, W); B may differ by rank and be 0."""
        if not self.training:
            return super().forward(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        x = input.float()
        count = x.numel() // x.shape[1]
        mean = x.mean((0, 2, 3), dtype=torch.float64) if count else x.sum((0, 2, 3), dtype=torch.float64)
        squares = (x - mean.float().view(1, -1, 1, 1)).square().sum((0, 2, 3), dtype=torch.float64)
        # Each rank's count, mean and sum of squared deviations, combined as in Chan et al. 1983, eq. 2.1, without cancellation.
        own = torch.stack((torch.full_like(mean, count), mean, squares))
        table = own.new_zeros((dist.get_world_size(), *own.shape))
        table = torch.cat((table[: dist.get_rank()], own[None], table[dist.get_rank() + 1 :]))
        counts, means, sums = _SumOverRanks.apply(table, self.group).unbind(1)  # each (ranks, C)
        total = counts.sum(0)
        whole_mean = (counts * means).sum(0) / total
        variance = (sums + counts * (means - whole_mean).square()).sum(0) / total
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(whole_mean.float(), self.momentum)
            self.running_var.lerp_((variance * total / (total - 1)).float(), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        shift = self.bias - whole_mean * scale
        out = torch.addcmul(shift.float().view(1, -1, 1, 1), x, scale.float().view(1, -1, 1, 1))
        normalised: Tensor = out.to(input.dtype)
        return normalised


def _globalise_batch_norm(net: nn.Module, group: Any) -> None:
    """Let a network's batch norms use the statistics of all ranks; parameters, buffers and their names do not change."""
    for module in net.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = GlobalBatchNorm2d
            module.group = group
