"""A data set that is larger than the memory: what training from it costs, beside the same set in memory.

    python -m tests.benchmarks.large [--images 200000] [--memory 1024] [--seconds 60] [--rounds 3] [--out FOLDER]

The limited process may use so many MiB of memory, pages of files that it has read included (a control group of Linux, for which it must be root).
Where there is none, only the memory that the process itself allocates is limited (RLIMIT_DATA). Each rate is the median of the rounds, measured in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.tasks import data

V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")

# Arguments: folder, "map" or "memory", seconds, "train" or "read". Prints images per second and the peak of the process's memory in MiB.
RATE = """
import dataclasses, resource, sys, time
from pathlib import Path
import numpy as np
import torch
from ddpmctl.config import Config
from ddpmctl.presets import PRESETS
from ddpmctl.data.dataset import load_dataset
from ddpmctl.data.source import DataSource
from ddpmctl.device import make_compute_device
from ddpmctl.training.trainer import Trainer
from tests.benchmarks.data import finish
folder, where, seconds, what = sys.argv[1:]
dataset = finish(load_dataset(DataSource(path=Path(folder))))
if where == "memory":
    dataset = dataclasses.replace(dataset, images=np.array(dataset.images))
config = Config.from_flat({**PRESETS["quick"], "device": "cpu"})
trainer = Trainer(config, make_compute_device(config.device), dataset)
order, done = np.random.default_rng(0).permutation(len(dataset.images)), 0
def step():
    global done
    if what == "train":
        trainer.step()
        done += config.training.batch_size
    else:
        trainer.images[torch.from_numpy(order[done % len(order):][:config.training.batch_size])].float().mean()
        done += config.training.batch_size
for _ in range(5):
    step()
start, done = time.perf_counter(), 5 * config.training.batch_size
first = done
while time.perf_counter() - start < float(seconds):
    step()
print((done - first) / (time.perf_counter() - start), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@contextlib.contextmanager
def memory_group(mebibytes: int) -> Iterator[Path | None]:
    """Make a control group with so much memory, for the body; None where that is not possible."""
    group = (V1 if V1.is_dir() else V2) / f"ddpmctl-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if V1.is_dir() else "memory.max")).write_text(str(mebibytes * 2**20))
    except OSError:
        with contextlib.suppress(OSError):
            group.rmdir()
        yield None
        return
    try:
        yield group
    finally:
        group.rmdir()


def run(arguments: list[object], cache: Path, group: Path | None = None, limit: int | None = None) -> str:
    """Run Python in a control group or under a limit, in MiB, and return what it printed; an error ends the benchmark with what it said."""

    def enter() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))
        elif limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit * 2**20, limit * 2**20))

    environment = {**os.environ, "DDPMCTL_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True, check=False, preexec_fn=enter
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{arguments[:6]}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout


def forget(cache: Path) -> None:
    """Have the system forget the pages of the cache's files, so that a limited process is charged for those that it reads."""
    for file in cache.glob("*.npy"):
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    """Write the set, decode it and train under the limit; then measure rates in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--memory", type=int, default=1024, help="MiB of the limited process")
    parser.add_argument("--seconds", type=float, default=60, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmark-large"), help="where the set, the cache and the run are kept")
    given = parser.parse_args()
    place = given.out.resolve()
    folder, cache = place / "images", place / "cache"
    if not (place / "written").exists():
        start = time.perf_counter()
        data.many(folder, given.images)
        (place / "written").touch()
        print(f"{given.images:,} images written in {time.perf_counter() - start:.0f} s", flush=True)
    with memory_group(given.memory) as group:
        print(f"limit: {given.memory} MiB of memory, {'pages of files included' if group else 'allocated by the process (RLIMIT_DATA)'}", flush=True)
        start = time.perf_counter()
        command = ["-m", "ddpmctl", "train", "--preset", "quick", "--data", folder, "--minutes", given.seconds / 60, "--runs-dir", place / "runs"]
        run(command, cache, group, given.memory)
        print(f"ddpmctl train, {given.seconds:.0f} s of training, decoding included if it was not cached: {time.perf_counter() - start:.0f} s", flush=True)
        for what in ("train", "read"):
            rates: dict[str, list[float]] = {"map": [], "memory": []}
            peaks = dict.fromkeys(rates, 0.0)
            for _ in range(given.rounds):
                for where, found in rates.items():
                    forget(cache)
                    limits = (group, given.memory) if where == "map" else (None, None)
                    rate, peak = map(float, run(["-c", RATE, folder, where, given.seconds, what], cache, *limits).split())
                    found.append(rate)
                    peaks[where] = max(peaks[where], peak)
                    print(f"  {what} {where} {rate:.1f} images/s, peak {peak:.0f} MiB", flush=True)
            limited, free = (statistics.median(rates[where]) for where in ("map", "memory"))
            print(f"| {what} | {limited:.1f} | {free:.1f} | {limited / free:.3f} | {peaks['map']:.0f} MiB | {peaks['memory']:.0f} MiB |", flush=True)


if __name__ == "__main__":
    main()
