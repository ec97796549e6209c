"""Registries of schedules, samplers, networks and so on: name -> decorated function or class.

Names are read from the source files without importing them, so that ``--help`` and error messages
list every entry without loading torch. An entry is imported on first use.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from ddpmctl.errors import UsageError, show

T = TypeVar("T")


@functools.cache
def _declared(package: str) -> dict[str, list[str]]:
    """Return {registry variable: entry names}, parsed from a package's files."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations
    found: dict[str, list[str]] = {}
    for file in sorted(Path(spec.submodule_search_locations[0]).glob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                continue
            for mark in node.decorator_list:
                match mark:
                    case ast.Call(func=ast.Attribute(value=ast.Name(id=variable), attr="register"), args=[ast.Constant(value=str(name))]):
                        found.setdefault(variable, []).append(name)
    return found


class Registry(Generic[T]):
    """The entries of one kind, e.g. every sampler.

    Args:
        variable: the registry's variable name in this module.
        kind: the word for an entry in messages, e.g. ``"sampler"``.
        package: the package whose files declare entries.
    """

    def __init__(self, variable: str, kind: str, package: str) -> None:
        """Create an empty registry; entries are imported on first use."""
        self.variable, self.kind, self.package = variable, kind, package
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers a function or class as ``name``."""

        def enter(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"two entries of kind {self.kind!r} are called {name!r}")
            self._entries[name] = entry
            return entry

        return enter

    def names(self) -> tuple[str, ...]:
        """Return the name of every entry, without importing it."""
        return tuple(dict.fromkeys([*_declared(self.package).get(self.variable, []), *self._entries]))

    def check(self, name: str) -> str:
        """Return the registered name that ``name`` is, in whatever case it is written.

        Raises:
            UsageError: unknown name; the message suggests a similar one and lists all.
        """
        names = self.names()
        if name in names:
            return name
        if name.lower() in names:
            return name.lower()
        near = difflib.get_close_matches(name[:80].lower(), names, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(f"unknown {self.kind} {show(name)}: {hint}There are {', '.join(names)}")

    def get(self, name: str) -> T:
        """Return an entry, importing the package's files on first use.

        Raises:
            UsageError: unknown name.
        """
        name = self.check(name)
        if name not in self._entries:
            for module in pkgutil.iter_modules(importlib.import_module(self.package).__path__, self.package + "."):
                importlib.import_module(module.name)
        return self._entries[name]


SCHEDULES: Registry[Any] = Registry("SCHEDULES", "schedule", "ddpmctl.diffusion")
OBJECTIVES: Registry[Any] = Registry("OBJECTIVES", "objective", "ddpmctl.diffusion")
SAMPLERS: Registry[Any] = Registry("SAMPLERS", "sampler", "ddpmctl.diffusion")
SPACINGS: Registry[Any] = Registry("SPACINGS", "spacing", "ddpmctl.diffusion")
TIME_SAMPLINGS: Registry[Any] = Registry("TIME_SAMPLINGS", "time sampling", "ddpmctl.diffusion")
LOSS_WEIGHTS: Registry[Any] = Registry("LOSS_WEIGHTS", "loss weight", "ddpmctl.diffusion")
NETWORKS: Registry[Any] = Registry("NETWORKS", "network", "ddpmctl.nets")
ACTIVATIONS: Registry[Any] = Registry("ACTIVATIONS", "activation", "ddpmctl.nets")
OPTIMIZERS: Registry[Any] = Registry("OPTIMIZERS", "optimizer", "ddpmctl.training")
FORMATS: Registry[Any] = Registry("FORMATS", "format of data", "ddpmctl.data.formats")
EXPORTS: Registry[Any] = Registry("EXPORTS", "form of export", "ddpmctl.export")
