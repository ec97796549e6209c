"""The ``ddpmctl`` command and its subcommands; slow imports are inside the commands."""

from __future__ import annotations

from typing import Annotated

import typer

from ddpmctl import __version__
from ddpmctl.cli import compare, data, denoise_grid, evaluate, evaluator, sample, train
from ddpmctl.cli.busy import spin_briefly_beside_others
from ddpmctl.distributed.job import without_teardown

app = typer.Typer(
    name="ddpmctl",
    help="Train, sample, evaluate and compare small conditional diffusion models.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
app.add_typer(data.app, name="data")
app.add_typer(evaluator.app, name="evaluator")


def main() -> None:
    """Run the command line."""
    spin_briefly_beside_others()
    with without_teardown():
        app()
