"""Comparison of runs by their settings and recorded scores."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ddpmctl.checkpoints.names import recorded_in_name
from ddpmctl.config import Value, settings
from ddpmctl.errors import DataError, UsageError
from ddpmctl.runs.folder import Run, find_checkpoints
from ddpmctl.runs.record import scored_in
from ddpmctl.statistics.ranking import Standing

IGNORED = frozenset({"seed", "device", "threads", *(setting.name for setting in settings("run"))})  # shown separately, or no effect on the result
SAMPLING = tuple(setting.name for setting in settings("sampling"))


class NothingRecorded(DataError):
    """A valid run or folder without scores."""


@dataclass(frozen=True)
class Point:
    """One evaluation; values that are not recorded are NaN."""

    epoch: int
    loss: float
    accuracy: dict[str, float]
    exact: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RecordedRun:
    """One run, or one folder of report-style checkpoints with scores in the file names.

    Attributes:
        settings: flat settings, or None if they are not recorded.
        points: evaluations by increasing epoch.
        evaluators: hashes of the classifiers; empty if unknown.
    """

    name: str
    settings: dict[str, Value] | None
    points: tuple[Point, ...]
    evaluators: frozenset[str]

    def at(self, epoch: int | None) -> Point | None:
        """Return the last evaluation at or before an epoch, or None."""
        if epoch is None:
            return None
        before = [point for point in self.points if point.epoch <= epoch]
        return before[-1] if before else None

    def best(self, file: str) -> Point:
        """Return the evaluation with the best standing on a condition file."""
        return max(self.points, key=lambda point: Standing.of(point.accuracy[file], point.exact.get(file, math.nan), point.epoch))

    def last_mean(self, file: str, count: int) -> tuple[float, float]:
        """Return mean and standard deviation over the last ``count`` evaluations; the latter is NaN for one evaluation."""
        values = [point.accuracy[file] for point in self.points[-count:]]
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


@dataclass(frozen=True)
class Comparison:
    """The arms of a comparison.

    Attributes:
        differing: {setting: one value per arm} for every setting that differs.
        epoch: the epoch at which the arms are compared, or None.
        last: number of last evaluations for the mean.
        warnings: reasons why the scores may not be comparable.
    """

    arms: tuple[RecordedRun, ...]
    differing: dict[str, tuple[Value, ...]]
    epoch: int | None
    last: int
    warnings: tuple[str, ...]

    @property
    def files(self) -> tuple[str, ...]:
        """The condition files that all arms were scored on."""
        return tuple(self.arms[0].points[0].accuracy)


def compare_recorded(paths: Sequence[Path], *, at_epoch: int | None = None, last: int = 10) -> Comparison:
    """Compare runs, or folders of report-style checkpoints.

    Args:
        paths: two or more folders.
        at_epoch: the epoch to compare at; None: the last epoch that every arm has reached.
        last: number of last evaluations for mean and standard deviation.

    Raises:
        UsageError: fewer than two paths, duplicate paths, or an epoch before an arm's first evaluation.
        NothingRecorded: a folder has no evaluation.
        DataError: a record is damaged.
    """
    if len(paths) < 2:
        raise UsageError("compare: name two or more runs or folders of checkpoints")
    if len({path.resolve() for path in paths}) < len(paths):
        raise UsageError("compare: the same folder is named twice")
    arms = tuple(load_recorded_run(path, name) for path, name in zip(paths, short_names(paths), strict=True))
    _require_same_files(arms)
    for arm in arms:
        if at_epoch is not None and arm.at(at_epoch) is None:
            raise UsageError(f"--at-epoch {at_epoch}: the first evaluation of {arm.name} is at epoch {arm.points[0].epoch}")
    common: int | None = min(arm.points[-1].epoch for arm in arms)
    warnings = _warnings(arms)
    if at_epoch is None and any(arm.at(common) is None for arm in arms):
        common, warnings = None, (*warnings, "the runs have no common epoch with scores")
    if at_epoch is not None and (short := [arm.name for arm in arms if arm.points[-1].epoch < at_epoch]):
        warnings = (*warnings, f"no evaluation at epoch {at_epoch} in {', '.join(short)}; the last one before it is used")
    return Comparison(arms, _differing(arms), at_epoch if at_epoch is not None else common, last, warnings)


def _require_same_files(arms: Sequence[RecordedRun]) -> None:
    first = arms[0]
    for arm in arms:
        if other := next((set(point.accuracy) for point in arm.points if set(point.accuracy) != set(first.points[0].accuracy)), None):
            names = (", ".join(sorted(found)) for found in (set(first.points[0].accuracy), other))
            raise UsageError(f"compare: {first.name} and {arm.name} were scored on different conditions ({' against '.join(names)})")


def refuse_unlike(comparison: Comparison) -> None:
    """Check that recorded scores are comparable.

    Raises:
        UsageError: classifiers or sampling settings differ.
    """
    evaluators = {arm.name: sorted(digest[:12] for digest in arm.evaluators) for arm in comparison.arms if arm.evaluators}
    unlike = [f"{name} {' against '.join(map(str, comparison.differing[name]))}" for name in SAMPLING if name in comparison.differing]
    if len({tuple(found) for found in evaluators.values()}) > 1:
        unlike.insert(0, "classifiers " + " against ".join("/".join(found) for found in evaluators.values()))
    if unlike:
        raise UsageError(f"compare: the recorded scores are not comparable ({'; '.join(unlike)}); omit --recorded to score again, or add --anyway")


def load_recorded_run(path: Path, name: str) -> RecordedRun:
    """Return the evaluations recorded in a run or in the file names of a folder of checkpoints.

    Raises:
        UsageError: there is no such folder.
        NothingRecorded: it has no evaluation.
        DataError: a record is damaged.
    """
    run = Run(path)
    if run.config_file.is_file():
        scored = scored_in(run)
        unique = {one.epoch: Point(one.epoch, one.loss, one.accuracy, one.exact) for one in scored}
        settings: dict[str, Value] | None = run.config().flat()
        evaluators = frozenset(one.evaluator for one in scored)
    else:
        recorded = [recorded_in_name(file) for file in find_checkpoints(path)]
        named = [Point(int(r.pop("epoch")), math.nan, r) for r in recorded if len(r) > 1]
        unique, settings, evaluators = {point.epoch: point for point in named}, None, frozenset()
    if unique and not all(point.accuracy for point in unique.values()):
        raise NothingRecorded(f"{path}: was trained without a classifier, so no score is recorded")
    if not unique:
        raise NothingRecorded(f"{path}: no evaluation is recorded (neither in results.csv nor in file names such as epoch315_0.625_0.619.pth)")
    return RecordedRun(name, settings, tuple(unique[epoch] for epoch in sorted(unique)), evaluators)


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return the folders' names, or the given paths if the names are not unique."""
    names = [path.resolve().name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _differing(arms: Sequence[RecordedRun]) -> dict[str, tuple[Value, ...]]:
    known = [arm.settings for arm in arms if arm.settings is not None]
    if len(known) < 2:
        return {}
    names = [name for name in known[0] if name not in IGNORED and len({repr(settings[name]) for settings in known}) > 1]
    return {name: tuple("unknown" if arm.settings is None else arm.settings[name] for arm in arms) for name in names}


def _warnings(arms: Sequence[RecordedRun]) -> tuple[str, ...]:
    warnings = []
    if len(frozenset().union(*(arm.evaluators for arm in arms))) > 1:
        warnings.append("the scores come from different classifiers and cannot be compared")
    if any(arm.settings is None for arm in arms):
        warnings.append("scores read from file names are single draws by an unknown classifier")
    return tuple(warnings)
