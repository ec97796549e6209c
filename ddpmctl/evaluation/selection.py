"""Which of several checkpoints is best, and how good it is on pictures that had no part in the choice."""

from __future__ import annotations

import collections.abc
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ddpmctl.errors import DataError
from ddpmctl.evaluation.evaluate import Task, evaluate
from ddpmctl.evaluation.results import EvaluationEvent, Failed, Judged, pooled_tally
from ddpmctl.statistics.intervals import Interval, accuracy_interval
from ddpmctl.statistics.selection import chosen

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

    best: Judged
    confirmed: Judged
    choosing: float
    confirming: Interval


def best_of(rows: Sequence[Judged]) -> int:
    """Return the index of the checkpoint with the highest accuracy pooled over all condition files, the first of equals."""
    return chosen([pooled_tally(row.answers, list(row.answers)) for row in rows])


def confirm(rows: Sequence[Judged], task: Task) -> collections.abc.Generator[EvaluationEvent, None, Selection]:
    """Choose the best of checkpoints that were judged under a task, judge it again on other noise, and return both scores.

    Raises:
        DataError: its file can no longer be used.
    """
    best = rows[best_of(rows)]
    again = replace(task, seed=task.seed + OTHER_NOISE, grids=None)
    confirmed: Judged | None = None
    for event in evaluate([best.path], again):
        if isinstance(event, Judged):
            confirmed = event
        elif isinstance(event, Failed):
            raise DataError(f"{event.path}: {event.reason}")
        else:
            yield event
    assert confirmed is not None  # evaluate yields one or the other for each file
    names = list(best.answers)
    interval = accuracy_interval(pooled_tally(confirmed.answers, names))
    return Selection(best, confirmed, pooled_tally(best.answers, names).accuracy, interval)
