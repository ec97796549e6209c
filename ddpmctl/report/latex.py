"""Tables as LaTeX for the packages booktabs and graphicx; none is wider than the text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ddpmctl.errors import visible
from ddpmctl.files import write_text
from ddpmctl.report.cells import apart, spans
from ddpmctl.report.tables import Table

# A table that is wider than the text is scaled down to it; a narrower one keeps its size.
FIT = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"


def write_latex(path: Path, tables: Sequence[Table]) -> None:
    """Write tables as LaTeX: groups of columns below a common heading, and intervals in small print below their values."""
    write_text(path, "% needs \\usepackage{booktabs} and \\usepackage{graphicx}\n\n" + "\n\n".join(map(_latex_table, tables)) + "\n")


def _latex_table(table: Table) -> str:
    columns = "l" + "r" * (len(table.columns) - 1)
    begin = ["\\begin{table}", "\\centering", f"\\caption{{{_latex(table.title)}}}", FIT, f"\\begin{{tabular}}{{{columns}}}", "\\toprule"]
    heads = [*(_group_rows(table.groups) if any(table.groups) else ()), _row(map(_latex, table.columns)), "\\midrule"]
    rows = [line for row in table.rows for line in _value_rows(row)]
    return "\n".join([*begin, *heads, *rows, "\\bottomrule", "\\end{tabular}}", "\\end{table}"])


def _group_rows(groups: Sequence[str]) -> Iterator[str]:
    """Yield the row of the groups' names and the rules below them."""
    parts = spans(groups)
    yield _row(f"\\multicolumn{{{last - first + 1}}}{{c}}{{{_latex(name)}}}" for name, first, last in parts)
    yield " ".join(f"\\cmidrule(lr){{{first + 1}-{last + 1}}}" for name, first, last in parts if name)


def _value_rows(row: Sequence[str]) -> Iterator[str]:
    """Yield a row, and a second one where values have intervals."""
    parts = [(row[0], ""), *map(apart, row[1:])]
    yield _row(_latex(value) for value, _ in parts)
    if any(aside for _, aside in parts):
        yield _row(f"{{\\scriptsize {_latex(aside)}}}" if aside else "" for _, aside in parts)


def _row(cells: Iterable[str]) -> str:
    return " & ".join(cells) + " \\\\"


def _latex(text: str) -> str:
    """Escape LaTeX's special characters."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", **{c: "\\" + c for c in "&%$#_{}"}}
    return "".join(special.get(character, character) for character in visible(text))
