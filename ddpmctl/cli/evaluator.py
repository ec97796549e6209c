"""``ddpmctl evaluator train`` and ``ddpmctl evaluator check``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ddpmctl.cli.options import command

app = typer.Typer(help="The classifier that scores images on the embedded benchmark.", no_args_is_help=True)
