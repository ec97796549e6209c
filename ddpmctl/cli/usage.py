"""One line for what the parser refuses: which word, what is wrong, and what to write instead.

The parser's errors are known by the names of their classes: typer has a copy of click inside it, earlier versions import click, and neither
can be imported under a name that both have.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import typer

from ddpmctl.cli.help import examples
from ddpmctl.cli.terminal import Terminal
from ddpmctl.distributed.job import is_single_process
from ddpmctl.errors import UsageError
from ddpmctl.label_lists import parse_labels

PARSER_ERROR: Any = typer.BadParameter.__base__  # click's UsageError
VALUES = {"labels": '"red cube"'}  # examples, where the metavar does not say enough
KINDS = {"INT": "a whole number", "NUMBER": "a number"}


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """In the body, an error of the parser is printed as one line, and ends the process with exit code 2."""
    try:
        yield
    except (PARSER_ERROR, UsageError) as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            raise
        if is_single_process() or os.environ.get("RANK", "0") == "0":
            Terminal().error(str(error) if isinstance(error, UsageError) else _in_words(error))
        raise typer.Exit(UsageError.exit_code) from None


def check_command(group: Any, ctx: Any, name: str) -> None:
    """Refuse a command that the group does not have, naming the nearest.

    Raises:
        UsageError: there is no such command.
    """
    if name in group.commands or name.startswith("-"):
        return
    near = difflib.get_close_matches(name.lower(), group.commands, n=1)
    raise UsageError(f"{ctx.command_path} has no command {name!r}; " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(group.commands)}"))


def check_words(command: Any, ctx: Any, words: Sequence[str]) -> None:
    """Refuse words that the parser would take for something else than was meant: a value without quotes, an option in the place of a value.

    Raises:
        UsageError: says what to write.
    """
    options = [parameter for parameter in command.get_params(ctx) if parameter.param_type_name == "option"]
    flags = {flag: option for option in options for flag in (*option.opts, *option.secondary_opts)}
    rest = list(words)
    while rest and (word := rest.pop(0)) != "--":
        if len(word) > 2 and not word.startswith("--") and f"-{word}" in flags:
            raise UsageError(f"{word}: write it with two hyphens, -{word}")
        name, joined, _ = word.partition("=")
        option = flags.get(name)
        if joined and option is not None and option.is_flag:
            raise UsageError(f"{name}: takes no value; write {name} alone")
        if joined or option is None or option.is_flag:
            continue
        if not rest or rest[0] in flags:
            raise UsageError(f"{word}: a value is missing{f' before {rest[0]}' if rest else ''}; give {word} {_value(option)}")
        if option.name == "labels" and (text := _split_labels(rest)):
            raise UsageError(f'{word} {text}: a value with spaces needs quotes; write {word} "{text}"')
        rest.pop(0)


def _split_labels(words: Sequence[str]) -> str:
    """Return the labels that are two or more words at the start, as without quotes; empty if they are none."""
    for count in range(len(words), 1, -1):
        with suppress(UsageError):
            parse_labels([" ".join(words[:count])])
            return " ".join(words[:count])
    return ""


def _value(option: Any) -> str:
    """Return what a value looks like."""
    return VALUES.get(option.name) or str(option.metavar)


def _in_words(error: Any) -> str:
    """Return the parser's error as one line that says what to write instead."""
    if (ctx := error.ctx) is None:
        return str(error.message)
    path, example = ctx.command_path, "".join(f"; for example: {line}" for line in examples(ctx.command)[:1])
    match type(error).__name__:
        case "NoSuchOption":
            return f"{error.option_name}: {path} has no such option; {_instead(error.option_name, ctx)}"
        case "MissingParameter" | "BadParameter" if error.param is not None:
            return _of_parameter(error, example)
    if extra := re.search(r"unexpected extra argument(?:s|\(s\))? \((.*)\)", error.message):
        return f"{path}: {extra[1]!r} has no place here; a value with spaces needs quotes, a setting needs its option{example}"
    return f"{path}: {error.format_message()}"


def _of_parameter(error: Any, example: str) -> str:
    parameter = error.param
    name = parameter.metavar if parameter.param_type_name == "argument" else parameter.opts[0]
    if type(error).__name__ == "BadParameter":
        return f"{name}: {f'give {KINDS[parameter.metavar]}' if parameter.metavar in KINDS else error.message.removeprefix('Value error, ')}"
    return f"{name} is missing{example}"  # an argument: no option is required


def _instead(name: str, ctx: Any) -> str:
    """Return what to write for an option that a command does not have."""
    commands = {"": ctx.command, **getattr(ctx.find_root().command, "commands", {})}
    flags = {
        owner: {flag for p in command.params if p.param_type_name == "option" for flag in (*p.opts, *p.secondary_opts)} for owner, command in commands.items()
    }
    if owners := [owner for owner, known in flags.items() if name in known]:
        return f"it is an option of {', '.join(owners)}"
    if near := difflib.get_close_matches(name, flags[""], n=1):
        return f"did you mean {near[0]}?"
    return f"{ctx.command_path} --help lists all"
