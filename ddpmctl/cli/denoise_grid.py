"""``ddpmctl denoise-grid``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ddpmctl.cli.common import Given, ready_pipeline, task_of
from ddpmctl.cli.completion import checkpoints as complete_checkpoints
from ddpmctl.cli.completion import labels as complete_labels
from ddpmctl.cli.options import RUNS, Assume, ClassifierAlone, ConfigFile, RunsDir, command
from ddpmctl.cli.outputs import prepare_output
from ddpmctl.cli.terminal import Terminal
from ddpmctl.errors import UsageError, visible
from ddpmctl.iclevr import ICLEVR
from ddpmctl.label_lists import parse_labels

if TYPE_CHECKING:
    from ddpmctl.evaluation.classifiers import Classifier
    from ddpmctl.sampling.requests import ImageRequest
    from ddpmctl.sampling.trajectory import RecordedFrame, Trajectory
    from ddpmctl.task import Task

OUT = Path("denoise-grid.png")
COURSE = "red sphere,cyan cylinder,cyan cube"  # the label set of the figure that the course asks for, in at least 8 frames


@command("sampling", "device")
def denoise_grid(
    given: dict[str, str],
    labels: Annotated[
        list[str] | None,
        typer.Option("--labels", "-l", help=f'Objects of one row; may be repeated. Default: "{COURSE}".', show_default=False, autocompletion=complete_labels),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Argument(help="A .pth file or a run; else the newest run's best.", show_default=False, autocompletion=complete_checkpoints)
    ] = None,
    columns: Annotated[int, typer.Option(min=2, max=100, help="Frames to show, from pure noise to the clean image.")] = 10,
    x0: Annotated[bool, typer.Option("--x0", help="Show x0_hat, the predicted clean image, under each row.")] = False,  # noqa: FBT002
    confidence: Annotated[bool, typer.Option(help="With --x0: write the classifier's probability of each label under x0_hat.")] = True,  # noqa: FBT002
    checkpoints: Annotated[
        str | None, typer.Option("--checkpoints", help="Several checkpoints on the same noise, e.g. a.pth,b.pth, one per row.", show_default=False)
    ] = None,
    evaluator: ClassifierAlone = None,
    gif: Annotated[Path | None, typer.Option(help="Also write the steps as a GIF, 60 at most.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    out: Annotated[Path, typer.Option("--out", "-o", help="The PNG file.")] = OUT,
    runs_dir: RunsDir = RUNS,
    config: ConfigFile = None,
    assume: Assume = None,
) -> None:
    """Draw how images are denoised: a row for each label set, a column for each frame, most of them from the steps where objects appear.

    ddpmctl denoise-grid --labels "red cube,blue sphere"
    ddpmctl denoise-grid runs/NAME -l "red sphere" -l "cyan cube" --x0
    ddpmctl denoise-grid -l "red cube" --gif denoising.gif

    With --x0 also x0_hat, the predicted clean image, and under it the classifier's probability of each label.
    """
    terminal = Terminal()
    chosen = Given.of(given, config, assume)
    prepare_output(out, "--out", folder=False, suffix=".png")
    if gif:
        prepare_output(gif, "--gif", folder=False, suffix=".gif")
    named = _named(checkpoint, checkpoints, gif)

    task = task_of(named[0], runs_dir)
    label_sets = parse_labels(labels or [COURSE], task) if labels or task.classes == ICLEVR.classes else [tuple(task.classes[:1])]

    with terminal.busy("loading torch"):
        from ddpmctl.report.denoising import save_denoise_gif, save_denoise_grid
        from ddpmctl.sampling.requests import requests_for
        from ddpmctl.sampling.trajectory import spread

    recorded = _recorded(terminal, named, runs_dir, chosen, requests_for("sample", label_sets, seed=seed))
    times = [frame.t for frame in recorded[0]]
    classifier = _classifier(evaluator, task) if confidence and x0 else None  # its answers are about x0_hat
    trajectories = [
        _trajectory("\n".join([*names, *([visible(one.name)] if one and len(named) > 1 else [])]), names, row, frames, classifier)
        for row, names in enumerate(label_sets)
        for one, frames in zip(named, recorded, strict=True)
    ]
    terminal.result(str(save_denoise_grid(out, times, spread(recorded[0], columns), trajectories, with_x0=x0)))
    if gif:
        titles = ["\n".join(names) for names in label_sets]
        terminal.result(str(save_denoise_gif(gif, recorded[0], titles, with_x0=x0)))


def _named(checkpoint: Path | None, checkpoints: str | None, gif: Path | None) -> list[Path | None]:
    """Return the checkpoints that are named, one for each row; None for the newest run's best.

    Raises:
        UsageError: options that cannot be combined were given.
    """
    if not checkpoints:
        return [checkpoint]
    if checkpoint:
        raise UsageError("--checkpoints: cannot be combined with a checkpoint argument")
    if gif:
        raise UsageError("--gif: cannot be combined with --checkpoints")
    return [Path(part.strip()) for part in checkpoints.split(",")]


def _classifier(named: Path | None, task: Task) -> Classifier | None:
    """Return the classifier of a task, None where there is none."""
    from ddpmctl.evaluation.classifier_file import NoClassifierError
    from ddpmctl.evaluation.classifiers import load_classifier

    with suppress(NoClassifierError):
        return load_classifier(named, task=task) if task.classes else None
    return None


def _recorded(terminal: Terminal, named: list[Path | None], runs_dir: Path, chosen: Given, requests: Sequence[ImageRequest]) -> list[list[RecordedFrame]]:
    """Return the frames of each checkpoint, all from the same noise.

    Raises:
        UsageError: they are sampled at different times, or a checkpoint cannot be used.
    """
    from ddpmctl.sampling.trajectory import record

    recorded: list[list[RecordedFrame]] = []
    for one in named:
        pipeline = ready_pipeline(one, runs_dir, chosen, terminal)
        if not recorded:  # the first checkpoint chooses between particles, so that all have the same noise
            requests = terminal.finish(pipeline.choose(requests))
        recorded.append(terminal.finish(record(pipeline, requests)))
    if any([frame.t for frame in frames] != [frame.t for frame in recorded[0]] for frames in recorded):
        raise UsageError("--checkpoints: they are sampled at different times; give --sampler and --steps for all")
    return recorded


def _trajectory(title: str, labels: tuple[str, ...], row: int, frames: list[RecordedFrame], classifier: Classifier | None) -> Trajectory:
    """Return one image's trajectory, with the classifier's probability of each label in each x0_hat."""
    from ddpmctl.sampling.trajectory import Trajectory

    clean = [None if frame.x0_hat is None else frame.x0_hat[row] for frame in frames]
    notes = [""] * len(frames)
    if classifier is not None:
        import torch

        there = [index for index, image in enumerate(clean) if image is not None]
        images = torch.stack([torch.from_numpy(clean[index]) for index in there]).permute(0, 3, 1, 2).float() / 127.5 - 1
        for index, outputs in zip(there, classifier(images), strict=True):
            notes[index] = "\n".join(f"{label} {100 * float(outputs[classifier.task.index[label]]):.0f}%" for label in labels)
    return Trajectory(title, [frame.x_t[row] for frame in frames], clean, notes)
