"""Which of a setting's sources wins.

flag > environment ``DDPMCTL_*`` > ``--config FILE.toml`` > ``--preset NAME`` > default.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpmctl.config import RECIPE, Config, Value, settings
from ddpmctl.config_toml import load_toml
from ddpmctl.errors import UsageError
from ddpmctl.presets import PRESETS, preset_settings


@dataclass(frozen=True)
class Resolved:
    """Settings and where each came from."""

    config: Config
    origins: dict[str, str]


def resolve(given: Mapping[str, Value], config_file: Path | None, preset: str, environ: Mapping[str, str] = os.environ) -> Resolved:
    """Return every setting with its origin.

    Raises:
        UsageError: a value that cannot be used; an unknown preset or file.
    """
    preset = preset.lower()
    if preset not in PRESETS:
        raise UsageError(f"--preset: {preset!r} is none of {', '.join(PRESETS)}")
    explicit = _explicit(given, config_file, environ)
    resolved = _merged((f"preset {preset}", PRESETS[preset]), *explicit)
    return _merged((f"preset {preset}", preset_settings(preset, resolved.config.training.minutes)), *explicit)


def _merged(*sources: tuple[str, Mapping[str, Any]]) -> Resolved:
    """Merge settings over the defaults. Each source is a pair of its name and its settings; later sources override earlier ones."""
    values: dict[str, Any] = Config().flat()
    origins = dict.fromkeys(values, "default")
    for origin, source in sources:
        _let_one_budget_win(origin, source, values, origins)
        values |= source
        origins |= dict.fromkeys(source, origin)
    return Resolved(Config.from_flat(values), origins)


def nearest_preset(config: Config) -> tuple[str, dict[str, Value]]:
    """Return the preset from which the fewest settings of a recipe differ, and these settings."""
    flat, recipe = config.flat(), [setting.name for section in RECIPE for setting in settings(section)]
    bases = {name: Config().flat() | preset_settings(name, config.training.minutes) for name in PRESETS}
    found = {name: {key: flat[key] for key in recipe if flat[key] != base[key]} for name, base in bases.items()}
    nearest = min(found, key=lambda name: len(found[name]))
    budget = "epochs" if config.training.epochs is None else "minutes"  # the other one is in use, and says that this one is not
    return nearest, {key: value for key, value in found[nearest].items() if key != budget}


def in_words(values: Mapping[str, Value]) -> str:
    """Return settings as text, such as ``act relu, batch-size 32``."""
    texts = {name: "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value) for name, value in values.items()}
    return ", ".join(f"{name.replace('_', '-')} {text}" for name, text in texts.items())


def overrides(given: Mapping[str, str], *sections: str, config_file: Path | None = None, environ: Mapping[str, str] = os.environ) -> dict[str, Value]:
    """Return the settings of some sections that a person gave: flag, environment or ``--config``, checked.

    Raises:
        UsageError: a value that cannot be used.
    """
    known = {s.name: s for section in sections for s in settings(section)}
    merged = {name: value for _, source in _explicit(given, config_file, environ) for name, value in source.items()}
    return {name: known[name].check(value) for name, value in merged.items() if name in known}


def assumed(texts: list[str] | None) -> dict[str, Value]:
    """Return ``--assume name=value`` pairs as checked settings.

    Raises:
        UsageError: a pair that is none, or names no setting.
    """
    known = {s.name: s for section in ("model", "diffusion", "sampling") for s in settings(section)}
    pairs: dict[str, Value] = {}
    for text in texts or ():
        name, _, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if name not in known or not value:
            raise UsageError(f"--assume {text!r}: give name=value with a name of {', '.join(known)}")
        pairs[name] = known[name].check(value.strip())
    return pairs


def _explicit(given: Mapping[str, Value], config_file: Path | None, environ: Mapping[str, str]) -> list[tuple[str, dict[str, Any]]]:
    """Return what a person set on purpose, weakest source first."""
    from_file = load_toml(config_file) if config_file else {}
    variables = {s.name: f"DDPMCTL_{s.name.upper()}" for s in settings()}
    from_environment = {name: environ[variable] for name, variable in variables.items() if variable in environ}
    known = {s.name: s for s in settings()}
    return [
        (f"config {config_file}", {name: known[name].check(value, f"{config_file}: {name}") for name, value in from_file.items()}),
        ("environment", {name: known[name].check(value, variables[name]) for name, value in from_environment.items()}),
        ("flag", dict(given)),
    ]


def _let_one_budget_win(origin: str, source: Mapping[str, Any], values: dict[str, Any], origins: dict[str, str]) -> None:
    """Epochs and minutes are two ways to give one budget: a stronger source's choice removes a weaker one's."""
    named = [name for name in ("epochs", "minutes") if name in source]
    if len(named) == 1 and str(source[named[0]]).lower() != "none":
        other = "minutes" if named[0] == "epochs" else "epochs"
        values[other], origins[other] = None, origin
