"""What recorded curves tell, as tables, JSON and CSV."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ddpmctl.comparison.curves import POOLED, CurveFinding, CurveVerdict
from ddpmctl.comparison.recorded import Comparison
from ddpmctl.report.json_csv import write_table_csv
from ddpmctl.report.tables import Table, in_points

KEYS = ("estimate", "low", "high", "p", "p_adjusted", "told", "block", "df")


def curve_tables(verdict: CurveVerdict) -> Iterator[Table]:
    """Yield the differences of all pairs and, if any has an interval, their changes in training."""
    columns = ["", "epochs", "points", "from", "to", "p", "p (Holm)"]
    note = f"{POOLED}: the mean of {' and '.join(verdict.pairs[0].files)}; 95 % intervals by moving blocks"
    families = {
        "differences over the epochs that both recorded, points of accuracy": [pair.difference for pair in verdict.pairs],
        "changes of these differences from the first half of the epochs to the second, points": [pair.change for pair in verdict.pairs],
    }
    for title, findings in families.items():
        rows = [[f"{pair.name}, {pair.conditions}", str(len(pair.epochs)), *_cells(found)] for pair, found in zip(verdict.pairs, findings, strict=True)]
        yield Table(title, columns, rows, note)


def curves_as_dict(comparison: Comparison, verdict: CurveVerdict) -> dict[str, Any]:
    """Return recorded curves and their differences in the form of ``compare --recorded --json``."""
    return {
        "files": list(comparison.files),
        "arms": [
            {
                "name": arm.name, "settings": {name: values[number] for name, values in comparison.differing.items()},
                "epochs": [point.epoch for point in arm.points], "scores": {file: [point.accuracy[file] for point in arm.points] for file in comparison.files},
                "selected": arm.name in verdict.selected,
            }
            for number, arm in enumerate(comparison.arms)
        ],
        "pairs": [
            {
                "name": pair.name, "first": pair.first, "second": pair.second, "conditions": pair.conditions, "epochs": list(pair.epochs),
                **_as_dict(pair.difference), "estimate": statistics.fmean(pair.gaps) if pair.gaps else None,
                "change": _as_dict(pair.change), "reason": pair.refusal or None,
            }
            for pair in verdict.pairs
        ],
        "warnings": list(comparison.warnings),
        "sentences": list(verdict.sentences()),
    }  # fmt: skip


def write_curves_csv(path: Path, result: Mapping[str, Any]) -> None:
    """Write what ``curves_as_dict`` returned as CSV, one row per pair and condition file."""
    rows = [
        {
            **{key: value for key, value in pair.items() if key not in ("epochs", "change")},
            "epochs": len(pair["epochs"]), "first_epoch": min(pair["epochs"], default=None), "last_epoch": max(pair["epochs"], default=None),
            **{f"change_{key}": value for key, value in pair["change"].items()},
        }
        for pair in result["pairs"]
    ]  # fmt: skip
    write_table_csv(path, Table("", list(rows[0]), [["" if value is None else str(value) for value in row.values()] for row in rows]))


def _cells(finding: CurveFinding | None) -> list[str]:
    if finding is None:
        return ["-"] * 5
    return [*in_points(finding.found.interval), f"{finding.found.p:.4f}", f"{finding.p_adjusted:.4f}"]


def _as_dict(finding: CurveFinding | None) -> dict[str, Any]:
    if finding is None:
        return dict.fromkeys(KEYS)
    found, interval = finding.found, finding.found.interval
    values = (interval.estimate, interval.low, interval.high, found.p, finding.p_adjusted, finding.significant, found.block, found.df)
    return dict(zip(KEYS, values, strict=True))
