"""Fuzz one reader until the time is over.

    python -m tests.benchmarks.fuzz manifest|checkpoint|run|cache|names [--minutes 10] [--seed 0]

Hypothesis draws mutations of valid files: of single bits and byte ranges, of the values in a JSON file, of the headers of a cache entry, of
a checkpoint's pickle, repacked with correct checksums so that the pickle reader is reached, and of its content, opcodes and zip directory;
files and folders of a run that are replaced by something else; and odd names. What each promises stands in its module. Failing examples are
shrunk and printed. The memory of the process is limited to 1 GiB more than at the start.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from .caches import cache_fuzz
from .checkpoints import checkpoint_fuzz
from .limits import limit_memory
from .manifests import manifest_fuzz
from .names import names_fuzz
from .runs import run_fuzz

# Each reader's test, and how many examples are drawn between two checks of the time.
READERS = {"manifest": (manifest_fuzz, 300), "checkpoint": (checkpoint_fuzz, 300), "run": (run_fuzz, 20), "cache": (cache_fuzz, 300), "names": (names_fuzz, 10)}


def main() -> int:
    """Fuzz until the time is over."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", choices=tuple(READERS))
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    given_ = parser.parse_args()
    start, examples, number = time.perf_counter(), 0, given_.seed
    fuzz, many = READERS[given_.reader]
    with tempfile.TemporaryDirectory() as folder:
        test, drawn = fuzz(Path(folder))
        limit_memory(2**30)
        around = settings(max_examples=many, deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink))
        while time.perf_counter() - start < 60 * given_.minutes:
            seed(number)(around(given(*drawn)(test)))()
            examples, number = examples + many, number + 1
    minutes = (time.perf_counter() - start) / 60
    print(f"{given_.reader}: {examples:,} examples in {minutes:.1f} minutes, seeds {given_.seed} to {number - 1}: each as promised")
    return 0


if __name__ == "__main__":
    sys.exit(main())
