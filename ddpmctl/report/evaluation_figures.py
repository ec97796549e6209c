"""Figures of an evaluation: classes, confusion, noise schedules, and accuracy against a sampling setting.

The figures can be read in black and white: no information is in the colour alone.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from ddpmctl.diffusion.schedules import Schedule
from ddpmctl.evaluation.misses import confusion, recall
from ddpmctl.evaluation.results import FileResults
from ddpmctl.evaluation.scores import Probabilities
from ddpmctl.report.style import COLOURS as PALETTE
from ddpmctl.report.style import DASHES, MARKERS, in_figure, save_figure
from ddpmctl.report.tables import FOUND, SHOWN
from ddpmctl.task import LabelSet, Task

if TYPE_CHECKING:
    from ddpmctl.evaluation.sweep import SweepPoint

NEAR_ZERO = 1e-3  # largest terminal SNR of pure noise
HATCHES = ("", "///", "...")
FEW_NAMES, MOST_NAMES = 12, 40  # that stand level, and that can be read
WRITTEN_FROM = 0.05  # smaller values are not written in the cells


def save_class_bars(path: Path, answers: Mapping[str, FileResults], title: str) -> Path:
    """Write the share of each class's requests in which it is found, over all condition files.

    Classes of two words, such as colour and shape, stand in groups by their first word, with a bar for each second one.
    """
    flat, requested, task = _together(answers)
    counts = recall(flat, requested, task)["class"]
    groups, kinds = _groups(task, counts)
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axis = figure.subplots()
    width = 0.84 / len(kinds)
    for number, kind in enumerate(kinds):
        places, heights, sizes = [], [], []
        for index, group in enumerate(groups):
            hits, asked = counts.get(f"{group} {kind}" if kind else group, (0, 0))
            places.append(index + (number - (len(kinds) - 1) / 2) * width)
            heights.append(hits / asked if asked else 0.0)
            sizes.append(asked)
        label = kind or "_no legend"  # matplotlib leaves out what begins with an underscore
        bars = axis.bar(places, heights, width=width - 0.02, color=PALETTE[number], hatch=HATCHES[number], edgecolor="black", linewidth=0.5, label=label)
        axis.bar_label(bars, [f"{100 * h:.0f}" if n else "-" for h, n in zip(heights, sizes, strict=True)], fontsize=7, padding=1)
    hits, asked = sum(h for h, _ in counts.values()), sum(n for _, n in counts.values())
    if asked:
        axis.axhline(hits / asked, color="black", linewidth=1, linestyle=":", label=f"all: {hits / asked:.3f}")
    axis.set_xticks(range(len(groups)), list(map(in_figure, groups)), rotation=60 if len(groups) > FEW_NAMES else 0)
    axis.set(ylim=(0, 1.1), ylabel="objects found (bars: %)")
    axis.set_title(f"{in_figure(title)}\n{FOUND}", fontsize=10)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return save_figure(path, figure)


def _groups(task: Task, counts: Mapping[str, tuple[int, int]]) -> tuple[list[str], list[str]]:
    """Return the first words of the classes and the second ones; for names without aspects, and for many, the names and one empty word."""
    pairs = [task.words(name) for name in task.classes]
    kinds = list(dict.fromkeys(pair[1] for pair in pairs if pair))
    if 0 < len(kinds) <= len(HATCHES):
        return list(dict.fromkeys(pair[0] for pair in pairs)), kinds
    most = sorted(counts, key=lambda name: -counts[name][1])[:MOST_NAMES]
    return [name for name in task.classes if name in most], [""]


def save_confusion(path: Path, answers: Mapping[str, FileResults], title: str) -> Path:
    """Write the C x C table of the classes shown in images that request each class."""
    flat, requested, task = _together(answers)
    table, count = np.array(confusion(flat, requested, task)), len(task.classes)
    figure = Figure(figsize=(9.4, 8.4), layout="constrained")
    axis = figure.subplots()
    edges = np.arange(count + 1) - 0.5
    image = axis.pcolormesh(edges, edges, table, cmap="Greys", vmin=0, vmax=1, edgecolors="face", linewidth=0.1)
    for (row, column), value in np.ndenumerate(table):
        if value >= WRITTEN_FROM and count <= MOST_NAMES:
            axis.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=6.5, color="white" if value > 0.55 else "black")
    names, size = list(map(in_figure, task.classes)), 8 if count <= MOST_NAMES else 4
    axis.set_xticks(range(count), names, rotation=90, fontsize=size)
    axis.set_yticks(range(count), names, fontsize=size)
    kinds = [task.words(name)[1:] for name in task.classes]
    for edge in (index for index in range(1, count) if kinds[index] != kinds[index - 1]):
        axis.axhline(edge - 0.5, color=PALETTE[1], linewidth=0.8)
        axis.axvline(edge - 0.5, color=PALETTE[1], linewidth=0.8)
    axis.set(xlabel="shown", ylabel="requested", aspect="equal", ylim=(count - 0.5, -0.5))
    axis.set_title(f"{in_figure(title)}\n{SHOWN}", fontsize=10)
    bar = figure.colorbar(image, ax=axis, shrink=0.6, label="fraction of the images that request the class (from 5 %: in %)")
    for colours in bar.ax.collections:
        colours.set(rasterized=False, edgecolor="face")  # shapes, whose colours a dark page can change
    return save_figure(path, figure)


def save_spectra(path: Path, spectra: Mapping[str, np.ndarray], title: str) -> Path:
    """Write the mean power of images over spatial frequency, (H / 2,) for each name."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axis = figure.subplots()
    for number, (name, power) in enumerate(spectra.items()):
        style = {"color": PALETTE[number % len(PALETTE)], "linestyle": DASHES[number % len(DASHES)]}
        axis.loglog(range(1, len(power) + 1), power, label=in_figure(name), **style)
    axis.set(xlabel="cycles per image", ylabel="power (grey levels squared)", title=title)
    axis.grid(alpha=0.3, which="both")
    axis.legend(frameon=False)
    return save_figure(path, figure)


