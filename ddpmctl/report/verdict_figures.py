"""The figure of a comparison: accuracies of the arms, and their differences."""

from __future__ import annotations

import textwrap
from dataclasses import replace
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ddpmctl.comparison.verdict import HELDOUT, Finding, Verdict, arm_interval
from ddpmctl.report.figures import COLOURS, MARKERS, save_figure
from ddpmctl.statistics.intervals import Interval

ROW = 0.42  # inches per line


def save_verdict_figure(path: Path, verdict: Verdict) -> Path:
    """Write PNG and SVG: accuracy of each arm by condition file on the left, differences and effects on the right."""
    heldout = [replace(finding, name=f"{finding.name}, on {HELDOUT}") for finding in verdict.heldout]
    findings = [*(finding for _, _, finding in verdict.pairs), *heldout, *verdict.effects]
    files = list(verdict.arms[0].rows[0].answers)
    lines = max(len(findings), len(verdict.arms) * (len(files) + 1) / 2)
    figure = Figure(figsize=(11, 1.9 + ROW * lines), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, file in enumerate(files):
        intervals = [arm_interval(arm, [file]) for arm in verdict.arms]
        places = [row + (number - (len(files) - 1) / 2) * 0.22 for row in range(len(verdict.arms))]
        _bars(left, intervals, places, COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)], file, 1.0)
    left.set_yticks(range(len(verdict.arms)), [_wrapped(f"{arm.name}\n{_seeds(len(arm.rows))}") for arm in verdict.arms])
    left.set(xlabel="accuracy, 95 % interval", ylim=(len(verdict.arms) - 0.5, -0.5))
    left.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.3 / (1 + 0.08 * lines)), ncols=len(files))
    for row, finding in enumerate(findings):
        colour = COLOURS[0] if finding.significant else "#777777"
        _bars(right, [finding.contrast.interval], [row], colour, "o" if finding.significant else "D", "", 100.0)
    right.axvline(0, color="black", linewidth=1, linestyle=":")
    right.set_yticks(range(len(findings)), [_wrapped(f"{finding.name}\n{_p(finding)}") for finding in findings])
    right.set(xlabel=f"points of accuracy, {' + '.join(verdict.files)}\n95 % interval", ylim=(len(findings) - 0.5, -0.5))
    for axis in (left, right):
        axis.grid(alpha=0.3, axis="x")
        axis.tick_params(labelsize=9)
    return save_figure(path, figure)


def _bars(axis: Axes, intervals: list[Interval], places: list[float], colour: str, marker: str, label: str, scale: float) -> None:
    values = [scale * found.estimate for found in intervals]
    errors = [[scale * (found.estimate - found.low) for found in intervals], [scale * (found.high - found.estimate) for found in intervals]]
    axis.errorbar(values, places, xerr=errors, color=colour, marker=marker, linestyle="none", capsize=3, markersize=5, label=label)


def _seeds(count: int) -> str:
    return f"{count} training seeds" if count > 1 else "one training seed"


def _p(finding: Finding) -> str:
    suffix = "" if finding.significant else ": not significant"
    return f"p = {finding.p_adjusted:.2g}{suffix}"


def _wrapped(text: str, width: int = 42) -> str:
    return "\n".join(line for part in text.splitlines() for line in textwrap.wrap(part, width))
