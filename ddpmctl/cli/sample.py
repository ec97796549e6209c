"""``ddpmctl sample``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ddpmctl.cli.common import Given, checkpoint_files, ready_pipeline, task_of
from ddpmctl.cli.completion import checkpoints
from ddpmctl.cli.completion import labels as complete_labels
from ddpmctl.cli.options import RUNS, Assume, ConfigFile, Data, RunsDir, command
from ddpmctl.cli.outputs import prepare_output
from ddpmctl.cli.signals import when_stopped
from ddpmctl.cli.terminal import Terminal
from ddpmctl.distributed.job import Job
from ddpmctl.errors import UsageError
from ddpmctl.label_lists import example, parse_labels
from ddpmctl.task import LabelSet

OUT = Path("out")
LONGEST = 150  # bytes of the labels in a file name, which may have 255 in all


class Layout(StrEnum):
    """How the files are named."""

    LABELS = "labels"
    LAB = "lab"


@command("sampling", "device")
def sample(
    given: dict[str, str],
    job: Job,
    labels: Annotated[
        list[str] | None,
        typer.Option(
            "--labels", "-l", help='Objects of one image, e.g. "red cube,blue sphere"; may be repeated.', show_default=False, autocompletion=complete_labels
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Argument(help="A .pth file or a run; else the newest run's best.", show_default=False, autocompletion=checkpoints)
    ] = None,
    conditions: Annotated[
        Path | None,
        typer.Option("--conditions", help="Instead of --labels: test, new_test or heldout of the data, or a JSON list of label lists.", show_default=False),
    ] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, max=10_000, help="Images for each label set.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    layout: Annotated[
        Layout,
        typer.Option(metavar="NAME", help="File names. lab: 0.png, 1.png, ... in the order of the conditions, to hand in; labels: labels, seed and number."),
    ] = Layout.LABELS,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the PNGs and the captioned grid.")] = OUT,
    data: Data = None,
    runs_dir: RunsDir = RUNS,
    config: ConfigFile = None,
    assume: Assume = None,
) -> None:
    """Sample images of the given labels, or of all conditions of a file: those that evaluate scores at the same seed.

    ddpmctl sample --labels "red cube,blue sphere"
    ddpmctl sample runs/NAME -l "cyan cylinder" -l "gray cube" --count 8
    ddpmctl sample runs/NAME --conditions test --layout lab --out images/test
    """
    terminal = Terminal(silent=not job.is_leader)
    name, label_sets = _label_sets(labels, conditions, data, checkpoint, runs_dir)
    chosen = Given.of(given, config, assume)
    if job.is_leader:
        prepare_output(out, "--out", folder=True)

    pipeline = ready_pipeline(checkpoint, runs_dir, chosen, terminal, job)

    from ddpmctl.evaluation.image_files import GRID
    from ddpmctl.grids import save_grid, save_images
    from ddpmctl.sampling.pipeline import sample_images
    from ddpmctl.sampling.requests import requests_for

    requests = requests_for(name, label_sets, seed=seed, repeats=count)
    with when_stopped("no image was written"):
        made = terminal.finish(sample_images(pipeline, requests, job=job))
    if not job.is_leader:
        return
    names = [_file_name(layout, r.labels, *divmod(index, count), count=count, seed=seed) for index, r in enumerate(requests)]
    for path in save_images(out, made, names):
        terminal.result(str(path))
    terminal.result(str(save_grid(out / GRID, made, ["\n".join(r.labels) for r in requests])))


def _label_sets(
    labels: list[str] | None, conditions: Path | None, data: Path | None, checkpoint: Path | None, runs_dir: Path
) -> tuple[str, Sequence[LabelSet]]:
    """Return the label sets, and the name that their noise depends on: that of the condition file, as in ``evaluate``.

    A model of images without labels needs none.

    Raises:
        UsageError, DataError: labels and conditions are both given, or neither, or cannot be used.
    """
    if labels and conditions:
        raise UsageError("--labels: cannot be combined with --conditions")
    task = task_of(checkpoint, runs_dir)
    if not labels and not conditions:
        if not task.classes:
            return "sample", [()]
        raise UsageError(f"--labels is missing; for example: --labels {example(task)}, or all conditions of a file: --conditions test")
    if labels:
        return "sample", parse_labels(labels, task)

    from ddpmctl.data.source import DataSource
    from ddpmctl.interface.choices import known_conditions, named_conditions

    known, _ = known_conditions(DataSource(data), checkpoint_files(checkpoint, runs_dir))
    ((name, sets),) = named_conditions([conditions] if conditions else [], known).items()
    return name, sets


def _file_name(layout: Layout, labels: LabelSet, index: int, copy: int, *, count: int, seed: int) -> str:
    """Return the name of an image of label set ``index``; in the lab's layout one that ``evaluate --images`` reads."""
    if layout is Layout.LABELS:
        words = re.sub(r"[^\w.+=-]+", "-", "+".join(labels) or "image").encode()[:LONGEST].decode(errors="ignore")
        return f"{index:03d}-{words}-seed{seed}-{copy:03d}.png"

    from ddpmctl.evaluation.image_files import ONE, SEVERAL, file_name

    return file_name(ONE if count == 1 else SEVERAL, index, copy)
