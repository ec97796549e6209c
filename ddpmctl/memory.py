"""How the C library treats freed memory: it keeps it for the next tensor, or returns it to the system."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Mapping

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
LARGEST_KEPT = 32 * 2**20  # bytes; glibc allows no more
NEVER = 2**31 - 1


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> None:
    """Let glibc keep the memory of freed tensors instead of returning it to the system.

    A training step frees and allocates the same hundreds of megabytes. By default they are returned in between, and the system has to clear
    each page again when it is next written to, which takes up to a third of a step on a CPU (tests/benchmarks/memory.py).
    Nothing is changed where the user chose (``MALLOC_...``, ``GLIBC_TUNABLES``), or where the C library is another one.
    """
    if any(name.startswith("MALLOC_") for name in environment) or "glibc.malloc" in environment.get("GLIBC_TUNABLES", ""):
        return
    libc = _glibc()
    if libc is not None:
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
        libc.mallopt(M_TRIM_THRESHOLD, NEVER)


def return_freed_memory() -> None:
    """Run the garbage collector, and give unused memory back to the system."""
    gc.collect()
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """Return the C library of this process if it is glibc, else None."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
