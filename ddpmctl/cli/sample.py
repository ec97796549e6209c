"""``ddpmctl sample``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ddpmctl.cli.common import Given, parse_labels, prepare_output, ready_pipeline
from ddpmctl.cli.completion import checkpoints
from ddpmctl.cli.completion import labels as complete_labels
from ddpmctl.cli.options import RUNS, Assume, ConfigFile, RunsDir, command
from ddpmctl.cli.signals import when_stopped
from ddpmctl.cli.terminal import Terminal
from ddpmctl.distributed.job import Job

OUT = Path("out")
LONGEST = 150  # characters of the labels in a file name, which may have 255 in all


@command("sampling", "device")
def sample(
    given: dict[str, str],
    job: Job,
    labels: Annotated[
        list[str], typer.Option("--labels", "-l", help='Objects of one image, e.g. "red cube,blue sphere"; may be repeated.', autocompletion=complete_labels)
    ],
    checkpoint: Annotated[
        Path | None, typer.Argument(help="A .pth file or a run; else the newest run's best.", show_default=False, autocompletion=checkpoints)
    ] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, max=10_000, help="Images for each label set.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the PNGs and the captioned grid.")] = OUT,
    runs_dir: RunsDir = RUNS,
    config: ConfigFile = None,
    assume: Assume = None,
) -> None:
    """Sample images of the given labels.

    ddpmctl sample --labels "red cube,blue sphere"
    ddpmctl sample runs/NAME --labels "red cube" --count 8 --out images
    ddpmctl sample runs/NAME -l "cyan cylinder" -l "gray cube" --seed 3
    """
    terminal = Terminal(silent=not job.is_leader)
    label_sets, chosen = parse_labels(labels), Given.of(given, config, assume)
    if job.is_leader:
        prepare_output(out, "--out", folder=True)

    from ddpmctl.grids import save_grid, save_images
    from ddpmctl.sampling.pipeline import requests_for, sample_images

    pipeline = ready_pipeline(checkpoint, runs_dir, chosen, terminal, job)
    requests = requests_for("sample", label_sets, seed=seed, repeats=count)
    with when_stopped("no image was written"):
        made = terminal.finish(sample_images(pipeline, requests, job=job))
    if not job.is_leader:
        return
    names = [f"{index // count:03d}-{'+'.join(r.labels).replace(' ', '-')[:LONGEST]}-seed{seed}-{index % count:03d}.png" for index, r in enumerate(requests)]
    for path in save_images(out, made, names):
        terminal.result(str(path))
    terminal.result(str(save_grid(out / "grid.png", made, [", ".join(r.labels) for r in requests])))
