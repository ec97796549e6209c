"""Results of the command line with fixed settings, as hashes and numbers: weights, images, scores.

    python -m tests.unchanged.behaviour recorded.json

records the results of the current code. Float32 results depend on the processor and on torch, so the record names both; with other
ones only the numbers are compared, with a tolerance.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

COMMON = ["--scenes", "20", "--batch-size", "6", "--save-every", "3", "--epochs", "3", "--device", "cpu", "--precision", "fp32", "--threads", "1"]
MODERN = ["--net", "unet", "--schedule", "cosine", "--timesteps", "100", "--label-dropout", "0.1", "--sampler", "dpm++2m", "--steps", "4"]
# 60 images in batches of 6 are 10 steps an epoch: 30 steps.
RECIPES = {
    "report": ["--width", "8", "--timesteps", "6"],
    "report-cosine": ["--width", "8", "--timesteps", "6", "--schedule", "cosine-periodic", "--act", "relu", "--lr-decay", "linear", "--lr", "0.001"],
    "modern": [
        *MODERN, "--width", "32", "--objective", "x0", "--loss-weight", "snr+1", "--weight-limit", "5", "--optimizer", "muon", "--lr", "0.01",
        "--time-sampling", "logit-normal", "--ema", "0.9", "--guidance", "2", "--act", "silu", "--warmup", "5",
    ],
    "edm": [*MODERN, "--width", "16", "--objective", "edm", "--optimizer", "adamw", "--mirror", "0.5", "--ema", "0.99", "--micro-batch", "4"],
}  # fmt: skip
SAMPLERS = {
    "ddpm": ["--sampler", "ddpm", "--steps", "5"],
    "ddim": ["--sampler", "ddim", "--steps", "5", "--guidance", "1.5"],
    "ddim, eta 0.5": ["--sampler", "ddim", "--steps", "5", "--eta", "0.5", "--spacing", "log-snr"],
    "dpm++2m": ["--sampler", "dpm++2m", "--steps", "5", "--spacing", "karras"],
}
LABELS = ["--labels", "red cube,blue sphere", "--labels", "cyan cylinder"]
DEVICE = ["--device", "cpu", "--precision", "fp32", "--threads", "1"]


def environment() -> dict[str, str]:
    """Return what float32 results depend on apart from the code."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        model = next(line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor()
    return {"processor": model, "capability": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__}


def record(folder: Path) -> dict[str, Any]:
    """Train, sample, evaluate and compare below ``folder``, and return the results."""
    runs = folder / "runs"
    trained = {}
    for name, options in RECIPES.items():
        call("train", *COMMON, *options, "--runs-dir", runs, "--name", name)
        trained[name] = _training(runs / name)
    sampled = {}
    for name, options in SAMPLERS.items():
        out = folder / name
        call("sample", runs / "modern", *LABELS, "-n", 4, *DEVICE, *options, "-o", out)
        sampled[name] = [_pixels(path) for path in sorted(out.glob("0*.png"))]
    call("evaluate", runs / "report", runs / "modern", "--repeats", 2, "--scenes", 20, *DEVICE, "--json", folder / "evaluate.json")
    same = ["--sampler", "ddim", "--steps", "3", "--guidance", "0"]
    call("compare", runs / "report", runs / "modern", *same, "--repeats", 2, *DEVICE, "--json", folder / "compare.json", "-o", folder / "compare.png")
    evaluated, compared = (_plain(json.loads((folder / f"{name}.json").read_text()), folder) for name in ("evaluate", "compare"))
    compared.pop("heldout", None)  # was added after 0.2
    return {"trained": trained, "sampled": sampled, "evaluated": evaluated, "compared": compared}


def call(*arguments: object) -> None:
    """Run one command in this process."""
    from ddpmctl.cli.app import app

    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    if result.exit_code:
        raise RuntimeError(f"{arguments[0]}: {result.output}")


def _training(run: Path) -> dict[str, Any]:
    state = torch.load(run / "state.pt", weights_only=True)
    form = {name: value for name, value in state.items() if name != "config"}  # new settings may be added, with their defaults
    (checkpoint,) = (run / "checkpoints").glob("*.pth")
    counters = {name: value for name, value in state["counters"].items() if "seconds" not in name}
    moments = [{f"{index}.{key}": value for index, of in each["state"].items() for key, value in of.items()} for each in state["optimizers"]]
    return {
        "weights": _digest(state["net"]),
        "ema": None if state["average"] is None else _digest(state["average"]),
        "optimizers": [_digest(each) for each in moments],
        "checkpoint": _digest(torch.load(checkpoint, weights_only=True)["weights"]),
        "outline": hashlib.sha256(json.dumps(_outline(form)).encode()).hexdigest(),
        "counters": counters,
        "file": checkpoint.name,
        "metrics": [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()],
        "sources": json.loads((run / "data.json").read_text()),
    }


def _digest(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        found.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _outline(value: Any) -> Any:
    """Return a state's structure: names, types and shapes, without values that depend on time or path."""
    if isinstance(value, Tensor):
        return [str(value.dtype), list(value.shape)]
    if isinstance(value, Mapping):
        return {str(key): _outline(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_outline(inner) for inner in value]
    return type(value).__name__


def _pixels(path: Path) -> str:
    with Image.open(path) as image:
        return hashlib.sha256(image.tobytes()).hexdigest()


def _plain(value: Any, folder: Path) -> Any:
    """Return a result without paths, file hashes and sentences."""
    if isinstance(value, dict):
        return {key: _plain(inner, folder) for key, inner in value.items() if key not in ("sha256", "sentences")}
    if isinstance(value, list):
        return [_plain(inner, folder) for inner in value]
    return value.replace(str(folder), "") if isinstance(value, str) else value


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        Path(sys.argv[1]).write_text(json.dumps({"environment": environment(), **record(Path(temporary))}, indent=1) + "\n", encoding="utf-8")
