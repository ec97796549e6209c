"""Run a task of the engine to its end, and read settings given by name: what the functions of the Python interface have in common."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import Any, TypeAlias, TypeVar

from ddpmctl.config import Value, settings
from ddpmctl.errors import UsageError

R = TypeVar("R")
Listener: TypeAlias = Callable[[Any], object] | None
"""Called with each event of a task, such as ``ddpmctl.progress.Progress(stage, done, total)``; None to ignore them."""


def finish(task: Generator[Any, None, R], listener: Listener) -> R:
    """Run a task to its end, pass its events to a listener, and return its result."""
    while True:
        try:
            event = next(task)
        except StopIteration as end:
            value: R = end.value
            return value
        if listener is not None:
            listener(event)


def checked(given: Mapping[str, Any], *sections: str) -> dict[str, Value]:
    """Check settings that were given by name, and return them.

    Raises:
        UsageError: a name is not a setting of these sections, or a value cannot be used.
    """
    known = {setting.name: setting for section in sections for setting in settings(section)}
    if unknown := [name for name in given if name not in known]:
        raise UsageError(f"{unknown[0]}: is not a setting; known are {', '.join(known)}")
    return {name: known[name].check(value, name) for name, value in given.items()}
