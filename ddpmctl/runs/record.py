"""What a run's files tell: losses, scores, and how far it got. Reads results.csv, metrics.jsonl and timing.jsonl, and loads no weights."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpmctl.config import Config
from ddpmctl.errors import DataError, UsageError
from ddpmctl.files import read_plain
from ddpmctl.iclevr import ICLEVR
from ddpmctl.runs.folder import MAX_LOG_BYTES, Run, open_run
from ddpmctl.runs.lock import is_locked
from ddpmctl.runs.sources import RunSources
from ddpmctl.statistics.ranking import Standing

SCORED = ICLEVR.scored  # where a run has not been scored yet
NO_JUDGE = "none"  # in the place of a classifier's hash


@dataclass(frozen=True)
class Scored:
    """A row of results.csv; numbers that it lacks are NaN.

    Attributes:
        seconds: duration of the training steps so far.
        accuracy, exact: by condition file.
    """

    epoch: int
    seconds: float
    loss: float
    accuracy: dict[str, float]
    exact: dict[str, float]
    evaluator: str
    checkpoint: str

    @property
    def standing(self) -> Standing:
        """Its place among the run's checkpoints, by the means over the condition files."""
        return Standing.of(mean(self.accuracy), mean(self.exact), self.epoch)


@dataclass(frozen=True)
class Loss:
    """The mean loss over an epoch; ``seconds`` are NaN where they are not recorded."""

    epoch: int
    loss: float
    seconds: float


@dataclass(frozen=True)
class Record:
    """One run.

    Attributes:
        data: what it trains on, in words.
        losses: one for each epoch, by epoch.
        scored: one for each score, by epoch.
        running: whether a process trains it now.
        expected: the condition files that its first score will be about; none without a classifier.
        drawn: those whose images are kept.
    """

    run: Run
    config: Config
    data: str
    losses: tuple[Loss, ...]
    scored: tuple[Scored, ...]
    running: bool
    expected: tuple[str, ...] = SCORED
    drawn: tuple[str, ...] = SCORED

    @property
    def state(self) -> str:
        """``running``, ``finished`` (the budget is used up) or ``stopped``."""
        if self.running:
            return "running"
        training, last = self.config.training, self.last
        if last is None:
            return "stopped"
        done = last.epoch >= training.epochs if training.epochs is not None else last.seconds >= 60 * (training.minutes or math.inf)
        return "finished" if done else "stopped"

    @property
    def epochs(self) -> int:
        """Epochs that are trained."""
        return max([*(point.epoch for point in self.losses), *(one.epoch for one in self.scored)], default=0)

    @property
    def seconds(self) -> float:
        """Duration of the training steps up to the last epoch or score; 0 where it is not known."""
        return max(filter(math.isfinite, [*(point.seconds for point in self.losses), *(one.seconds for one in self.scored)]), default=0.0)

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return size_of(self.run.folder)

    @property
    def files(self) -> tuple[str, ...]:
        """The condition files that are scored."""
        return tuple(self.last.accuracy) if self.last else self.expected

    @property
    def expected_images(self) -> tuple[str, ...]:
        """The condition files of which each score keeps a grid of images."""
        return self.files or self.drawn

    @property
    def last(self) -> Scored | None:
        """The latest score; None before the first."""
        return self.scored[-1] if self.scored else None

    @property
    def best(self) -> Scored | None:
        """The score with the best standing."""
        return max(self.scored, key=lambda one: one.standing, default=None)


def scored_names(columns: Collection[str]) -> tuple[str, ...]:
    """Return the condition files that the columns of results.csv are about: those with an exact match; none of a run without a classifier."""
    found = tuple(name for name in columns if f"{name}_exact" in columns)
    return found or tuple(name for name in SCORED if name in columns)


def mean(by_file: Mapping[str, float]) -> float:
    """Return the mean over the condition files; NaN where there is none."""
    return sum(by_file.values()) / len(by_file) if by_file else math.nan


def read_record(folder: Path) -> Record:
    """Return what a run's files tell.

    Raises:
        UsageError: the folder is not a run, or a setting is not valid.
        DataError: a file is damaged.
    """
    run = open_run(folder)
    sources = RunSources.load(run.data_file)
    drawn = sources.task.scored
    expected = drawn if sources.evaluator_sha256 else ()
    return Record(run, run.config(), sources.describe(), _losses(run), scored_in(run), is_locked(run), expected, drawn)


def scored_in(run: Run) -> tuple[Scored, ...]:
    """Return the scores of a run by epoch; of two rows for an epoch, as a resumed run may have, the later.

    Raises:
        DataError: results.csv is damaged.
    """
    unique = {(found := _scored(run, row)).epoch: found for row in run.results()}
    return tuple(unique[epoch] for epoch in sorted(unique))


def _scored(run: Run, row: Mapping[str, str]) -> Scored:
    def number(name: str) -> float:
        return float(row.get(name) or math.nan)

    try:
        files = scored_names([name for name in row if name])
        accuracy, exact = {name: number(name) for name in files}, {name: number(f"{name}_exact") for name in files}
        if not files and row["evaluator"] != NO_JUDGE:
            raise ValueError
        found = Scored(int(row["epoch"]), number("seconds"), float(row["loss"]), accuracy, exact, row["evaluator"], row.get("checkpoint") or "")
        if found.epoch < 1 or not all(0 <= value <= 1 for value in accuracy.values()) or None in row or not found.evaluator:
            raise ValueError
        return found
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{run.results_file}: a row is not in the form that train writes: {row}") from None


def _losses(run: Run) -> tuple[Loss, ...]:
    seconds = {row.get("step"): row.get("seconds") for row in _lines(run.timing_file)}
    try:
        every = [Loss(int(row["epoch"]), float(row["loss"]), float(seconds.get(row["step"]) or math.nan)) for row in _lines(run.metrics_file)]
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{run.metrics_file}: a line is not in the form that train writes") from None
    found = {point.epoch: point for point in every}
    return tuple(found[epoch] for epoch in sorted(found))


def _lines(file: Path) -> list[dict[str, Any]]:
    """Return the records of the epochs in a file of JSON lines; a process may be writing the last line."""
    try:
        whole = read_plain(file, MAX_LOG_BYTES).rpartition(b"\n")[0].decode()
        rows = [json.loads(line) for line in whole.splitlines() if '"event": "epoch"' in line]
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("not an object")
        return rows
    except FileNotFoundError:
        return []
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: cannot be read as lines of JSON ({error})") from None


def size_of(folder: Path) -> int:
    """Return the bytes of all files below a folder; links are not followed."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(Path(place, name)).st_size
            except OSError:  # removed meanwhile, by a run that is going on
                continue
    return total


def run_folders(parent: Path) -> list[Path]:
    """Return the run folders in a folder, by name: those with a file config.toml."""
    return sorted(file.parent for file in parent.glob("*/config.toml") if not file.parent.name.startswith("."))


def newest_run(parent: Path) -> Path:
    """Return the run in a folder in which something was written last.

    Raises:
        UsageError: there is none.
    """
    written = []
    for folder in run_folders(parent):
        run = Run(folder)
        files = (run.config_file, run.metrics_file, run.results_file, run.state_file)
        written.append((max((file.stat().st_mtime_ns for file in files if file.is_file()), default=0), folder))
    if not written:
        raise UsageError(f"{parent}/ has no run; train first, or name a run")
    return max(written)[1]
