"""Tables as lines of text that fit a width."""

from __future__ import annotations

import itertools
import textwrap
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from ddpmctl.report.cells import apart, spans

NARROWEST = 8  # columns are not made narrower than this, in characters


@dataclass(frozen=True)
class Lines:
    """A table as lines of text without trailing spaces: those of the heading, and those of each row."""

    head: list[str]
    rows: list[list[str]]


def lay_out(columns: Sequence[str], rows: Sequence[Sequence[str]], groups: Sequence[str] = (), *, width: int | None) -> Lines:
    """Return a table as text; the first column is aligned on the left, the others on the right.

    A table that is wider than ``width`` gets what stands in brackets after a value, such as its interval, on a second line of the row.
    If that is not enough, long cells continue on further lines.

    Args:
        columns: the headings.
        rows: a cell for each column.
        groups: a name for each column; neighbours with the same name stand below it. Empty: no groups.
        width: in characters; None: without limit.
    """
    groups = groups or [""] * len(columns)
    gaps = [0, *(1 if name and name == before else 2 for before, name in itertools.pairwise(groups))]
    heads, cells = [[column] for column in columns], [[[cell] for cell in row] for row in rows]
    widths = _widths(heads, cells, groups, gaps)
    if width is not None and sum(widths) + sum(gaps) > width:
        cells = [[row[0], *([part for part in apart(cell[0]) if part] or [""] for cell in row[1:])] for row in cells]
        widths = _widths(heads, cells, groups, gaps)
        widths = _narrowed(widths, [heads, *cells], width - sum(gaps))
        heads, cells = _folded(heads, widths), [_folded(row, widths) for row in cells]
    blanks = [[""] * (max(map(len, heads)) - len(head)) for head in heads]
    head = _joined([[*blank, *head] for blank, head in zip(blanks, heads, strict=True)], widths, gaps)
    return Lines(([_group_line(groups, widths, gaps)] if any(groups) else []) + head, [_joined(row, widths, gaps) for row in cells])


def length(text: str) -> int:
    """Return the number of character cells that a text takes in a terminal."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def _widths(heads: Sequence[Sequence[str]], cells: Sequence[Sequence[Sequence[str]]], groups: Sequence[str], gaps: Sequence[int]) -> list[int]:
    widths = [max(length(line) for row in (heads, *cells) for line in row[index]) for index in range(len(heads))]
    for name, first, last in spans(groups):
        widths[last] += max(0, length(name) - sum(widths[first : last + 1]) - sum(gaps[first + 1 : last + 1]))
    return widths


def _narrowed(widths: Sequence[int], rows: Sequence[Sequence[Sequence[str]]], room: int) -> list[int]:
    """Return widths whose sum is at most ``room`` where that can be: without breaking words, except in the first column, or else with it."""
    words = [max(length(word) for row in rows for line in row[index] for word in [*line.split(), ""]) for index in range(len(widths))]
    narrowed = list(widths)
    for lowest in ([min(NARROWEST, words[0]), *words[1:]], [min(NARROWEST, word) for word in words]):
        while sum(narrowed) > room and (wide := [index for index, least in enumerate(lowest) if narrowed[index] > least]):
            narrowed[max(wide, key=lambda index: narrowed[index])] -= 1
    return narrowed


def _folded(cells: Sequence[Sequence[str]], widths: Sequence[int]) -> list[list[str]]:
    return [[part for line in cell for part in textwrap.wrap(line, width, break_on_hyphens=False) or [""]] for cell, width in zip(cells, widths, strict=True)]


def _joined(cells: Sequence[Sequence[str]], widths: Sequence[int], gaps: Sequence[int]) -> list[str]:
    lines = []
    for number in range(max(map(len, cells))):
        parts = [cell[number] if number < len(cell) else "" for cell in cells]
        padded = [" " * (gap + (width - length(part) if index else 0)) + part for index, (part, width, gap) in enumerate(zip(parts, widths, gaps, strict=True))]
        lines.append((padded[0] + " " * (widths[0] - length(parts[0])) + "".join(padded[1:])).rstrip())
    return lines


def _group_line(groups: Sequence[str], widths: Sequence[int], gaps: Sequence[int]) -> str:
    """Return the names of the groups, each over the middle of its columns."""
    line = ""
    for name, first, last in spans(groups):
        start = sum(widths[:first]) + sum(gaps[: first + 1])
        span = sum(widths[first : last + 1]) + sum(gaps[first + 1 : last + 1])
        line += " " * (start - length(line) + (span - length(name) + 1) // 2) + name if name else ""
    return line
