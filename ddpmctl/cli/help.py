"""The layout of help pages: usage, what the command does, examples, and its options under headings that say when one needs them."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator
from typing import Any

import typer

WIDEST = 120  # characters of a line
NAMES_WIDTH = 22  # of the column of names; a longer name has a line of its own, and is never cut


def help_page(command: Any, ctx: Any) -> str:
    """Return the help of a command or group of commands (a typer object, in its context), as wide as the terminal."""
    width = min(shutil.get_terminal_size().columns, WIDEST)
    arguments = "".join(f" {piece}" for piece in usage_of(command, ctx))
    return "\n".join([_wrapped(f"Usage: {ctx.command_path}{arguments}", width, "", " " * 7), *_text(command, width), *_lists(command, ctx, width), ""])


def usage_of(command: Any, ctx: Any) -> list[str]:
    """Return what follows a command's name in its usage line."""
    named = [_name(p) if p.required else f"[{_name(p)}]" for p in command.get_params(ctx) if p.param_type_name == "argument"]
    return ["[OPTIONS]", *named, *(["COMMAND ..."] if hasattr(command, "commands") else [])]


def examples(command: Any) -> list[str]:
    """Return the example command lines of a command's help."""
    return [line.strip() for paragraph in _paragraphs(command) if _is_example(paragraph) for line in paragraph.splitlines()]


def _paragraphs(command: Any) -> list[str]:
    return [paragraph for paragraph in (command.help or "").split("\n\n") if paragraph.strip()]


def _is_example(paragraph: str) -> bool:
    return paragraph.lstrip().startswith("ddpmctl ")


def _text(command: Any, width: int) -> Iterator[str]:
    """Yield the help's paragraphs; examples keep their lines, which can then be copied."""
    for paragraph in _paragraphs(command):
        yield ""
        yield textwrap.indent(paragraph.strip(), "  ") if _is_example(paragraph) else _wrapped(" ".join(paragraph.split()), width)


def _lists(command: Any, ctx: Any, width: int) -> Iterator[str]:
    """Yield arguments, commands and options, by panel; options without a panel come first."""
    panels: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Commands": [], "Options": []}
    for name in getattr(command, "commands", ()):
        panels["Commands"].append((name, " ".join(_paragraphs(command.commands[name])[0].split())))
    for parameter in command.get_params(ctx):
        if not parameter.hidden:
            panel = "Arguments" if parameter.param_type_name == "argument" else getattr(parameter, "rich_help_panel", None) or "Options"
            panels.setdefault(panel, []).append((_name(parameter), " ".join(_about(parameter))))
    for heading, rows in panels.items():
        if rows:
            yield f"\n{typer.style(f'{heading}:', bold=True)}"
            for name, about in rows:
                yield _row(name, about, width)


def _row(name: str, about: str, width: int) -> str:
    text = _wrapped(about, width, " " * (NAMES_WIDTH + 4))
    label = "  " + typer.style(name, bold=True)
    return f"{label}\n{text}" if len(name) > NAMES_WIDTH else label + text[len(name) + 2 :]


def _wrapped(text: str, width: int, first: str = "", other: str | None = None) -> str:
    later = first if other is None else other
    lines = textwrap.fill(text, width, initial_indent=first, subsequent_indent=later, break_on_hyphens=False, break_long_words=False)
    return lines.replace("\xa0", " ")


def _name(parameter: Any) -> str:
    """Return how a parameter is written: its names, short ones first, and its metavar."""
    if parameter.param_type_name == "argument":
        return f"{parameter.metavar or parameter.name.upper()}{'...' if parameter.nargs != 1 else ''}"
    names = " / ".join([", ".join(sorted(parameter.opts, key=len)), *parameter.secondary_opts])
    return names if parameter.is_flag else f"{names} {parameter.metavar}"


def _about(parameter: Any) -> Iterator[str]:
    """Yield a parameter's help, default and environment variable; a space within brackets does not end a line (U+00A0)."""
    yield parameter.help or ""
    if parameter.required:
        yield "[required]"
    if isinstance(parameter.show_default, str):
        yield f"[default: {parameter.show_default}]".replace(" ", "\xa0")
    elif parameter.show_default and getattr(parameter, "secondary_opts", None):
        yield f"[default:\xa0{(parameter.opts if parameter.default else parameter.secondary_opts)[0]}]"
    elif parameter.show_default and not getattr(parameter, "is_flag", False) and parameter.default is not None:
        yield f"[default:\xa0{parameter.default}]"
    if parameter.envvar:
        yield f"[env:\xa0{parameter.envvar}]"
