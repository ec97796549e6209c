"""Settings written as TOML and read back."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddpmctl.config import Config, Value, settings
from ddpmctl.errors import DataError, UsageError, show, visible

LONGEST = 20_000  # characters of a file of settings; tomllib takes time with the square of them where a name has as many dots
OLD_SECTIONS = {"machine": "device"}  # section names of version 0.2


def dump_toml(config: Config, origins: Mapping[str, str] | None = None) -> str:
    """Return the settings as TOML, with the origin of each as a comment if ``origins`` is given."""
    flat, section = config.flat(), ""
    lines: list[str] = []
    for setting in settings():
        if setting.section != section:
            section = setting.section
            lines += [*([""] if lines else []), f"[{section}]"]
        origin = f"  # {visible(origins[setting.name])}" if origins else ""
        lines.append(f"{setting.name} = {_toml(flat[setting.name])}{origin}")
    return "\n".join(lines) + "\n"


def _toml(value: Value) -> str:
    if value is None:
        return '"none"'  # TOML has no null
    if isinstance(value, str):
        # A JSON string is a TOML basic string, except for surrogate pairs and DEL.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def load_toml(path: Path) -> dict[str, Any]:
    """Return the settings of a TOML file as {flat name: value}; sections are optional but must be correct.

    Raises:
        UsageError: the file cannot be read, or has an unknown setting or a value that no setting can have.
        DataError: the file is not valid TOML, or too long to be a file of settings.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:  # some editors begin a file with a byte-order mark
            text = file.read(LONGEST + 1)
        if len(text) > LONGEST:
            raise DataError(f"{path}: has over {LONGEST:,} characters; this is not a file of settings")
        content = tomllib.loads(text)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: is not valid TOML: {error}") from None
    except RecursionError:
        raise UsageError(f"{path}: is nested too deeply; settings are numbers and texts in [sections]") from None
    except ValueError:  # of int, which reads at most 4,300 digits
        raise UsageError(f"{path}: a number has thousands of digits; no setting takes such a number") from None
    sections = {setting.name: setting.section for setting in settings()}
    flat: dict[str, Any] = {}
    for key, value in content.items():
        entries = {key: value} if not isinstance(value, dict) else value
        for name, inner in entries.items():
            if name not in sections or (isinstance(value, dict) and OLD_SECTIONS.get(key, key) != sections[name]):
                where = f" in [{key[:80]}]" if isinstance(value, dict) else ""
                raise UsageError(f"{path}: unknown setting {show(name)}{where}")
            flat[name] = inner
    return flat
