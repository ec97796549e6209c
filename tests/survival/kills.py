"""Kill a training process repeatedly, and compare the finished run with an uninterrupted one."""

from __future__ import annotations

import csv
import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..conftest import load_tensors

RECIPE = [
    "--width", "8", "--timesteps", "6", "--batch-size", "8", "--precision", "fp32", "--threads", "1", "--device", "cpu", "--scenes", "16",
    "--optimizer", "adamw", "--ema", "0.9", "--label-dropout", "0.1", "--sampler", "ddim", "--steps", "2", "--save-every", "5",
]  # fmt: skip
DELAY_SECONDS = 2.5  # after the process has locked its run; it then loads data and state, and trains


@dataclass
class Tally:
    """Counts of what the kills interrupted."""

    kills: int = 0
    while_starting: int = 0
    with_temporaries: int = 0  # a file was being written or renamed
    steps: list[int] = field(default_factory=list)  # of the state, after each kill


def start(runs: Path, *, resume: bool, epochs: int) -> subprocess.Popen[bytes]:
    """Start or resume training."""
    command = ["--resume", str(runs / "r")] if resume else [*RECIPE, "--epochs", str(epochs), "--runs-dir", str(runs), "--name", "r"]
    around = ["--checkpoint-minutes", "0.004"]
    with (runs / "stderr.txt").open("ab") as errors:
        return subprocess.Popen([sys.executable, "-m", "ddpmctl", "train", *command, *around], stdout=subprocess.DEVNULL, stderr=errors)


def whole(runs: Path, epochs: int) -> Path:
    """Train without interruption and return the run's folder."""
    runs.mkdir(parents=True, exist_ok=True)
    with start(runs, resume=False, epochs=epochs) as process:
        assert process.wait(600) == 0, (runs / "stderr.txt").read_text()
    return runs / "r"


def killed(runs: Path, epochs: int, kills: int, number: signal.Signals, rng: random.Random) -> tuple[Path, Tally]:
    """Train with kills at random times, half of them while a file is written, and then to the end; return folder and tally."""
    runs.mkdir(parents=True, exist_ok=True)
    run, tally = runs / "r", Tally()
    while tally.kills < kills:
        with start(runs, resume=(run / "config.toml").is_file(), epochs=epochs) as process:
            _wait_for_the_moment(process, run, rng, tally)
            if process.poll() is not None:
                assert process.returncode == 0, (runs / "stderr.txt").read_text()[-3000:]
                raise AssertionError(f"the run was over after {tally.kills} kills of {kills}: give it more epochs")
            tally.with_temporaries += any(run.rglob(".*.tmp"))
            process.send_signal(number)
            code = process.wait(120)
            assert code in ((-number,) if number == signal.SIGKILL else (-number, 128 + number)), (code, (runs / "stderr.txt").read_text()[-3000:])
        tally.kills += 1
        if (run / "state.pt").exists():
            tally.steps.append(load_tensors(run / "state.pt")[0]["counters"]["step"])
    with start(runs, resume=(run / "config.toml").is_file(), epochs=epochs) as process:
        assert process.wait(600) == 0, (runs / "stderr.txt").read_text()[-3000:]
    assert "Traceback" not in (runs / "stderr.txt").read_text()
    return run, tally


def _wait_for_the_moment(process: subprocess.Popen[bytes], run: Path, rng: random.Random, tally: Tally) -> None:
    kind = rng.choice(("starting", "anywhere", "anywhere", "writing", "writing", "writing"))
    if kind == "starting":
        tally.while_starting += 1
        time.sleep(rng.uniform(0, 3))
        return
    while process.poll() is None and not (run / ".holder").exists():
        time.sleep(0.005)
    until = time.monotonic() + rng.uniform(0, DELAY_SECONDS)
    while process.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
    if kind == "writing":
        # Not always at the first file, so that there is progress that must be neither lost nor repeated.
        until, wanted, begun = time.monotonic() + 10, rng.randint(1, 8), set[str]()
        while process.poll() is None and time.monotonic() < until and len(begun) < wanted:
            begun |= {file.name for folder in (run, run / "checkpoints") for file in folder.glob(".*.tmp")}
            time.sleep(0.0002)
        time.sleep(rng.choice((0, 0.0005, 0.002, 0.005)))


def differences(one: Path, other: Path) -> list[str]:
    """Return the parts of two runs of the same settings that are not bytewise equal, apart from times."""
    found = []
    states = [load_tensors(run / "state.pt")[0] for run in (one, other)]
    for part in ("net", "average", "optimizers"):
        tensors = [_flat(state[part]) for state in states]
        found += [f"state {part}"] * (tensors[0].keys() != tensors[1].keys() or any(tensors[0][k] != tensors[1][k] for k in tensors[0]))
    counters = [{name: value for name, value in state["counters"].items() if "seconds" not in name} for state in states]
    found += [f"counters {counters}"] * (counters[0] != counters[1])
    found += ["metrics.jsonl"] * ((one / "metrics.jsonl").read_bytes() != (other / "metrics.jsonl").read_bytes())
    rows = []
    for run in (one, other):
        with (run / "results.csv").open(newline="") as file:
            rows.append([{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)])
    found += ["results.csv"] * (rows[0] != rows[1])
    timed = [[(row["event"], row["step"]) for row in map(json.loads, (run / "timing.jsonl").read_text().splitlines())] for run in (one, other)]
    found += ["timing.jsonl"] * (timed[0] != timed[1])
    names = [sorted(str(file.relative_to(run)) for file in run.rglob("*") if file.is_file() and file.name != ".lock") for run in (one, other)]
    found += [f"files {set(names[0]) ^ set(names[1])}"] * (names[0] != names[1])
    for file in (one / "checkpoints").iterdir():
        weights = [_flat(load_tensors(run / "checkpoints" / file.name)[0]["weights"]) for run in (one, other) if (run / "checkpoints" / file.name).exists()]
        found += [file.name] * (len(weights) == 2 and weights[0] != weights[1])
    return found


def _flat(value: object, name: str = "") -> dict[str, bytes | object]:
    """Return the leaves of nested containers by path, tensors as their bytes."""
    if isinstance(value, torch.Tensor):
        return {name: (tuple(value.shape), value.contiguous().flatten().view(torch.uint8).numpy().tobytes() if value.ndim else value.item())}
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{name}/{key}").items()}
    if isinstance(value, (list, tuple)):
        return {k: v for key, inner in enumerate(value) for k, v in _flat(inner, f"{name}/{key}").items()}
    return {name: value}