def save_schedules(path: Path, schedules: Mapping[str, Schedule]) -> Path:
    """Write beta, alpha_bar and log-SNR over t / T, with warnings in the legend."""
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    axes = figure.subplots(1, 3)
    for number, (name, schedule) in enumerate(schedules.items()):
        t = np.arange(1, schedule.timesteps + 1) / schedule.timesteps
        style = {"color": PALETTE[number % len(PALETTE)], "linestyle": DASHES[number % len(DASHES)]}
        label = "; ".join([name, *schedule_warnings(schedule)])
        for axis, values in zip(axes, (schedule.beta, schedule.alpha_bar, schedule.log_snr), strict=True):
            axis.plot(t, values[1:], label=label, **style)
    for axis, title in zip(axes, ("beta", "alpha_bar", "log-SNR"), strict=True):
        axis.set(title=title, xlabel="t / T")
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=1, frameon=False, fontsize=9)
    return save_figure(path, figure)


def schedule_warnings(schedule: Schedule) -> list[str]:
    """Return warnings about a schedule."""
    warnings = []
    if schedule.terminal_snr > NEAR_ZERO:
        warnings.append(f"ends at sqrt(alpha_bar_T) = {schedule.signal[-1]:.3f}: sampling starts from pure noise, which training never saw")
    turns = int((np.diff(np.sign(np.diff(schedule.beta[1:]))) != 0).sum())
    if turns > 1:
        warnings.append("beta goes up and down")
    return warnings


def save_sweep(path: Path, setting: str, series: Mapping[str, Sequence[SweepPoint]]) -> Path:
    """Write accuracy with its interval against a sampling setting; for ``steps``, against network calls."""
    by_calls = setting == "steps"
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axis = figure.subplots()
    for number, (name, points) in enumerate((in_figure(name), points) for name, points in series.items()):
        x = [point.nfe if by_calls else float(str(point.value)) for point in points]
        y = [point.accuracy.estimate for point in points]
        errors = [[p.accuracy.estimate - p.accuracy.low for p in points], [p.accuracy.high - p.accuracy.estimate for p in points]]
        style: Any = {"color": PALETTE[number % len(PALETTE)], "linestyle": DASHES[number % len(DASHES)], "marker": MARKERS[number % len(MARKERS)]}
        axis.errorbar(x, y, yerr=errors, capsize=3, markersize=5, label=name, **style)
        axis.plot(x, [point.exact for point in points], linewidth=1, alpha=0.6, markersize=4, markerfacecolor="none", label=f"{name}: exact match", **style)
    axis.set(xlabel="network calls per image" if by_calls else setting.replace("_", " "), ylabel="pooled accuracy, 95 % interval", ylim=(0, 1.02))
    if by_calls:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
    axis.grid(alpha=0.3)
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, [textwrap.fill(label, 70) for label in labels], loc="outside lower center", ncols=1, frameon=False, fontsize=9)
    return save_figure(path, figure)


def _together(answers: Mapping[str, FileResults]) -> tuple[Probabilities, list[LabelSet], Task]:
    flat, requested = np.concatenate([a.flat for a in answers.values()]), [labels for a in answers.values() for labels in a.requested]
    return flat, requested, next(iter(answers.values())).task
