"""Training and evaluation over processes under torchrun, compared with one process, and a model of many GPUs.

    python -m tests.benchmarks.scaling [--ranks 1 2] [--presets quick report] [--rounds 3] [--seconds 20] [--evaluations 4] [--json FILE]

On CPUs each process has one thread, so that n processes have n cores; one process with all threads is measured too. On GPUs each has one.
Arrangements are measured in turn, round after round; each figure is the median. *Strong*: the batch as configured, shared. *Weak*: the
configured batch for each process. The measured and the assumed values of the model are printed with it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from ddpmctl.checkpoints.format import save_checkpoint
from ddpmctl.config import Config
from ddpmctl.data.dataset import Dataset
from ddpmctl.device import make_compute_device
from ddpmctl.distributed.job import join, without_teardown
from ddpmctl.distributed.replicas import replicas
from ddpmctl.presets import PRESETS
from ddpmctl.sampling.pipeline import SamplingPipeline
from ddpmctl.sampling.requests import requests_for
from ddpmctl.training.trainer import Trainer, make_network
from tests.benchmarks.data import benchmark_data

REDUCED = (3_000_000, 10_000_000, 30_000_000)  # parameters
EVALUATED = "quick"
IMAGES = 18_009  # in i-CLEVR


# In each process


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def steps_per_second(trainer: Trainer, seconds: float) -> float:
    """Train for about so long, at least three steps, after two that are not counted."""
    for _ in range(2):
        trainer.step()
    synchronize()
    begun, first = time.perf_counter(), trainer.counters.step
    # All ranks must take the same number of steps, so they use rank 0's time, which every step sends to all ranks.
    clock = trainer.counters.seconds
    while trainer.counters.seconds - clock < seconds or trainer.counters.step - first < 3:
        if trainer.epoch_is_over:
            trainer.end_epoch(trainer.mean_loss("epoch"))
        trainer.step()
    synchronize()
    return (trainer.counters.step - first) / (time.perf_counter() - begun)


def reducing_ms(parameters: int, device: torch.device, group: Any, times: int = 10) -> float:
    values = torch.ones(parameters, device=device)
    seconds = []
    for _ in range(times):
        synchronize()
        start = time.perf_counter()
        dist.all_reduce(values, group=group)
        synchronize()
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds)


class Launches(TorchDispatchMode):
    """Counts operations that would start work on a GPU: all but views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not getattr(func, "is_view", False)
        return func(*args, **(kwargs or {}))


def work(preset: str, seconds: float, batch_size: int | None) -> dict[str, Any]:
    """Measure this process's part and return rank 0's figures."""
    data: Dataset = benchmark_data()
    with nullcontext(join()) as job:
        config = Config.from_flat(dict(PRESETS[preset]))
        config = config.replace(batch_size=batch_size or config.training.batch_size)
        compute = make_compute_device(config.device, job.local)
        with replicas(job, compute.device) as together:
            trainer = Trainer(config, compute, data, replicas=together)
            rate = steps_per_second(trainer, seconds)
            return {
                "images_per_second": rate * config.training.batch_size, "ms": 1000 / rate, "batch_size": config.training.batch_size,
                "parameters": sum(p.numel() for p in trainer.net.parameters()), "device": compute.describe(),
                "reducing_ms": {} if job.is_single else {str(count): reducing_ms(count, compute.device, together.group) for count in REDUCED},
            }  # fmt: skip


# The arrangements


