"""What the shell offers for a value when Tab is pressed; nothing here is slow to import."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import typer

from ddpmctl.checkpoints.names import PRETRAINED_NAME
from ddpmctl.iclevr import ICLEVR
from ddpmctl.registry import Registry


def one_of(choices: Registry[object] | Sequence[str]) -> Callable[[str], list[str]]:
    """Return a completion of the names that a setting can have."""

    def complete(incomplete: str) -> list[str]:
        names = choices.names() if isinstance(choices, Registry) else choices
        return [name for name in names if name.startswith(incomplete)]

    return complete


def labels(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the label lists that complete a text, by its last label; one object is named once. The labels are those of the newest run.

    A label is written with a hyphen, which needs no quotes, except within quotes. Names with commas are not offered within a list.
    """
    before, separator, _ = incomplete.rpartition(",")
    named = {part.strip().replace("-", " ") for part in before.split(",")}
    space = " " if _in_quotes() or " " in incomplete else "-"
    offered = [before + separator + label.replace(" ", space) for label in _classes(ctx) if label not in named and not re.search('[,;"]', label)]
    return [text for text in offered if text.startswith(incomplete)]


def _classes(ctx: typer.Context) -> tuple[str, ...]:
    """Return the classes of the newest run, or i-CLEVR's where there is none."""
    from ddpmctl.errors import DdpmctlError
    from ddpmctl.runs.record import newest_run
    from ddpmctl.runs.sources import RunSources

    try:
        return RunSources.load(newest_run(_runs_dir(ctx)) / "data.json").task.classes
    except (DdpmctlError, OSError):
        return ICLEVR.classes


def _in_quotes() -> bool:
    """Return whether the cursor stands within quotes, from the line that the shell hands over."""
    line = os.environ.get("_TYPER_COMPLETE_ARGS") or os.environ.get("COMP_WORDS", "")
    return bool(re.search(r"""["'][^"']*$""", re.sub(r""""[^"]*"|'[^']*'""", "", line)))


def run_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the runs that complete a text, as names, or as paths where the text is one."""
    folder = _runs_dir(ctx)
    names = sorted(file.parent.name for file in folder.glob("*/config.toml") if file.parent.name.isprintable())  # others could act on the terminal
    return [text for name in names for text in (name, f"{folder}/{name}") if text.startswith(incomplete) and ("/" in text) == ("/" in incomplete)]


def checkpoints(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the runs that complete a text, and the model that comes with ddpmctl; behind a run's path, its checkpoints."""
    shipped = [PRETRAINED_NAME] if incomplete and PRETRAINED_NAME.startswith(incomplete) else []
    inside = (path for path in _checkpoint_files(_runs_dir(ctx)) if path.startswith(incomplete) and _in_run(incomplete, path))
    return [*run_names(ctx, incomplete), *shipped, *inside]


def _in_run(incomplete: str, path: str) -> bool:
    """Return whether a text goes on behind the path of a checkpoint's run."""
    return incomplete.startswith(f"{Path(path).parent.parent}/")


def _checkpoint_files(folder: Path) -> Iterator[str]:
    return filter(str.isprintable, map(str, sorted(folder.glob("*/checkpoints/*.pth"))))


def _runs_dir(ctx: typer.Context) -> Path:
    """Return where runs are: the option's value, which has that of the environment variable."""
    return Path(ctx.params.get("runs_dir") or os.environ.get("DDPMCTL_RUNS_DIR") or "runs")
