"""The compute device: device, precision and threads."""

from __future__ import annotations

import contextlib
import math
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ddpmctl.config import DeviceConfig
from ddpmctl.cuda_graph import CudaGraph
from ddpmctl.errors import UsageError
from ddpmctl.memory import keep_freed_memory, return_freed_memory


@dataclass(frozen=True)
class ComputeDevice:
    """A device and the autocast precision on it; weights are always float32."""

    device: torch.device
    precision: str
    compile_mode: str = "none"

    @property
    def kind(self) -> str:
        """The type of device: cpu, cuda or mps."""
        return self.device.type

    @property
    def dtype(self) -> torch.dtype:
        """The type of the network's products."""
        return torch.float32 if self.precision == "fp32" else torch.bfloat16

    def compiled(self, net: nn.Module, *, alone: bool) -> Callable[..., Tensor]:
        """Return the network for training: as CUDA graphs or compiled, if the settings ask for it.

        Args:
            net: on this device.
            alone: whether one process trains and each step calls the network once, which CUDA graphs need; otherwise they are not used.
        """
        if self.compile_mode == "cuda-graph":
            return CudaGraph(net, self.dtype) if alone and self.device.type == "cuda" else net
        if self.compile_mode == "none":
            return net
        return torch.compile(net, mode=None if self.compile_mode == "default" else self.compile_mode)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Return the autocast context for network calls."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def describe(self) -> str:
        """Return the device as text for messages."""
        if self.device.type == "cuda":
            return f"{self.device} ({torch.cuda.get_device_name(self.device)})"
        if self.device.type == "cpu":
            return f"cpu ({torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''})"
        return str(self.device)


def make_compute_device(config: DeviceConfig, local: int = 0) -> ComputeDevice:
    """Return the device of a config and resolve ``auto``; ``local``, the local rank, selects the GPU.

    Raises:
        UsageError: the device is not available, or all processes would share one GPU.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = _device(config.device, local)
    keep_freed_memory()
    precision = config.precision if config.precision != "auto" else ("bf16" if _bf16_is_faster(device) else "fp32")
    return ComputeDevice(device, precision, config.compile)


def cores() -> int:
    """Return the number of this machine's cores for each process; the processes of a job share them."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def threads_that_fit(threads: int | None) -> int | None:
    """Return the number of threads, or None (torch decides) if this machine has fewer cores."""
    return threads if threads is not None and threads <= cores() else None


def release_memory(compute: ComputeDevice) -> None:
    """Free unused memory after an out-of-memory error."""
    return_freed_memory()
    if compute.device.type == "cuda":
        torch.cuda.empty_cache()


def without_copy(array: np.ndarray) -> Tensor:
    """Return an array as a tensor on the same memory, which may be read-only: a map of a file. Nothing may write to it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns that the array is not writable
        return torch.from_numpy(array)


def fits(device: torch.device, size: int) -> bool:
    """Return whether so many bytes can be kept on a device for good: on a GPU, a quarter of its free memory."""
    return device.type != "cuda" or size <= torch.cuda.mem_get_info(device)[0] // 4


def _device(name: str, local: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local}"  # torch.cuda.set_device and DDP need an index
    elif local > 0 and name.startswith("cuda:"):
        raise UsageError(f"--device: {name!r} is one GPU, but each process needs its own; give --device cuda")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        raise UsageError(f"--device: {name!r} is not available; use --device auto") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise UsageError(f"--device: {name!r} is not supported; use cpu, cuda or mps")
    return device


def _bf16_is_faster(device: torch.device) -> bool:
    """Return whether bf16 is faster; on a CPU, measure it, because CPUs without bf16 units emulate it slowly."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    if _slowness_of_bf16(192, rounds=3) > 4:  # an emulation is a hundred times as slow; with large matrices, to find that out takes seconds
        return False
    return _slowness_of_bf16(768, rounds=8) < 0.75


def _slowness_of_bf16(side: int, rounds: int) -> float:
    """Return how long a product of bf16 matrices takes, relative to float32; the shortest of some rounds."""
    matrices = [torch.ones(side, side, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    seconds = {a.dtype: math.inf for a in matrices}
    for _ in range(rounds):
        for a in matrices:  # in turn, so that other work on the machine slows both
            start = time.perf_counter()
            torch.mm(a, a)
            seconds[a.dtype] = min(seconds[a.dtype], time.perf_counter() - start)
    return seconds[torch.bfloat16] / seconds[torch.float32]
