"""Speed, and accuracy against training time: our recipes and alternatives, in one command.

    python -m tests.benchmarks.fast [--quick] [--out FOLDER] [--only NAME ...]

The measurements run one after the other, each in its own process, and write JSON files to FOLDER. Existing ones are not measured
again, so an interrupted benchmark can be continued. At the end: a table of targets and a table of
contenders (``table.md``), everything as JSON (``fast.json``) and accuracy over minutes (``accuracy.png``).
Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.benchmarks.tables import PEERS, Figures, plot, processor, table

# The report's schedule and timesteps with our network, which within minutes is accurate enough to show differences between samplers.
REPORT_SCHEDULE = {"schedule": "linear", "timesteps": 400}


@dataclass(frozen=True)
class Job:
    """One measurement: the name of its file, the function in ``jobs.py`` and its arguments."""

    name: str
    function: str
    arguments: Figures = field(default_factory=dict)


def jobs(out: Path, *, quick: bool) -> Iterator[Job]:
    """Yield every measurement in the order in which it runs."""
    long, short, seeds = (0.2, 0.1, 1) if quick else (30.0, 5.0, 3)
    peers = PEERS[1:]
    yield Job("speed", "speed", {"seconds": 0.1 if quick else 6.0, "rounds": 1 if quick else 3, "peers": ["report", *peers[quick:]]})
    thirties, fives = ([f"quick-{minutes}-{seed}" for seed in range(seeds)] for minutes in (30, 5))
    for minutes, names in ((long, thirties), (short, fives)):
        for seed, name in enumerate(names):
            yield Job(name, "accuracy", {"name": "ours", "minutes": minutes, "seed": seed, "out": str(out / f"{name}.pth"), "repeats": 1 if quick else 8})
    settings = {**REPORT_SCHEDULE, **({"timesteps": 40} if quick else {})}
    yield Job("linear", "accuracy", {"name": "ours", "settings": settings, "minutes": short, "seed": 0, "out": str(out / "linear.pth"), "repeats": 1})
    amounts = {"ancestral_repeats": 1 if quick else 4, "repeats": 1 if quick else 16, "timed_steps": 1 if quick else 6, "width": 32 if quick else 128}
    yield Job("sampling", "sampling", {"checkpoint": str(out / "linear.pth"), **amounts})
    yield Job("folder", "folder", {"count": 1 if quick else 4, "of": 20})
    classifier = str(out / "resnet18.pth")
    amounts = {"steps": 5, "scenes": 50, "check_scenes": 20} if quick else {"steps": 2400, "scenes": 12000, "check_scenes": 2000}
    yield Job("second-classifier", "second_classifier", {"out": classifier, **amounts})
    yield Job("second-opinion", "second_opinion", {"classifier": classifier, "images": [str(out / "quick-30-0.npz"), str(out / "quick-5-0.npz")]})
    yield Job("fidelity", "fidelity", {"images": [str(out / f"{run}.npz") for run in thirties + fives]})
    amounts = {"count": 50, "seconds": 1.0} if quick else {"count": 2000, "seconds": 120.0}
    yield Job("two-samples", "two_samples", {"checkpoints": [str(out / "quick-30-0.pth"), str(out / "quick-5-0.pth")], **amounts})
    amounts = {"count": 20, "steps": 5, "scenes": 256} if quick else {"count": 384, "steps": 1500, "scenes": 36000}
    yield Job("faces", "faces", {"checkpoints": [str(out / f"{run}.pth") for run in thirties + fives], **amounts})
    yield Job("start-up", "start_up")
    if on_gpu():
        yield Job("gpu-report", "report_epochs", {"seconds": 5.0 if quick else 60.0, "epochs": 600})
        yield Job("gpu-best", "accuracy", {"name": "ours", "preset": "best", "minutes": 0.2 if quick else 10.0, "seed": 0, "out": str(out / "best-10.pth")})
        yield Job("gpu-best-fidelity", "fidelity", {"images": [str(out / "best-10.npz")]})
    trained = []
    for seed in range(seeds):
        for peer in PEERS if not quick else PEERS[2:]:
            for name, precision in ((f"{peer}-5-{seed}", "fp32"), (f"{peer}-bf16-5-{seed}", "bf16")):
                trained.append(name)
                arguments = {"name": peer, "minutes": short, "seed": seed, "out": str(out / name), "peer_steps": 2 if quick else 20}
                yield Job(name, "accuracy", {**arguments, "peer_precision": precision})
    yield Job("peers-fidelity", "fidelity", {"images": [str(out / f"{name}.npz") for name in trained]})


def on_gpu() -> bool:
    """Return whether the rows that ask for a GPU can be measured here."""
    import torch

    return torch.cuda.is_available()


def run(job: Job, out: Path) -> None:
    """Run one measurement in a fresh process, unless its file is there."""
    path = out / f"{job.name}.json"
    if path.exists():
        return
    print(f"{job.name} ...", flush=True)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "tests.benchmarks.fast", "--job", json.dumps([str(path), job.function, job.arguments])], check=True)
    print(f"{job.name}: {time.perf_counter() - start:.0f} s", flush=True)


def work(path: str, function: str, arguments: Figures) -> None:
    """Do one measurement in this process and write its figures."""
    from tests.benchmarks.jobs import JOBS, peak_memory

    figures = JOBS[function](**arguments)
    figures.setdefault("memory_gib", peak_memory())
    temporary = Path(path + ".part")
    temporary.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    temporary.replace(path)


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="everything in under five minutes, with figures that mean nothing")
    parser.add_argument("--out", type=Path, default=None, help="where the figures are kept (benchmark, or benchmark-quick)")
    parser.add_argument("--only", nargs="*", default=None, help="names of measurements to run, such as speed or quick-30-0")
    parser.add_argument("--job", default=None, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job:
        work(*json.loads(given.job))
        return
    out = given.out or Path("benchmark-quick" if given.quick else "benchmark")
    out.mkdir(parents=True, exist_ok=True)
    todo = list(jobs(out, quick=given.quick))
    for job in todo:
        if given.only is None or job.name in given.only:
            run(job, out)
    names = [job.name for job in todo]
    found = {name: json.loads((out / f"{name}.json").read_text(encoding="utf-8")) for name in names if (out / f"{name}.json").exists()}
    text = table(found, names)
    (out / "table.md").write_text(text, encoding="utf-8")
    (out / "fast.json").write_text(json.dumps({"machine": processor(), **found}, indent=1), encoding="utf-8")
    plot(found, out / "accuracy.png")
    print(text)


if __name__ == "__main__":
    main()
