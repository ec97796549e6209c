"""Start-up times: --help, rendering, a cached start, an evaluation whose results are cached, the built-in evaluator.

    python tests/benchmarks/startup.py

Each figure is the median of several whole runs, beside a bare interpreter or a bare ``import torch`` in the same run.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time

LOAD = """
import time
from ddpmctl.data.dataset import load_dataset
start = time.perf_counter()
task = load_dataset(None)
try:
    while True: next(task)
except StopIteration as end:
    assert end.value.images.shape == (18009, 3, 64, 64)
print(time.perf_counter() - start)
"""
SCORE = """
import time, torch
from ddpmctl.evaluation.classifiers import load_classifier
classifier, images = load_classifier(), torch.randn(512, 3, 64, 64).clamp(-1, 1)
classifier(images)
start = time.perf_counter()
classifier(images)
print((time.perf_counter() - start) / 512 * 1000)
"""

CHECKPOINT = """
import sys
from pathlib import Path
from ddpmctl.checkpoints.format import save_checkpoint
from ddpmctl.config import Config
from ddpmctl.presets import PRESETS
from ddpmctl.training.trainer import make_network
config = Config().replace(**PRESETS["quick"])
save_checkpoint(Path(sys.argv[1]), config, make_network(config).state_dict(), epoch=1)
"""


def wall(code: list[str], environment: dict[str, str], runs: int = 5) -> float:
    """Return the median wall time of a command in seconds, after one run that is not counted."""
    seconds = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        subprocess.run([sys.executable, *code], env=environment, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def printed(code: str, environment: dict[str, str]) -> float:
    """Return the number that a program prints."""
    return float(subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True).stdout)


def measure() -> dict[str, float]:
    """Return every figure, in seconds, and for the evaluator in milliseconds an image."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "DDPMCTL_CACHE_DIR": cache}
        checkpoint = os.path.join(cache, "quick.pth")  # its weights are random, which does not matter here
        subprocess.run([sys.executable, "-c", CHECKPOINT, checkpoint], env=environment, check=True)
        return {
            "bare interpreter, s": wall(["-c", "pass"], environment),
            "import torch, s": wall(["-c", "import torch"], environment, 3),
            "ddpmctl --help, s": wall(["-m", "ddpmctl", "--help"], environment),
            "ddpmctl train --help, s": wall(["-m", "ddpmctl", "train", "--help"], environment),
            "evaluate, all from cache, s": wall(["-m", "ddpmctl", "evaluate", checkpoint, "--particles", "1", "--steps", "2"], environment),
            "18,009 images, rendered, s": printed(LOAD, environment),
            "18,009 images, from cache, s": statistics.median(printed(LOAD, environment) for _ in range(5)),
            "built-in evaluator, ms an image": printed(SCORE, environment),
        }


if __name__ == "__main__":
    for name, figure in measure().items():
        print(f"{name:32}{figure:8.2f}")
