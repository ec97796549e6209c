"""Which of several checkpoints is best, and how good it is on pictures that had no part in the choice."""

from __future__ import annotations

import collections.abc
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ddpmctl.errors import DataError
from ddpmctl.evaluation.evaluate import EvaluationSpec, evaluate_checkpoints
from ddpmctl.evaluation.results import CheckpointResult, EvaluationEvent, Failed, pooled_tally
from ddpmctl.statistics.intervals import Interval, accuracy_interval
from ddpmctl.statistics.tallies import Tally

OTHER_NOISE = 1_000_003  # added to the seed: a seed of its own for the second look


@dataclass(frozen=True)
class Selection:
    """The best of several checkpoints.

    Attributes:
        best: as it was chosen.
        confirmed: the same checkpoint on other noise.
        choosing: the pooled accuracy that it was chosen by, too high by the luck of the draw.
        confirming: the pooled accuracy on other noise, with its interval: the one to report.
    """

    best: CheckpointResult
    confirmed: CheckpointResult
    choosing: float
    confirming: Interval


def best_of(rows: Sequence[CheckpointResult]) -> int:
    """Return the index of the checkpoint with the highest accuracy pooled over all condition files, the first of equals."""
    return best_index([pooled_tally(row.answers, list(row.answers)) for row in rows])


def best_index(tallies: Sequence[Tally]) -> int:
    """Return the index of the highest accuracy, the first of equals.

    The highest of several noisy scores is biased upwards (the winner's curse); ``confirm_best`` scores the choice again on other noise.
    """
    return max(range(len(tallies)), key=lambda index: (tallies[index].accuracy, -index))


def confirm_best(rows: Sequence[CheckpointResult], spec: EvaluationSpec) -> collections.abc.Generator[EvaluationEvent, None, Selection]:
    """Choose the best of checkpoints that were judged under a task, judge it again on other noise, and return both scores.

    Raises:
        DataError: its file can no longer be used.
    """
    best = rows[best_of(rows)]
    again = replace(spec, seed=spec.seed + OTHER_NOISE, grids=None)
    confirmed: CheckpointResult | None = None
    for event in evaluate_checkpoints([best.path], again):
        if isinstance(event, CheckpointResult):
            confirmed = event
        elif isinstance(event, Failed):
            raise DataError(f"{event.path}: {event.reason}")
        else:
            yield event
    assert confirmed is not None  # evaluate yields one or the other for each file
    names = list(best.answers)
    interval = accuracy_interval(pooled_tally(confirmed.answers, names))
    return Selection(best, confirmed, pooled_tally(best.answers, names).accuracy, interval)
