"""The ``ddpmctl`` command and its subcommands; slow imports are inside the commands."""

from __future__ import annotations

from typing import Annotated

import typer

from ddpmctl import __version__
from ddpmctl.cli import compare, data, denoise_grid, evaluate, evaluator, export, runs, sample, show, train
from ddpmctl.cli.busy import spin_briefly_beside_others
from ddpmctl.cli.commands import App
from ddpmctl.distributed.job import without_teardown

HELP = """Train, sample, evaluate and compare small conditional diffusion models.

ddpmctl train --preset quick
ddpmctl sample --labels "red cube,blue sphere"
ddpmctl evaluate

Without a checkpoint, a command takes the best one of the newest run; before any training, the model that comes with ddpmctl
(its name is pretrained). ddpmctl COMMAND --help says what a command does.
Options that show [env: ...] can stand in that environment variable. Exit codes: 2 is a wrong command line, 3 a file that cannot be used.
"""
app = App(name="ddpmctl", help=HELP, pretty_exceptions_show_locals=False)


def _version(wanted: bool) -> None:  # noqa: FBT001 - called by typer
    if wanted:
        typer.echo(f"ddpmctl {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")] = False,  # noqa: FBT002
) -> None:
    """Train, sample, evaluate and compare small conditional diffusion models."""


app.command("train")(train.train)
app.command("sample")(sample.sample)
app.command("evaluate")(evaluate.evaluate)
app.command("denoise-grid")(denoise_grid.denoise_grid)
app.command("compare")(compare.compare)
app.command("show")(show.show)
app.command("export")(export.export)
app.add_typer(runs.app, name="runs")
app.add_typer(data.app, name="data")
app.add_typer(evaluator.app, name="evaluator")


def main() -> None:
    """Run the command line."""
    spin_briefly_beside_others()
    with without_teardown():
        app()
