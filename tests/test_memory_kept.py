"""Memory of freed tensors: kept by the process, so that the system need not clear its pages again."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only glibc can be told")

# Three blocks are too much for glibc to keep by itself. The first rounds allocate them; their pages are cleared once in any case.
PROGRAM = """
import resource, torch
from ddpmctl.config import DeviceConfig
from ddpmctl.device import make_compute_device, release_memory

compute = make_compute_device(DeviceConfig(device="cpu"))

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(2**22) for _ in range(3)]
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
before = sum(faults() for _ in range(5))
release_memory(compute)
print(before, faults())
"""
PAGES = 3 * 4 * 2**22 // os.sysconf("SC_PAGE_SIZE")


def page_faults(**environment: str) -> tuple[int, int]:
    """Return how many pages five rounds of allocating and freeing 48 MiB cleared, and one more after ``release_memory``."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "THP_"))}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env={**kept, **environment}, capture_output=True, text=True, check=True)
    first, second = map(int, done.stdout.split())
    return first, second


def test_freed_memory_is_used_again_without_the_system_clearing_it() -> None:
    kept, released = page_faults()
    assert kept < PAGES // 2  # five rounds would be 5 * PAGES
    assert released > PAGES // 2  # after too little memory it is returned


def test_a_users_own_choice_for_malloc_is_left_as_it_is() -> None:
    assert page_faults(MALLOC_TRIM_THRESHOLD_="1000000")[0] > 4 * PAGES
    assert page_faults(GLIBC_TUNABLES="glibc.malloc.trim_threshold=1000000")[0] > 4 * PAGES
