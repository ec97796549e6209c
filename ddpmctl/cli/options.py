"""Command-line options made from the settings, and which of a setting's sources wins.

flag > environment ``DDPMCTL_*`` > ``--config FILE.toml`` > ``--preset NAME`` > default.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ddpmctl.cli.crash import in_one_line, report
from ddpmctl.cli.signals import Stopped, stop_is_raised
from ddpmctl.cli.terminal import Terminal
from ddpmctl.config import Setting, settings
from ddpmctl.distributed.job import SINGLE, Job, is_single_process, join
from ddpmctl.errors import DdpmctlError, UsageError

Data = Annotated[
    Path | None, typer.Option("--data", envvar="DDPMCTL_DATA", help="Folder in the lab's layout; without it, the embedded benchmark.", show_default=False)
]
SceneCount = Annotated[int | None, typer.Option("--scenes", envvar="DDPMCTL_SCENES", help="Size of the embedded benchmark, three images a scene (all: 6003).")]
ClassifierFile = Annotated[
    Path | None,
    typer.Option("--evaluator", envvar="DDPMCTL_EVALUATOR", help="The lab's classifier or one of ours; else checkpoint.pth in --data, else the built-in one."),
]
ConditionFiles = Annotated[
    list[Path] | None, typer.Option("--conditions", help="JSON list of label lists to score on, instead of the data's; may be repeated.", show_default=False)
]
RunsDir = Annotated[Path, typer.Option("--runs-dir", envvar="DDPMCTL_RUNS_DIR", help="Where runs are kept.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", envvar="DDPMCTL_CONFIG", help="Settings from a TOML file.", show_default=False)]
Assume = Annotated[list[str] | None, typer.Option("--assume", help="Setting of checkpoints that carry none, e.g. act=relu; may be repeated.")]
RUNS = Path("runs")


def command(*sections: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that gives a command an option for every setting of some sections.

    The settings of the command line are passed as ``given``, {flat name: text}. A command that can share its work over the processes of
    torchrun has an argument ``job``. Errors of the user end the process with one line and their exit code; only the first failing rank prints.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(function, eval_str=True)
        own = [p for p in signature.parameters.values() if p.name not in ("given", "job")]
        chosen = [s for section in sections for s in settings(section)]

        @functools.wraps(function)
        def run(**values: Any) -> None:
            given = {s.name: values.pop(s.name) for s in chosen}
            if "given" in signature.parameters:
                values["given"] = {name: value for name, value in given.items() if value is not None}
            job = SINGLE
            try:
                with stop_is_raised():
                    job = join()
                    job.require_one_version()
                    if "job" in signature.parameters:
                        values["job"] = job
                    elif not job.is_single:
                        raise UsageError("torchrun: this command runs in one process; call it without torchrun")
                    function(**values)
            except DdpmctlError as error:
                _tell(job, str(error))
                raise typer.Exit(error.exit_code) from None
            except Stopped as stop:
                # Not where torchrun ends those who are left after another one failed, nor before it is known which of them this is.
                if job.is_leader and job.is_single == is_single_process() and job.claim(stop.words):
                    Terminal().say(stop.words)
                raise typer.Exit(stop.exit_code) from None
            except (typer.Exit, typer.Abort, BrokenPipeError):  # the last one: whoever read our output went away
                raise
            except Exception as error:
                file = report(error)
                where = f"the full traceback is in {file}" if file else "and the traceback could not be written anywhere"
                _tell(job, f"unexpected: {in_one_line(error)}; {where}. Please report it")
                raise typer.Exit(1) from None

        del run.__wrapped__  # typer would read the options of the function inside
        run.__annotations__ = {}
        run.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own), *map(_parameter, chosen)]
        )
        return run

    return decorate


def _tell(job: Job, text: str) -> None:
    """Print an error, unless another process of the job failed first."""
    if job.claim(text):
        Terminal().error(text if job.is_single else f"{job}: {text}")


def _parameter(setting: Setting) -> inspect.Parameter:
    """Return the option of a setting: text, so that every source of it is read and checked by the same code."""
    metavar = {int: "INT", float: "NUMBER", str: "TEXT"}[setting.kind]
    permitted = setting.range_text()
    option = typer.Option(
        setting.flag,
        metavar="NAME" if setting.choices is not None else metavar,
        help=f"{setting.help}{f' ({permitted})' if permitted else ''}",
        show_default=setting.unset if setting.default is None else str(setting.default),
        rich_help_panel=f"{setting.section.capitalize()} settings",
    )
    return inspect.Parameter(setting.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, option])
