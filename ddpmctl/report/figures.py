"""The figures of a comparison: recorded scores and verdict."""

from __future__ import annotations

import math
import statistics
import textwrap
from dataclasses import replace
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ddpmctl.comparison.recorded import Comparison, RecordedRun
from ddpmctl.comparison.verdict import HELDOUT, Verdict, arm_interval
from ddpmctl.config import Value
from ddpmctl.report.style import COLOURS, DASHES, MARKERS, in_figure, save_figure
from ddpmctl.statistics.intervals import Interval

ROW = 0.42  # inches per line of the verdict's figure


def save_comparison_figure(path: Path, comparison: Comparison) -> Path:
    """Write accuracy over epochs, one panel per condition file, and the loss if it is recorded.

    Runs that differ only in the seed are one line, their mean, with a band from the lowest to the highest.
    """
    with_loss = any(not math.isnan(point.loss) for arm in comparison.arms for point in arm.points)
    titles = [*(f"accuracy on {name}" for name in comparison.files), *(["training loss"] if with_loss else [])]
    figure = Figure(figsize=(4.6 * len(titles), 4.4), layout="constrained")
    axes = figure.subplots(1, len(titles), squeeze=False)[0]
    for number, (title, arms) in enumerate(replicates(comparison).items()):
        colour, label = COLOURS[number % len(COLOURS)], in_figure(title)
        style = {"color": colour, "linestyle": DASHES[number % len(DASHES)], "marker": MARKERS[number % len(MARKERS)], "markersize": 4, "label": label}
        epochs = sorted(set.intersection(*({point.epoch for point in arm.points} for arm in arms)))
        points = [[point for point in arm.points if point.epoch in epochs] for arm in arms]
        series = [[[point.accuracy[name] for point in of] for of in points] for name in comparison.files] + [[[point.loss for point in of] for of in points]]
        for axis, runs in zip(axes, series, strict=False):
            by_epoch = list(zip(*runs, strict=True))
            axis.plot(epochs, [statistics.fmean(values) for values in by_epoch], **style)
            if len(arms) > 1:
                axis.fill_between(epochs, [min(values) for values in by_epoch], [max(values) for values in by_epoch], color=colour, alpha=0.2, linewidth=0)
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes[: len(comparison.files)]:
        axis.set_ylim(0, 1.02)
    if with_loss:
        axes[-1].set_yscale("log")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=1 if max(map(len, labels)) > 40 else 2, fontsize=9, frameon=False)
    return save_figure(path, figure)


def replicates(comparison: Comparison) -> dict[str, list[RecordedRun]]:
    """Return the arms by title, grouped if they differ only in the seed."""
    groups: dict[str | tuple[Value, ...], list[RecordedRun]] = {}
    for number, arm in enumerate(comparison.arms):
        key: str | tuple[Value, ...] = arm.name if arm.settings is None else tuple(values[number] for values in comparison.differing.values())
        groups.setdefault(key, []).append(arm)
    titled = {}
    for values, arms in groups.items():
        differing = ", ".join(f"{name}={value}" for name, value in zip(comparison.differing, values, strict=True)) if isinstance(values, tuple) else ""
        titled[arms[0].name if len(arms) == 1 else f"{differing or 'all'} ({len(arms)} seeds: mean and range)"] = arms
    return titled


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
    left.set_yticks(range(len(verdict.arms)), [_wrapped(f"{in_figure(arm.name)}\n{_seeds(len(arm.rows))}") for arm in verdict.arms])
    left.set(xlabel="accuracy, 95 % interval", ylim=(len(verdict.arms) - 0.5, -0.5))
    left.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.3 / (1 + 0.08 * lines)), ncols=len(files))
    for row, finding in enumerate(findings):
        colour = COLOURS[0] if finding.significant else "#777777"
        _bars(right, [finding.contrast.interval], [row], colour, "o" if finding.significant else "D", "", 100.0)
    right.axvline(0, color="black", linewidth=1, linestyle=":")
    told = [f"p = {f.p_adjusted:.2g}{'' if f.significant else ': not significant'}" for f in findings]
    right.set_yticks(range(len(findings)), [_wrapped(f"{in_figure(f.name)}\n{line}") for f, line in zip(findings, told, strict=True)])
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


def _wrapped(text: str) -> str:
    return "\n".join(line for part in text.splitlines() for line in textwrap.wrap(part, 42))
