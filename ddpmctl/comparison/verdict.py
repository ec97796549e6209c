"""Which arm is better, by how much, and whether the difference is significant: arms scored on the same conditions and the same noise."""

from __future__ import annotations

import collections.abc
import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from ddpmctl.checkpoints.outline import read_outline
from ddpmctl.comparison.recorded import IGNORED
from ddpmctl.config import Value
from ddpmctl.errors import DataError, UsageError
from ddpmctl.evaluation.evaluate import EvaluationSpec, evaluate_checkpoints, used_config
from ddpmctl.evaluation.results import CheckpointResult, EvaluationEvent, pooled_tally
from ddpmctl.runs.folder import Run, epoch_in_name, find_checkpoints
from ddpmctl.runs.record import SCORED
from ddpmctl.statistics.contrasts import Contrast, contrast, holm
from ddpmctl.statistics.intervals import Interval, accuracy_interval
from ddpmctl.statistics.tallies import Tally

SIGNIFICANT = 0.05
HELDOUT = "heldout"
WORTH_SEEING = 0.05  # the difference for which advice is given: 5 points


@dataclass(frozen=True)
class Arm:
    """Checkpoints alike in all but the seed of their training.

    Attributes:
        settings: those that are not the same in all arms.
    """

    name: str
    rows: tuple[CheckpointResult, ...]
    settings: Mapping[str, Value] = field(default_factory=dict)

    def tallies(self, files: Sequence[str]) -> list[Tally]:
        """Return the hits of each checkpoint, over some condition files."""
        return [pooled_tally(row.answers, files) for row in self.rows]


@dataclass(frozen=True)
class Finding:
    """A contrast of arms with a name, and its p-value adjusted for the others of its family (Holm)."""

    name: str
    contrast: Contrast
    p_adjusted: float

    @property
    def significant(self) -> bool:
        """Whether the difference is significant."""
        return self.p_adjusted < SIGNIFICANT


@dataclass(frozen=True)
class Verdict:
    """All that a comparison found.

    Attributes:
        files: the condition files that the contrasts pool.
        pairs: (first arm, second arm, finding) for every pair.
        heldout: the pairs' differences on the held-out conditions alone, a family of their own; empty where there are none or they are pooled.
        effects: main effects and interaction, where two factors of two levels are crossed.
    """

    arms: tuple[Arm, ...]
    files: tuple[str, ...]
    pairs: tuple[tuple[Arm, Arm, Finding], ...]
    heldout: tuple[Finding, ...]
    effects: tuple[Finding, ...]

    def sentences(self) -> Iterator[str]:
        """Yield the verdict on each pair in plain words."""
        for first, second, finding in self.pairs:
            yield verdict_sentence(first, second, finding)


def checkpoint_of(path: Path, at_epoch: int | None = None) -> Path:
    """Return the checkpoint that represents a run or a folder of checkpoints: the last one, or the last at or before an epoch.

    Raises:
        UsageError: there is none.
    """
    run = Run(path)
    files = find_checkpoints(path)
    if at_epoch is not None:
        files = [file for file in files if epoch_in_name(file) <= at_epoch]
        if not files:
            raise UsageError(f"--at-epoch {at_epoch}: {path} holds no checkpoint of that epoch or an earlier one")
    latest = run.pointer("latest") if at_epoch is None else None
    return latest or files[-1]


def score_arms(names: Mapping[Path, str], spec: EvaluationSpec, *, anyway: bool = False) -> collections.abc.Generator[EvaluationEvent, None, list[Arm]]:
    """Score checkpoints on the conditions and return the arms that they form; ``names`` are those of their runs or folders.

    Runs with the same settings except the seed are one arm. A checkpoint that cannot be loaded gives a ``Failed`` event and is left out.
    Sampling settings are compared before the first image is sampled.

    Raises:
        UsageError: the sampling settings differ, and ``anyway`` is not set.
    """
    if not anyway:
        _check_alike(list(names), spec)
    rows, _ = yield from evaluate_checkpoints(list(names), spec)
    return _arms(names, rows)


def pooled_files(conditions: Mapping[str, object]) -> tuple[str, ...]:
    """Return the condition files that a verdict pools: the lab's two where both are there, else all."""
    return SCORED if set(SCORED) <= set(conditions) else tuple(conditions)


def verdict(arms: Sequence[Arm], files: Sequence[str]) -> Verdict:
    """Return every pair's difference, and the effects of two crossed factors, over some condition files."""
    tallies = [arm.tallies(files) for arm in arms]
    pairs = list(itertools.combinations(range(len(arms)), 2))
    weights = [(f"{arms[i].name} - {arms[j].name}", [float(k == i) - float(k == j) for k in range(len(arms))]) for i, j in pairs]
    found = tuple((arms[i], arms[j], finding) for (i, j), finding in zip(pairs, _family(tallies, weights), strict=True))
    apart = HELDOUT in arms[0].rows[0].answers and HELDOUT not in files
    heldout = _family([arm.tallies([HELDOUT]) for arm in arms], weights) if apart else ()
    return Verdict(tuple(arms), tuple(files), found, heldout, _effects(arms, tallies))


def arm_interval(arm: Arm, files: Sequence[str]) -> Interval:
    """Return an arm's accuracy with its interval over conditions; of several checkpoints, that of their mean answers."""
    tallies = arm.tallies(files)
    return accuracy_interval(Tally(np.concatenate([tally.hits for tally in tallies], axis=1), tallies[0].labels))


