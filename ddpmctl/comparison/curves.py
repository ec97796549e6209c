"""What recorded curves can tell: the difference of two runs over the epochs at which both were scored, and whether it changes in training."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ddpmctl.comparison.recorded import Comparison, RecordedRun
from ddpmctl.comparison.verdict import SIGNIFICANT
from ddpmctl.statistics.blocks import FEWEST, BlockEstimate, block_change, block_mean
from ddpmctl.statistics.contrasts import holm

POOLED = "pooled"
SMALLEST_P = 1e-4  # in words
FEWEST_SELECTED = 5  # evaluations that never fall by chance in 1 of 120 orders


@dataclass(frozen=True)
class CurveFinding:
    """An estimate, its p-value adjusted for the other pairs on the same conditions (Holm)."""

    found: BlockEstimate
    p_adjusted: float

    @property
    def significant(self) -> bool:
        """Whether the estimate is significantly different from 0."""
        return self.p_adjusted < SIGNIFICANT


@dataclass(frozen=True)
class CurvePair:
    """Two runs on one condition file, or on the mean accuracy of all files.

    Attributes:
        conditions: a name of ``files``, or ``POOLED``.
        files: all condition files.
        epochs: at which both were scored, by increasing number.
        gaps: accuracy of the first minus that of the second at these epochs.
        difference: the mean gap; None if there are fewer than ``FEWEST`` epochs.
        change: the mean gap of the second half of the epochs minus that of the first; None with ``difference``.
    """

    first: str
    second: str
    conditions: str
    files: tuple[str, ...]
    epochs: tuple[int, ...]
    gaps: tuple[float, ...]
    difference: CurveFinding | None
    change: CurveFinding | None

    @property
    def name(self) -> str:
        """The difference in words."""
        return f"{self.first} - {self.second}"

    @property
    def refusal(self) -> str:
        """Why there is no interval; empty if there is one."""
        if self.difference is not None:
            return ""
        return (
            f"an interval needs {FEWEST} or more epochs that both recorded, and there {'is' if len(self.epochs) == 1 else 'are'} {len(self.epochs) or 'none'}"
        )


@dataclass(frozen=True)
class CurveVerdict:
    """All that recorded curves tell.

    Attributes:
        pairs: every pair on each condition file and on both (``POOLED``), pair by pair.
        selected: {arm: condition file} of arms whose file names look as if only checkpoints that were the best so far had been kept.
        named: whether an arm is known by file names only.
    """

    pairs: tuple[CurvePair, ...]
    selected: Mapping[str, str]
    named: bool

    def sentences(self) -> Iterator[str]:
        """Yield what is found of each pair, and the limits of it, in plain words."""
        for pair in self.pairs:
            if pair.conditions == POOLED:
                yield pair_sentence(pair)
        if sum(pair.conditions == POOLED and pair.difference is not None for pair in self.pairs) > 1:
            yield "The p-values are adjusted for the number of pairs (Holm's method); the intervals are not."
        yield (
            "Each curve is one training run with one seed: a difference may be that of the seeds and not of the settings. "
            "To tell these apart, train each arm with several values of --seed, and compare without --recorded."
        )
        for arm, file in self.selected.items():
            yield (
                f"The epochs of {arm} look selected: they are unevenly spaced and the accuracy on {file} never falls, as if only checkpoints that were "
                "the best so far had been kept. Such scores are higher than the same checkpoints would have on new images."
            )
        if self.named and not self.selected:
            yield "File names show only the checkpoints that were kept: if these were the best so far, their scores are selected and too high."


def curve_verdict(comparison: Comparison) -> CurveVerdict:
    """Return the difference of every pair of runs over the epochs that both recorded, and its change."""
    families = [_family(comparison.arms, conditions, comparison.files) for conditions in (*comparison.files, POOLED)]
    selected = {arm.name: file for arm in comparison.arms if (file := _selected_by(arm, comparison.files))}
    named = any(arm.settings is None for arm in comparison.arms)
    return CurveVerdict(tuple(itertools.chain(*zip(*families, strict=True))), selected, named)


def pair_sentence(pair: CurvePair) -> str:
    """Return what is found of one pair, with the change of the difference in training."""
    if not pair.epochs:
        return f"Nothing can be told of {pair.first} and {pair.second}: they recorded no epoch in common."
    estimate = statistics.fmean(pair.gaps)
    better, worse = (pair.first, pair.second) if estimate >= 0 else (pair.second, pair.first)
    points = f"{abs(100 * estimate):.1f} points"
    ahead = f"{better} is ahead by {points}" if estimate else "they are level"
    where = " and ".join(pair.files) if pair.conditions == POOLED else pair.conditions
    if pair.difference is None or pair.change is None:
        return f"No verdict on {pair.first} and {pair.second}: on {where} {ahead}, but {pair.refusal}."
    figures = _figures(pair.difference, 1 if estimate >= 0 else -1)
    over = f"on {where} over the {len(pair.epochs)} epochs that both recorded, {pair.epochs[0]} to {pair.epochs[-1]}"
    if pair.difference.significant:
        text = f"{better} is better than {worse} by {points} {over} ({figures})."
    else:
        text = f"No significant difference between {pair.first} and {pair.second} {over}: {ahead} ({figures})."
    half = len(pair.epochs) // 2
    early, late = (statistics.fmean(part) for part in (pair.gaps[:half], pair.gaps[half:]))
    halves = f"{pair.name} is {100 * early:+.1f} points before epoch {pair.epochs[half]} and {100 * late:+.1f} from there on"
    verb = "changes" if pair.change.significant else "does not change significantly"
    return f"{text} The difference {verb} in training: {halves} (change: {_figures(pair.change, 1)})."


def _figures(finding: CurveFinding, sign: int) -> str:
    interval = finding.found.interval
    low, high = sorted((sign * interval.low, sign * interval.high))
    return f"95 % interval {100 * low:+.1f} to {100 * high:+.1f}, {_p_words(finding.p_adjusted)}"


def _p_words(p: float) -> str:
    return f"p = {p:.2g}" if p >= SMALLEST_P else f"p below {SMALLEST_P:g}"


def _family(arms: Sequence[RecordedRun], conditions: str, files: tuple[str, ...]) -> list[CurvePair]:
    """Return every pair on some conditions, the p-values adjusted for each other."""
    curves = [{point.epoch: _accuracy(point.accuracy, conditions) for point in arm.points} for arm in arms]
    shared = [(i, j, sorted(curves[i].keys() & curves[j].keys())) for i, j in itertools.combinations(range(len(arms)), 2)]
    gaps = [np.array([curves[i][epoch] - curves[j][epoch] for epoch in epochs]) for i, j, epochs in shared]
    means, changes = (_adjusted([estimate(series) if len(series) >= FEWEST else None for series in gaps]) for estimate in (block_mean, block_change))
    return [
        CurvePair(arms[i].name, arms[j].name, conditions, files, tuple(epochs), tuple(series.tolist()), mean, change)
        for (i, j, epochs), series, mean, change in zip(shared, gaps, means, changes, strict=True)
    ]


def _accuracy(accuracy: Mapping[str, float], conditions: str) -> float:
    """Return an accuracy; of all files it is the mean, because names do not say how many labels each file has."""
    return statistics.fmean(accuracy.values()) if conditions == POOLED else accuracy[conditions]


def _adjusted(found: Sequence[BlockEstimate | None]) -> list[CurveFinding | None]:
    p = iter(holm([one.p for one in found if one is not None]))
    return [None if one is None else CurveFinding(one, next(p)) for one in found]


def _selected_by(arm: RecordedRun, files: tuple[str, ...]) -> str | None:
    """Return the condition file on which a folder's checkpoints look like those that were the best so far; a run's record has every evaluation."""
    epochs = [point.epoch for point in arm.points]
    if arm.settings is not None or len(epochs) < FEWEST_SELECTED or len({b - a for a, b in itertools.pairwise(epochs)}) == 1:
        return None
    rising = (file for file in files if all(a.accuracy[file] <= b.accuracy[file] for a, b in itertools.pairwise(arm.points)))
    return next(rising, None)
