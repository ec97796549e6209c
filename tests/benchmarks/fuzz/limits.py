"""Limits of time and memory for one file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SECONDS = 5  # of processor time for one file, so that other work on the machine does not matter


@contextmanager
def in_time() -> Iterator[None]:
    """Check that the body takes less than ``SECONDS`` of processor time."""
    start = time.process_time()
    yield
    assert time.process_time() - start < SECONDS


def limit_memory(more: int) -> None:
    """Limit this process's address space to ``more`` bytes than it has now, where the system can; beyond it, a reader fails with a MemoryError."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        import resource

        size = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + more, size + more))
