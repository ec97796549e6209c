"""Whether other processes compete for this machine's cores, and what OpenMP's threads do then."""

from __future__ import annotations

import os
import time
from pathlib import Path

SPIN_COUNT = "1000"  # of OpenMP's threads beside other busy processes; measured by tests/benchmarks/busy.py
LOADAVG = Path("/proc/loadavg")


def others_are_busy(file: Path = LOADAVG) -> bool:
    """Return whether other processes want to run now, in each of three readings; False if the system does not tell (not Linux)."""
    for _ in range(3):
        try:
            runnable = int(file.read_text(encoding="ascii").split()[3].partition("/")[0])
        except (OSError, IndexError, ValueError):
            return False
        if runnable <= 1:  # this process alone
            return False
        time.sleep(0.005)
    return True


def spin_briefly_beside_others() -> None:
    """On a busy machine, shorten the time that OpenMP's threads spin while they wait for each other; call it before torch is loaded.

    A spinning thread keeps the core that the thread it waits for needs. On an idle machine, spinning is faster than sleeping.
    """
    if "OMP_WAIT_POLICY" not in os.environ and "GOMP_SPINCOUNT" not in os.environ and others_are_busy():
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
