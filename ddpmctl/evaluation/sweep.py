"""Evaluate several values of one sampling setting."""

from __future__ import annotations

import collections.abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ddpmctl.config import Value
from ddpmctl.evaluation.evaluate import EvaluationSpec, evaluate_checkpoints
from ddpmctl.evaluation.results import CheckpointResult, EvaluationEvent, Failed, pooled_tally
from ddpmctl.evaluation.scores import pooled
from ddpmctl.statistics.intervals import Interval, accuracy_interval


@dataclass(frozen=True)
class SweepPoint:
    """The result of one checkpoint at one value.

    Attributes:
        nfe: network calls per image.
        accuracy: pooled over all condition files.
        exact: exact match rate.
    """

    value: Value
    nfe: int
    accuracy: Interval
    exact: float


def evaluate_sweep(
    paths: Sequence[Path], spec: EvaluationSpec, setting: str, values: Sequence[Value]
) -> collections.abc.Generator[EvaluationEvent, None, tuple[Mapping[Path, Sequence[SweepPoint]], list[Failed]]]:
    """Evaluate every checkpoint at every value of a sampling setting; return the points and the failures."""
    found: dict[Path, list[SweepPoint]] = {}
    failures: list[Failed] = []
    for value in values:
        rows, failed = yield from evaluate_checkpoints(paths, replace(spec, sampling={**spec.sampling, setting: value}, grids=None))
        failures += failed
        for row in rows:
            found.setdefault(row.path, []).append(_point(row, value, spec))
    return found, failures


def _point(row: CheckpointResult, value: Value, spec: EvaluationSpec) -> SweepPoint:
    from torch import nn

    from ddpmctl.diffusion.denoiser import Diffusion
    from ddpmctl.sampling.pipeline import SamplingPipeline

    calls = SamplingPipeline(nn.Identity(), Diffusion.of(row.config.diffusion), row.sampling, spec.tools().compute).nfe
    return SweepPoint(value, calls, accuracy_interval(pooled_tally(row.answers, list(row.answers))), pooled(list(row.scores.values())).exact_match)