def launched(count: int, threads: int, module: str, *arguments: object, cache: str | None = None) -> tuple[str, float]:
    """Run a module in so many processes; return what it printed, and the seconds from start to end."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if cache is not None:
        environment["DDPMCTL_CACHE_DIR"] = cache
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    start = time.perf_counter()
    command = [sys.executable, *launcher, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return done.stdout, time.perf_counter() - start


def arrangements(counts: Sequence[int], cuda: bool) -> dict[str, tuple[int, int]]:
    """Return name -> (processes, threads in each)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cuda:
        return {f"{n} GPU{'s' if n > 1 else ''}": (n, max(1, cores // n)) for n in counts}
    return {f"{n} x 1 thread": (n, 1) for n in counts} | {f"1 x {cores} threads": (1, cores)}


def training(preset: str, places: dict[str, tuple[int, int]], rounds: int, seconds: float) -> dict[str, Any]:
    usual = Config.from_flat(dict(PRESETS[preset])).training.batch_size
    found: dict[str, list[dict[str, Any]]] = {}
    for _ in range(rounds):
        for name, (count, threads) in places.items():
            for kind, size in (("strong", usual), ("weak", usual * count)):
                if kind == "weak" and count == 1:
                    continue
                out, _ = launched(count, threads, "tests.benchmarks.scaling", "--work", preset, "--seconds", seconds, "--batch-size", size)
                found.setdefault(f"{name}, {kind}" if count > 1 else name, []).append(json.loads(out.splitlines()[-1]))
    rates = {name: statistics.median(run["images_per_second"] for run in runs) for name, runs in found.items()}
    one = rates[next(iter(places))]
    rows = {
        name: {
            "images_per_second": rates[name], "of_one": rates[name] / one, "batch_size": runs[0]["batch_size"],
            "spread": [min(run["images_per_second"] for run in runs), max(run["images_per_second"] for run in runs)],
            "reducing_ms": {count: statistics.median(run["reducing_ms"][count] for run in runs) for count in runs[0]["reducing_ms"]},
        }
        for name, runs in found.items()
    }  # fmt: skip
    return {"parameters": next(iter(found.values()))[0]["parameters"], "device": next(iter(found.values()))[0]["device"], "rows": rows}


def evaluation(places: dict[str, tuple[int, int]], rounds: int, checkpoints: int) -> dict[str, Any]:
    """Time the whole command on checkpoints with untrained weights: start-up, sampling, scoring."""
    config = Config.from_flat(dict(PRESETS[EVALUATED]))
    seconds: dict[str, list[float]] = {}
    tables: dict[str, set[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "c").mkdir()
        for seed in range(checkpoints):
            weights = {name: value.contiguous() for name, value in make_network(config.replace(seed=seed)).state_dict().items()}
            save_checkpoint(Path(folder) / "c" / f"epoch{seed}_0.1_0.1.pth", config, weights, epoch=seed)
        for number in range(rounds):
            for name, (count, threads) in places.items():
                # A new cache each time, so that cached results are not used.
                arguments = ("evaluate", Path(folder) / "c", "--precision", "bf16" if torch.cuda.is_available() else "auto", "--json", "-")
                out, spent = launched(count, threads, "ddpmctl", *arguments, cache=f"{folder}/cache {number} {name}")
                seconds.setdefault(name, []).append(spent)
                tables.setdefault("1 thread" if threads == 1 else "threads", set()).add(out)
    times = {name: statistics.median(values) for name, values in seconds.items()}
    one = times[next(iter(places))]
    same = all(len(found) == 1 for found in tables.values())
    return {"checkpoints": checkpoints, "same tables": same, "rows": {name: {"seconds": value, "of_one": one / value} for name, value in times.items()}}


# The model of many GPUs


class Assumed:
    """Values of the model from data sheets and common practice, which were not measured; all others are counted."""

    flops = 0.35 * 989e12  # H200, dense bf16, at a share that convolutions reach
    launch = 6e-6  # seconds from one kernel to the next, without CUDA graphs
    inside = 300e9  # bytes/s of an all-reduce's ring within a machine of 8 (NVLink)
    between = 40e9  # bytes/s for each GPU between machines (400 Gbit/s)
    hop = 10e-6  # seconds a step of the ring
    normal = 2e11  # normal numbers/s


def counted(preset: str) -> dict[str, float]:
    """Count the work of one step (FLOPs an image and those of the optimizer, operations) and of one step of sampling."""
    from torch.utils.flop_counter import FlopCounterMode

    data, flops, launches = benchmark_data(), {}, Launches()
    for size in (2, 4):
        config = Config.from_flat({**PRESETS[preset], "device": "cpu", "precision": "fp32", "batch_size": size, "epochs": 1, "minutes": None})
        trainer = Trainer(config, make_compute_device(config.device), data)
        trainer.step()
        launches = Launches()
        with FlopCounterMode(display=False) as counter, launches:
            trainer.step()
        flops[size] = counter.get_total_flops()
    image = (flops[4] - flops[2]) / 2
    net = trainer.sampling_network().requires_grad_(requires_grad=False)  # torch's counter cannot follow parameters in inference mode
    pipeline = SamplingPipeline(net, trainer.diffusion, config.sampling, trainer.compute)
    frames = pipeline.frames(requests_for("test", data.conditions["test"][:2], seed=0))
    next(frames)  # noise
    sampling = Launches()
    with FlopCounterMode(display=False) as counter, sampling:
        next(frames)
    usual = Config.from_flat(dict(PRESETS[preset])).training
    return {
        "flops": image, "fixed_flops": flops[2] - 2 * image, "launches": launches.count, "parameters": sum(p.numel() for p in trainer.net.parameters()),
        "batch_size": usual.batch_size,
        "save_every": usual.save_every, "sampling_flops": counter.get_total_flops() / 2, "sampling_launches": sampling.count, "sampling_calls": pipeline.nfe,
    }  # fmt: skip


def predicted(work: dict[str, float], gpus: int, batch: int) -> dict[str, float]:
    """Return the seconds of a step and of its parts; the all-reduce is assumed not to overlap with other work."""
    computing = (work["flops"] * batch / gpus + work["fixed_flops"]) / Assumed.flops
    launching = work["launches"] * Assumed.launch
    width = Assumed.inside if gpus <= 8 else Assumed.between
    reducing = 0.0 if gpus == 1 else 2 * (gpus - 1) / gpus * 4 * work["parameters"] / width + 2 * (gpus - 1) * Assumed.hop
    drawing = batch * 3 * 64 * 64 / Assumed.normal  # every rank draws the whole batch's noise
    step = max(computing, launching) + reducing + drawing
    # Rank 0 scores a checkpoint on 64 conditions in one batch, and the others wait.
    scoring = work["sampling_calls"] * max(64 * work["sampling_flops"] / Assumed.flops, work["sampling_launches"] * Assumed.launch)
    training = step * IMAGES / batch * work["save_every"]
    return {
        "computing": computing, "launching": launching, "reducing": reducing, "drawing": drawing, "images_per_second": batch / step,
        "scoring": scoring, "scoring_share": scoring / (scoring + training),
    }  # fmt: skip


def model_table(preset: str) -> list[str]:
    """Return the model's predictions for a preset, as Markdown."""
    known = counted(preset)
    usual = int(known["batch_size"])
    scoring = predicted(known, 1, usual)["scoring"]
    lines = [
        f"{preset}: {known['flops'] / 1e9:.1f} GFLOP an image and {known['fixed_flops'] / 1e9:.1f} in the optimizer, "
        f"{known['launches']:.0f} operations a step, {known['parameters'] / 1e6:.1f} M parameters "
        f"({4 * known['parameters'] / 1e6:.0f} MB of gradients); a score of 64 images in {known['sampling_calls']:.0f} network calls of "
        f"{known['sampling_launches']:.0f} operations takes {scoring:.2f} s, every {known['save_every']:.0f} epochs of {IMAGES:,} images",
        "",
        "| GPUs | batch | computing, ms | launching, ms | all-reduce, ms | noise, ms | images/s | of one | waiting for scores |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    one = predicted(known, 1, usual)["images_per_second"]
    for gpus, batch in ((1, usual), (8, usual), (64, usual), (8, 8 * usual), (64, 64 * usual)):
        if batch >= gpus:
            t = predicted(known, gpus, batch)
            parts = " | ".join(f"{1000 * t[name]:.2f}" for name in ("computing", "launching", "reducing", "drawing"))
            rate = t["images_per_second"]
            lines.append(f"| {gpus} | {batch:,} | {parts} | {rate:,.0f} | {rate / one:.1f} x | {t['scoring_share']:.0%} |")
    return lines


def main() -> None:
    """Measure and print Markdown."""
    with without_teardown():
        _main()


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+")
    parser.add_argument("--presets", nargs="+", default=["quick", "report"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--evaluations", type=int, default=4, help="checkpoints to evaluate; 0: none")
    parser.add_argument("--model-only", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--batch-size", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        figures = work(given.work, given.seconds, given.batch_size)
        if int(os.environ.get("RANK", "0")) == 0:
            print(json.dumps(figures))
        return
    found: dict[str, Any] = {}
    if not given.model_only:
        cuda = torch.cuda.is_available()
        counts = given.ranks or ([n for n in (1, 2, 4, 8) if n <= torch.cuda.device_count()] if cuda else [1, 2])
        places = arrangements(counts, cuda)
        for preset in given.presets:
            found[preset] = figures = training(preset, places, given.rounds, given.seconds)
            print(f"\n{preset} ({figures['parameters'] / 1e6:.1f} M parameters), {figures['device']}\n")
            print("| training | batch | images/s | least and most | of the first |\n| --- | --- | --- | --- | --- |")
            for name, row in figures["rows"].items():
                low, high = row["spread"]
                print(f"| {name} | {row['batch_size']} | {row['images_per_second']:.1f} | {low:.1f} - {high:.1f} | {row['of_one']:.2f} x |", flush=True)
            reducing = {name: row["reducing_ms"] for name, row in figures["rows"].items() if row["reducing_ms"]}
            for name, times in reducing.items():
                message = ", ".join(f"{int(count) / 1e6:.0f} M {ms:.1f} ms" for count, ms in times.items())
                print(f"\nall-reduce of float32 alone, {name}: {message}", flush=True)
        if given.evaluations:
            found["evaluation"] = evaluation(places, given.rounds, given.evaluations)
            print(f"\n| evaluate, {given.evaluations} checkpoints of {EVALUATED}, whole command | seconds | of the first |\n| --- | --- | --- |")
            for name, row in found["evaluation"]["rows"].items():
                print(f"| {name} | {row['seconds']:.1f} | {row['of_one']:.2f} x |")
            print("\ntables: " + ("the same" if found["evaluation"]["same tables"] else "NOT the same"), flush=True)
    for preset in (*given.presets, "best") if "best" not in given.presets else given.presets:
        print("\n" + "\n".join(model_table(preset)), flush=True)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