def verdict_sentence(first: Arm, second: Arm, finding: Finding) -> str:
    """Return one pair's verdict: which is better by how much, or that no difference is significant and how many images would show one."""
    found, spread = finding.contrast, finding.contrast.spread
    better, worse = (first, second) if found.estimate >= 0 else (second, first)
    low, high = sorted((found.interval.low, found.interval.high) if found.estimate >= 0 else (-found.interval.low, -found.interval.high))
    figures = f"95 % interval {100 * low:+.1f} to {100 * high:+.1f}, p = {finding.p_adjusted:.2g}"
    points = f"{abs(100 * found.estimate):.1f} points"
    if finding.significant:
        text = f"{better.name} is better than {worse.name} by {points} ({figures})."
    else:
        ahead = f"{better.name} is ahead by {points}" if found.estimate else "they are level"
        text = (
            f"No significant difference between {first.name} and {second.name}: {ahead} ({figures}). "
            f"A difference of {100 * spread.detectable():.1f} points would have been seen in 80 of 100 such comparisons"
        )
        text += f"; {_advice(first, second, finding)}." if spread.detectable() > WORTH_SEEING else "."
    if not spread.seeds_df:
        text += " This is about these checkpoints: what another training seed would change is unknown."
    return text


def _advice(first: Arm, second: Arm, finding: Finding) -> str:
    spread, points = finding.contrast.spread, f"{100 * WORTH_SEEING:.0f} points"
    if spread.repeats == 1:
        return f"use --repeats 2 or more to get a sample-size recommendation for {points}"
    if (plan := spread.cheapest_for(WORTH_SEEING)) is not None:
        repeats, seeds = plan
        needs = [(f"--repeats {repeats}", str(spread.repeats))] if repeats > spread.repeats else []
        needs += [(f"{seeds} training seeds in each arm", f"{len(first.rows)} and {len(second.rows)}")] if seeds is not None else []
        return f"{points} need {' and '.join(need for need, _ in needs)} (here {'; '.join(here for _, here in needs)})"
    return f"no number of repeats shows {points} on these conditions: take more conditions" + (" and training seeds" if spread.seeds_df else "")


def _check_alike(paths: Sequence[Path], spec: EvaluationSpec) -> None:
    used: list[tuple[Path, dict[str, Value]]] = []
    for path in paths:
        with contextlib.suppress(DataError):  # a file that cannot be used is reported when it is scored
            used.append((path, asdict(used_config(read_outline(path, spec.assume), spec).sampling)))
    for path, sampling in used[1:]:
        first, other = used[0][1], used[0][0]
        differing = [f"{name.replace('_', '-')} {first[name]} against {sampling[name]}" for name in first if first[name] != sampling[name]]
        if differing:
            same = [f"--{name.replace('_', '-')} {1 if name == 'particles' else first[name]}" for name in first if first[name] != sampling[name]]
            raise UsageError(
                f"compare: {other} and {path} have different sampler settings ({', '.join(differing)}); "
                f"give both the same, such as {' '.join(same)}, or add --anyway"
            )


def _arms(names: Mapping[Path, str], rows: Sequence[CheckpointResult]) -> list[Arm]:
    """Return the arms; where one has several runs, arms with known settings are named by what differs, else all by their folders."""
    settings = [None if row.foreign else row.config.flat() for row in rows]
    known = [own for own in settings if own is not None]
    varied = [name for name in (known[0] if known else ()) if name not in IGNORED and len({own[name] for own in known}) > 1]
    groups: dict[object, list[CheckpointResult]] = {}
    for row, own in zip(rows, settings, strict=True):
        groups.setdefault(names[row.path] if own is None else tuple(own[name] for name in varied), []).append(row)
    replicated = any(len(members) > 1 for members in groups.values())
    arms = []
    for members in groups.values():
        differing = {} if members[0].foreign else {name: members[0].config.flat()[name] for name in varied}
        title = ", ".join(f"{name}={value}" for name, value in differing.items()) if replicated and differing else names[members[0].path]
        arms.append(Arm(title, tuple(members), differing))
    return arms


def _family(tallies: Sequence[Sequence[Tally]], weights: Sequence[tuple[str, Sequence[float]]]) -> tuple[Finding, ...]:
    """Return named contrasts, their p-values adjusted for each other."""
    found = [contrast(tallies, chosen) for _, chosen in weights]
    return tuple(Finding(name, one, p) for (name, _), one, p in zip(weights, found, holm([one.p for one in found]), strict=True))


def _effects(arms: Sequence[Arm], tallies: Sequence[Sequence[Tally]]) -> tuple[Finding, ...]:
    """Return main effects and interaction where the arms are the four cells of two settings with two values each."""
    levels = {name: sorted({arm.settings.get(name) for arm in arms}, key=str) for name in arms[0].settings}
    if len(arms) != 4 or [len(values) for values in levels.values()] != [2, 2]:
        return ()
    signs = [tuple(1 if arm.settings[name] == values[0] else -1 for name, values in levels.items()) for arm in arms]
    if len(set(signs)) < len(arms):
        return ()
    (first, (a, b)), (second, (c, d)) = levels.items()
    weights = [
        (f"{first}: {a} - {b}", [one / 2 for one, _ in signs]),
        (f"{second}: {c} - {d}", [other / 2 for _, other in signs]),
        (f"interaction: {first} {a} - {b}, with {second} {c} against {d}", [float(one * other) for one, other in signs]),
    ]
    return _family(tallies, weights)
