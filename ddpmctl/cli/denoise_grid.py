"""``ddpmctl denoise-grid``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ddpmctl.cli.common import parse_labels, prepare_output, ready_painter
from ddpmctl.cli.options import RUNS, Assume, ConfigFile, EvaluatorFile, RunsDir, command
from ddpmctl.cli.terminal import Terminal
from ddpmctl.errors import UsageError

if TYPE_CHECKING:
    from ddpmctl.evaluation.classifiers import Evaluator
    from ddpmctl.sampling.trajectory import Moment, Way

OUT = Path("denoise-grid.png")


@command("sampling", "machine")
def denoise_grid(
    given: dict[str, str],
    labels: Annotated[list[str], typer.Option("--labels", "-l", help='Objects of one row, e.g. "red cube,blue sphere"; may be repeated.')],
    checkpoint: Annotated[Path | None, typer.Argument(help="A .pth file or a run; else the newest run's best.", show_default=False)] = None,
    columns: Annotated[int, typer.Option(min=2, max=100, help="Moments to show, from pure noise to the clean image.")] = 10,
    x0: Annotated[bool, typer.Option("--x0", help="Show under each row what the network takes for the clean image.")] = False,  # noqa: FBT002
    confidence: Annotated[bool, typer.Option(help="Write the classifier's confidence in each label under each frame.")] = True,  # noqa: FBT002
    checkpoints: Annotated[
        str | None, typer.Option("--checkpoints", help="Several checkpoints on the same noise, e.g. a.pth,b.pth, each in a row.", show_default=False)
    ] = None,
    evaluator: EvaluatorFile = None,
    gif: Annotated[Path | None, typer.Option(help="Write every step as a GIF too.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    out: Annotated[Path, typer.Option("--out", "-o", help="The PNG file.")] = OUT,
    runs_dir: RunsDir = RUNS,
    config: ConfigFile = None,
    assume: Assume = None,
) -> None:
    """Show how pictures come out of the noise: rows are label sets, columns are moments.

    Under each frame stands how sure the classifier is of each object in what the network takes for the clean image.
    """
    terminal = Terminal()
    label_sets = parse_labels(labels)
    prepare_output(out, "--out", folder=False)
    if gif:
        prepare_output(gif, "--gif", folder=False)
    if checkpoint and checkpoints:
        raise UsageError("--checkpoints: names the checkpoints, so none goes before the options")
    if gif and checkpoints:
        raise UsageError("--gif: shows one checkpoint; leave out --checkpoints, or the GIF")
    named: list[Path | None] = [Path(part.strip()) for part in checkpoints.split(",")] if checkpoints else [checkpoint]

    from ddpmctl.report.denoising import save_denoise_gif, save_denoise_grid
    from ddpmctl.sampling.pipeline import requests_for
    from ddpmctl.sampling.trajectory import record

    recorded: list[list[Moment]] = []
    for one in named:
        painter = ready_painter(one, runs_dir, given, config, assume, terminal)
        recorded.append(terminal.finish(record(painter, requests_for("sample", label_sets, seed=seed))))
    times = [moment.t for moment in recorded[0]]
    if any([moment.t for moment in moments] != times for moments in recorded):
        raise UsageError("--checkpoints: they are sampled at different moments; give all the same --sampler and --steps")
    judge = _judge(evaluator) if confidence else None
    ways = [
        _way(", ".join([*names, *([one.name] if one and len(named) > 1 else [])]), names, row, moments, judge)
        for row, names in enumerate(label_sets)
        for one, moments in zip(named, recorded, strict=True)
    ]
    terminal.result(str(save_denoise_grid(out, times, ways, columns=columns, with_x0=x0)))
    if gif:
        titles = [", ".join(names) for names in label_sets]
        terminal.result(str(save_denoise_gif(gif, recorded[0], titles, with_x0=x0)))


def _judge(evaluator: Path | None) -> Evaluator:
    from ddpmctl.evaluation.classifiers import load_evaluator

    return load_evaluator(evaluator)


def _way(title: str, labels: tuple[str, ...], row: int, moments: list[Moment], judge: Evaluator | None) -> Way:
    """Return one picture's way, with the classifier's confidence in each label at each moment that has an x0_hat."""
    from ddpmctl.sampling.trajectory import Way

    clean = [None if moment.x0_hat is None else moment.x0_hat[row] for moment in moments]
    notes = [""] * len(moments)
    if judge is not None:
        import torch

        from ddpmctl.labels import class_index

        there = [index for index, picture in enumerate(clean) if picture is not None]
        images = torch.stack([torch.from_numpy(clean[index]) for index in there]).permute(0, 3, 1, 2).float() / 127.5 - 1
        for index, outputs in zip(there, judge(images), strict=True):
            notes[index] = ",".join(f"{label} {100 * float(outputs[class_index(label)]):.0f}%" for label in labels)
    return Way(title, [moment.x_t[row] for moment in moments], clean, notes)
