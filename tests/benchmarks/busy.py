"""Training speed on an idle machine and beside other busy processes, by the time that OpenMP's threads spin while they wait.

    python -m tests.benchmarks.busy [--rounds 3] [--seconds 15] [--busy 1] [--spin default 0 1000]

Each figure is the median of the rounds, in images per second of preset ``quick`` on the CPU; arrangements are measured in turn.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

TRAIN = """
import sys, time, numpy as np
from ddpmctl.config import Config
from ddpmctl.presets import PRESETS
from ddpmctl.data.dataset import Dataset
from ddpmctl.device import make_compute_device
from ddpmctl.training.trainer import Trainer
config = Config.from_flat({**PRESETS["quick"], "device": "cpu"})
images = np.random.default_rng(0).integers(0, 256, (640, 3, 64, 64), dtype=np.uint8)
trainer = Trainer(config, make_compute_device(config.device), Dataset("", "", images, np.ones((640, 24), np.uint8), {}, None))
for _ in range(5):
    trainer.step()
start, first = time.perf_counter(), trainer.counters.images_seen
while time.perf_counter() - start < float(sys.argv[1]):
    if trainer.epoch_is_over:
        trainer.end_epoch(0.0)
    trainer.step()
print((trainer.counters.images_seen - first) / (time.perf_counter() - start))
"""


def images_per_second(seconds: float, busy: int, changes: dict[str, str]) -> float:
    """Train beside ``busy`` processes that each keep a core busy, with some environment variables changed."""
    environment = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")}
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        made = subprocess.run(
            [sys.executable, "-c", TRAIN, str(seconds)], env={**environment, **changes}, check=True, capture_output=True, text=True
        )  # fmt: skip
        return float(made.stdout)
    finally:
        for other in others:
            other.kill()
            other.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--busy", type=int, default=1, help="processes that each keep a core busy")
    parser.add_argument("--spin", nargs="+", default=["default", "0", "1000"], help="values of GOMP_SPINCOUNT; default: unset")
    given = parser.parse_args()
    arrangements = {f"spin count {value}": {} if value == "default" else {"GOMP_SPINCOUNT": value} for value in given.spin}
    arrangements["one thread"] = {"OMP_NUM_THREADS": "1"}
    rates: dict[tuple[str, int], list[float]] = {}
    for _ in range(given.rounds):
        for name, changes in arrangements.items():
            for busy in (0, given.busy):
                rates.setdefault((name, busy), []).append(images_per_second(given.seconds, busy, changes))
    print(f"| {os.cpu_count()} cores | idle | beside {given.busy} busy |\n| --- | --- | --- |")
    for name in arrangements:
        cells = (f"{statistics.median(of):.0f} ({min(of):.0f}-{max(of):.0f})" for of in (rates[name, 0], rates[name, given.busy]))
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
