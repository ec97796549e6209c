"""Select the best checkpoint and score it again on new noise."""

from __future__ import annotations

import collections.abc
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ddpmctl.errors import DataError
from ddpmctl.evaluation.evaluate import EvaluationSpec, evaluate_checkpoints
from ddpmctl.evaluation.results import CheckpointResult, EvaluationEvent, pooled_tally
from ddpmctl.evaluation.scores import pooled
from ddpmctl.statistics.intervals import Interval, accuracy_interval
from ddpmctl.statistics.ranking import Standing, best_index

OTHER_NOISE = 1_000_003  # added to the seed for the second evaluation


@dataclass(frozen=True)
class Selection:
    """The best of several checkpoints.

    Attributes:
        best: its result in the selection.
        choosing: its pooled accuracy in the selection, which is biased upwards.
        confirming: its pooled accuracy on new noise, the unbiased value to report.
    """

    best: CheckpointResult
    choosing: float
    confirming: Interval


def best_of(rows: Sequence[CheckpointResult]) -> int:
    """Return the index of the checkpoint with the best standing, pooled over all condition files."""
    together = [pooled(list(row.scores.values())) for row in rows]
    return best_index([Standing.of(score.accuracy, score.exact_match, row.epoch) for score, row in zip(together, rows, strict=True)])


def confirm_best(rows: Sequence[CheckpointResult], spec: EvaluationSpec) -> collections.abc.Generator[EvaluationEvent, None, Selection]:
    """Select the best checkpoint, score it again on new noise, and return both scores.

    Raises:
        DataError: its file can no longer be read.
    """
    best = rows[best_of(rows)]
    again = replace(spec, seed=spec.seed + OTHER_NOISE, grids=None)
    confirmed, failures = yield from evaluate_checkpoints([best.path], again)
    if failures:
        raise DataError(f"{best.path}: {failures[0].reason}")
    names = list(best.answers)
    interval = accuracy_interval(pooled_tally(confirmed[0].answers, names))
    return Selection(best, pooled_tally(best.answers, names).accuracy, interval)
