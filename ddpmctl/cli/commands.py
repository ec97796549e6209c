"""What all commands have in common: the layout of their help, and one line for what the parser refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from ddpmctl.cli.help import help_page, usage_of
from ddpmctl.cli.usage import check_command, check_words, errors_in_one_line

Function = TypeVar("Function", bound=Callable[..., Any])


class Command(TyperCommand):
    """A command."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help page."""
        formatter.write(help_page(self, ctx))

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return what follows the command's name in its usage line."""
        return usage_of(self, ctx)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words of the command line, after a check for usual mistakes."""
        if not ctx.resilient_parsing:
            check_words(self, ctx, args)
        return super().parse_args(ctx, args)


class Group(TyperGroup):
    """A group of commands: the program, or commands such as ``ddpmctl data``."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help page."""
        formatter.write(help_page(self, ctx))

    def make_context(self, *args: Any, **extra: Any) -> Any:
        """Parse the options before the command."""
        with errors_in_one_line():
            return super().make_context(*args, **extra)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command."""
        if not ctx.resilient_parsing:
            check_command(self, ctx, args[0])
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Parse the command's words and run it."""
        with errors_in_one_line():
            return super().invoke(ctx)


class App(typer.Typer):
    """A group of commands, to which they are added."""

    def __init__(self, *, help: str, **settings: Any) -> None:
        """Create it; ``help`` may contain a paragraph of example command lines."""
        context = {"help_option_names": ["-h", "--help"]}
        super().__init__(cls=Group, help=help, rich_markup_mode=None, context_settings=context, **{"no_args_is_help": True, **settings})

    def command(self, name: str | None = None, **settings: Any) -> Callable[[Function], Function]:
        """Return a decorator that adds a command."""
        return super().command(name, **{"cls": Command, **settings})
