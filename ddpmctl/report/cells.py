"""What the forms of a table (text, LaTeX, page) have in common: values with something in brackets, and groups of columns."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

ASIDE = re.compile(r"(\S+) (\([^()]*\))")


def apart(cell: str) -> tuple[str, str]:
    """Return a cell's value, and what stands in brackets after it (its interval, or the epoch of a score), or an empty text."""
    found = ASIDE.fullmatch(cell)
    return (found[1], found[2]) if found else (cell, "")


class Span(NamedTuple):
    """A group of columns, or neighbours without a name; ``last`` is included."""

    name: str
    first: int
    last: int


def spans(groups: Sequence[str]) -> list[Span]:
    """Return the groups of columns from left to right, from a name for each column."""
    found = [(name, [column for column, _ in members]) for name, members in itertools.groupby(enumerate(groups), key=lambda one: one[1])]
    return [Span(name, columns[0], columns[-1]) for name, columns in found]
