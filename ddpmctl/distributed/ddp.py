"""Training over several processes: torch's process group and DistributedDataParallel, and batch norm over the whole batch.

Loaded only where there are several processes.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddpmctl.distributed.job import Job, peer_errors
from ddpmctl.errors import UsageError

# The argument's name in the torch at hand: 2.15 warns of the older one, which is all that 2.11 knows.
SYNC_BUFFERS = next(name for name in ("forward_sync_buffers", "broadcast_buffers") if name in inspect.signature(DistributedDataParallel).parameters)
SILENCE = timedelta(minutes=10)  # within a step nobody keeps the others waiting for so long; for longer things they look at the store


@contextmanager
def process_group(job: Job, device: torch.device) -> Iterator[None]:
    """In the body, the ranks can add up tensors on ``device``: over nccl on GPUs, over gloo elsewhere.

    Raises:
        UsageError: the backend is missing.
        PeerError: another process is gone.
    """
    if device.type not in ("cuda", "cpu"):
        raise UsageError(f"--device: several processes train on CUDA GPUs or on CPUs, not on {device.type}; give --device cpu, or run one process")
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not dist.is_backend_available(backend):
        raise UsageError(f"torchrun: this torch has no {backend}; run in one process, or install a torch that has it")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with peer_errors():
        job.from_leader(lambda: None)  # connects
    yield
    dist.destroy_process_group()  # not after an error: taking leave of processes that are gone may take minutes


def data_parallel(net: nn.Module, device: torch.device, *, sync_bn: bool) -> DistributedDataParallel:
    """Return the network as one whose gradients are averaged over the ranks; its weights become rank 0's.

    With ``sync_bn``, batch norm sees the whole batch, as in one process. Without, each process normalises by its own images, and the
    running statistics are kept as they are in each (rank 0 writes its own).
    """
    if sync_bn:
        if device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(net)  # type: ignore[no-untyped-call]  # it replaces the parts of the network itself
        else:
            _globalise_batch_norm(net)
    places = [torch.cuda.current_device()] if device.type == "cuda" else None
    # Buffers are no one's but rank 0's to keep: with sync_bn they are equal, and without it training does not read them.
    unsynced: dict[str, Any] = {SYNC_BUFFERS: False}
    return DistributedDataParallel(net, device_ids=places, gradient_as_bucket_view=True, **unsynced)


def sum_over_ranks(values: Tensor) -> Tensor:
    """Return the sum of a tensor over the ranks, the same bits on each."""
    dist.all_reduce(values)
    return values


def bytes_of_first(job: Job, data: bytes, device: torch.device) -> bytes:
    """Return rank 0's ``data`` on every rank."""
    size = torch.tensor([len(data)], device=device)
    dist.broadcast(size, 0)
    content = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device) if job.is_leader else torch.empty(int(size), dtype=torch.uint8, device=device)
    dist.broadcast(content, 0)
    return content.cpu().numpy().tobytes()


class _SumOverRanks(torch.autograd.Function):
    """A sum over the ranks, through which gradients flow back to each of them."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return sum_over_ranks(values.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return sum_over_ranks(gradient.contiguous().clone())


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """Batch norm with the statistics of all ranks' images (Ioffe & Szegedy 2015), for devices that torch's SyncBatchNorm does not serve."""

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
        # Every rank's count, mean and sum of squares about it, joined as by Chan et al. 1983, eq. 2.1: no large numbers are subtracted.
        own = torch.stack((torch.full_like(mean, count), mean, squares))
        table = own.new_zeros((dist.get_world_size(), *own.shape))
        table = torch.cat((table[: dist.get_rank()], own[None], table[dist.get_rank() + 1 :]))
        counts, means, sums = _SumOverRanks.apply(table).unbind(1)  # each (ranks, C)
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


def _globalise_batch_norm(net: nn.Module) -> None:
    """Give a network's batch norms the statistics of all ranks; parameters, buffers and their names stay."""
    for module in net.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = GlobalBatchNorm2d
