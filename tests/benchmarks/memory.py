"""Training speed where freed memory is kept by the process, and where glibc returns it to the system.

    python -m tests.benchmarks.memory [--rounds 5] [--seconds 10]

In images per second of preset ``quick`` on the CPU, measured in turn: medians with least and most.
"""

from __future__ import annotations

import argparse
import statistics

from tests.benchmarks.busy import images_per_second

AS_GLIBC_DOES = {"MALLOC_ARENA_TEST": "8"}  # its default; any choice of the user's keeps ddpmctl from making its own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10)
    given = parser.parse_args()
    kept, returned = [], []
    for _ in range(given.rounds):
        kept.append(images_per_second(given.seconds, 0, {}))
        returned.append(images_per_second(given.seconds, 0, AS_GLIBC_DOES))
    for name, rates in (("kept", kept), ("returned", returned), ("ratio", [a / b for a, b in zip(kept, returned, strict=True)])):
        print(f"{name:8s} {statistics.median(rates):.2f} ({min(rates):.2f} to {max(rates):.2f})")


if __name__ == "__main__":
    main()
