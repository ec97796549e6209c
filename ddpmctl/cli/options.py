"""Command-line options made from the settings, and which of a setting's sources wins.

flag > environment ``DDPMCTL_*`` > ``--config FILE.toml`` > ``--preset NAME`` > default.
"""

from __future__ import annotations

import copy
import functools
import inspect
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ddpmctl.cli.completion import one_of
from ddpmctl.cli.execution import execute
from ddpmctl.config import Setting, check_range, range_words, settings
from ddpmctl.distributed.job import Job
from ddpmctl.errors import UsageError

FILES = "Files and folders, where they are not the usual ones"
OUTPUTS = "Files to write, for a report or another program"
RESUMING = "Going on with a run that stopped or ended"
PANELS = {
    "model": "Network, for another one than the preset's",
    "diffusion": "Diffusion, for another noise schedule or objective",
    "training": "Training, for another recipe than the preset's",
    "sampling": "Sampling, for the scores in training; checkpoints keep these settings",
    "device": "Machine, where the automatic choice is not the best",
    "run": "Long runs, and machines that may stop them",
}
CHECKPOINTS_OWN = "Sampling, where the checkpoint's own settings are not wanted"
METAVARS = {int: "INT", float: "NUMBER", str: "TEXT", Path: "PATH"}

Data = Annotated[
    Path | None, typer.Option("--data", envvar="DDPMCTL_DATA", help="Folder or zip file of images; without it, the embedded benchmark.", show_default=False)
]
SceneCount = Annotated[
    int | None,
    typer.Option("--scenes", envvar="DDPMCTL_SCENES", help="Size of the embedded benchmark, three images a scene (all: 6003).", rich_help_panel=FILES),
]
ClassifierFile = Annotated[
    Path | None,
    typer.Option(
        "--evaluator",
        envvar="DDPMCTL_EVALUATOR",
        help="The lab's classifier or one of ours; else checkpoint.pth in the data's folder, else the built-in one.",
        rich_help_panel=FILES,
    ),
]
ClassifierAlone = Annotated[  # of a command without data
    Path | None,
    typer.Option("--evaluator", envvar="DDPMCTL_EVALUATOR", help="The lab's classifier or one of ours; else the built-in one.", rich_help_panel=FILES),
]
ConditionFiles = Annotated[
    list[Path] | None,
    typer.Option(
        "--conditions", help="test, new_test or heldout of the data, or a JSON list of label lists; may be repeated.", show_default=False, rich_help_panel=FILES
    ),
]
RunsDir = Annotated[Path, typer.Option("--runs-dir", envvar="DDPMCTL_RUNS_DIR", help="Where runs are kept.", rich_help_panel=FILES)]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", envvar="DDPMCTL_CONFIG", help="Settings from a TOML file.", show_default=False, rich_help_panel=FILES)
]
Assume = Annotated[
    list[str] | None, typer.Option("--assume", help="Setting of checkpoints that carry none, e.g. act=relu; may be repeated.", rich_help_panel=FILES)
]
RUNS = Path("runs")


def command(*sections: str, first: Sequence[str] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that gives a command an option for every setting of some sections.

    The settings of the command line are passed as ``given``, {flat name: text}. A command that can share its work over the processes of
    torchrun has an argument ``job``. Errors of the user end the process with one line and their exit code; only the first failing rank prints.
    ``first`` names the options that most people need, which the help shows first and without a heading of their own.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(function, eval_str=True)
        own = [p for p in signature.parameters.values() if p.name not in ("given", "job")]
        chosen = [s for section in sections for s in settings(section)]
        ranges = {p.name: found for p in own if (found := _range(p))}

        @functools.wraps(function)
        def run(**values: Any) -> None:
            given = {s.name: values.pop(s.name) for s in chosen}
            if "given" in signature.parameters:
                values["given"] = {name: value for name, value in given.items() if value is not None}

            def work(job: Job) -> None:
                if "job" in signature.parameters:
                    values["job"] = job
                elif not job.is_single:
                    raise UsageError("torchrun: this command runs in one process; call it without torchrun")
                for name, permitted in ranges.items():
                    permitted.check(values[name])
                function(**values)

            execute(work)

        del run.__wrapped__  # typer would read the options of the function inside
        run.__annotations__ = {}
        offered = [*(_own(p, first, alone=not sections) for p in own), *(_of_setting(s, sections, first) for s in chosen)]
        offered.sort(key=lambda p: first.index(p.name) if p.name in first else len(first))
        run.__signature__ = signature.replace(parameters=offered)  # type: ignore[attr-defined]
        return run

    return decorate


@dataclass(frozen=True)
class _Range:
    """The permitted values of an option that is no setting."""

    flag: str
    low: float | None
    high: float | None

    def check(self, value: float | None) -> None:
        if value is not None:
            check_range(value, self.low, self.high, name=self.flag)


def _range(parameter: inspect.Parameter) -> _Range | None:
    option = parameter.annotation.__metadata__[0]
    if option.min is None and option.max is None:
        return None
    return _Range(next((name for name in option.param_decls or () if name.startswith("--")), "--" + parameter.name.replace("_", "-")), option.min, option.max)


def _own(parameter: inspect.Parameter, first: Sequence[str], *, alone: bool) -> inspect.Parameter:
    """Return a parameter of the command itself with metavar, range and panel in the style of the settings; few options need no panels (``alone``)."""
    kind, option = parameter.annotation.__origin__, copy.copy(parameter.annotation.__metadata__[0])
    is_argument = isinstance(option, typer.models.ArgumentInfo)
    if option.metavar is None:
        option.metavar = parameter.name.upper() if is_argument else next((word for plain, word in METAVARS.items() if plain in _plain_types(kind)), None)
    if option.min is not None or option.max is not None:  # checked here, in the words of the settings
        option.help = f"{option.help} ({range_words(option.min, option.max)})"
        option.min = option.max = None
    if alone or parameter.name in first:
        option.rich_help_panel = None
    return parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[kind, option])


def _plain_types(kind: Any) -> set[Any]:
    """Return the types in an annotation such as ``list[Path] | None``."""
    return {kind}.union(*map(_plain_types, typing.get_args(kind)))


def _of_setting(setting: Setting, sections: Sequence[str], first: Sequence[str]) -> inspect.Parameter:
    """Return the option of a setting: text, so that every source of it is read and checked by the same code."""
    permitted = setting.range_text()
    # A command that does not train takes the settings of sampling from the checkpoint.
    of_checkpoint = setting.section == "sampling" and "training" not in sections
    default = "the checkpoint's" if of_checkpoint else setting.unset if setting.default is None else str(setting.default)
    option = typer.Option(
        setting.flag,
        metavar="NAME" if setting.choices is not None else METAVARS[setting.kind],
        help=f"{setting.help}{f' ({permitted})' if permitted else ''}",
        show_default=default,
        rich_help_panel=None if setting.name in first else CHECKPOINTS_OWN if of_checkpoint else PANELS[setting.section],
        autocompletion=None if setting.choices is None else one_of(setting.choices),
    )
    return inspect.Parameter(setting.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, option])
