"""``ddpmctl denoise-grid``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ddpmctl.cli.common import parse_labels, prepare_output, ready_painter
from ddpmctl.cli.options import RUNS, Assume, ConfigFile, RunsDir, command
from ddpmctl.cli.terminal import Terminal

OUT = Path("denoise-grid.png")


@command("sampling", "machine")
def denoise_grid(
    given: dict[str, str],
    labels: Annotated[list[str], typer.Option("--labels", "-l", help='Objects of one row, e.g. "red cube,blue sphere"; may be repeated.')],
    checkpoint: Annotated[Path | None, typer.Argument(help="A .pth file or a run; else the newest run's best.", show_default=False)] = None,
    columns: Annotated[int, typer.Option(min=2, max=100, help="Moments to show, from pure noise to the clean image.")] = 10,
    x0: Annotated[bool, typer.Option("--x0", help="Show under each row what the network takes for the clean image.")] = False,  # noqa: FBT002
    gif: Annotated[Path | None, typer.Option(help="Write every step as a GIF too.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    out: Annotated[Path, typer.Option("--out", "-o", help="The PNG file.")] = OUT,
    runs_dir: RunsDir = RUNS,
    config: ConfigFile = None,
    assume: Assume = None,
) -> None:
    """Show how pictures come out of the noise: rows are label sets, columns are moments."""
    terminal = Terminal()
    label_sets = parse_labels(labels)
    prepare_output(out, "--out", folder=False)
    if gif:
        prepare_output(gif, "--gif", folder=False)

    from ddpmctl.engine.generate import record, requests_for
    from ddpmctl.report.denoising import save_denoise_gif, save_denoise_grid

    painter = ready_painter(checkpoint, runs_dir, given, config, assume, terminal)
    moments = terminal.finish(record(painter, requests_for("sample", label_sets, seed=seed)))
    titles = [", ".join(names) for names in label_sets]
    terminal.result(str(save_denoise_grid(out, moments, titles, columns=columns, with_x0=x0)))
    if gif:
        terminal.result(str(save_denoise_gif(gif, moments, titles, with_x0=x0)))
