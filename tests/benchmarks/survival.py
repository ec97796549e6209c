"""The full kill test: a hundred SIGKILLs and twenty SIGTERMs.

    python -m tests.benchmarks.survival [--kills 100] [--terms 20] [--seed 0]

A real training process is killed at random times, half of them while a file is written, and resumed each time. At the end weights,
average, optimizer, counters and log must equal those of an uninterrupted run byte for byte.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

from tests.survival.kills import differences, killed, whole

EPOCHS_A_KILL = 5


def main() -> int:
    """Run the test and print what was hit; 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--terms", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DDPMCTL_CACHE_DIR"] = folder + "/cache"
        for name, count, number in (("SIGKILL", given.kills, signal.SIGKILL), ("SIGTERM", given.terms, signal.SIGTERM)):
            start, epochs = time.perf_counter(), 60 + EPOCHS_A_KILL * count
            left_alone = whole(Path(folder) / f"{name}-whole", epochs)
            run, tally = killed(Path(folder) / name, epochs, count, number, random.Random(given.seed))
            found = differences(left_alone, run)
            gained = [b - a for a, b in zip(tally.steps, tally.steps[1:], strict=False)]
            print(
                f"{name}: {tally.kills} of {epochs} epochs' run, {tally.while_starting} while starting, {tally.with_temporaries} with a file half-written; "
                f"{statistics.fmean(gained or [0]):.1f} steps between kills; {time.perf_counter() - start:.0f} s; differences: {found or 'none'}",
                flush=True,
            )
            bad += len(found)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
