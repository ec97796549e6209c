"""Scoring checkpoints: many files, each on every condition file; results are kept by content."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ddpmctl import __version__
from ddpmctl.checkpoints.format import Checkpoint, load_checkpoint
from ddpmctl.config import Config, Value
from ddpmctl.device import ComputeDevice
from ddpmctl.diffusion.denoiser import Diffusion
from ddpmctl.diffusion.schedules import make_schedule
from ddpmctl.distributed.job import SINGLE, Job, gathered
from ddpmctl.errors import DataError, DdpmctlError
from ddpmctl.evaluation.classifiers import Classifier
from ddpmctl.evaluation.result_cache import load_results, result_key, save_results, with_more_repeats
from ddpmctl.evaluation.results import CheckpointResult, EvaluationEvent, Failed, FileResults
from ddpmctl.evaluation.scoring import ScoredImages, by_condition_file, score_batch, score_requests
from ddpmctl.grids import save_grid
from ddpmctl.progress import Progress
from ddpmctl.sampling.pipeline import ImageRequest, SamplingPipeline, in_batches, requests_for, with_actual_steps


@dataclass(frozen=True)
class EvaluationSpec:
    """What every checkpoint is put through.

    Attributes:
        conditions: label sets by condition file.
        sampling: flat settings that replace the checkpoint's own.
        assume: flat settings for checkpoints that carry none.
        repeats: pictures a condition.
        grids: folder for sample grids, or None.
        titles: names for checkpoints whose file names are not unique.
        ranks: the processes that share the work.
    """

    conditions: Mapping[str, Sequence[tuple[str, ...]]]
    classifier: Classifier
    compute: ComputeDevice
    seed: int = 0
    repeats: int = 1
    sampling: Mapping[str, Value] = field(default_factory=dict)
    assume: Mapping[str, Value] = field(default_factory=dict)
    grids: Path | None = None
    titles: Mapping[Path, str] = field(default_factory=dict)
    job: Job = SINGLE

    def content(self, sha256: str, config: Config) -> list[object]:
        """Return everything that the answers depend on but the condition file and the number of pictures."""
        return [
            __version__, sha256, asdict(config.model), asdict(config.diffusion), asdict(config.sampling),
            self.classifier.sha256, self.compute.precision, self.compute.device.type, self.seed,
        ]  # fmt: skip


def evaluate_checkpoints(paths: Sequence[Path], spec: EvaluationSpec) -> Iterator[EvaluationEvent]:
    """Yield a ``Judged`` or ``Failed`` for each checkpoint, with progress between.

    Unchanged files under an unchanged task are answered from the results kept in the cache. With several ranks, each makes its share of
    the pictures, and each yields the same results.
    """
    if not spec.job.is_single:
        yield from _evaluate_shared(paths, spec)
        return
    with ThreadPoolExecutor(1, "load") as ahead:  # the next file is read and checked while this one's pictures are made
        loading = [ahead.submit(load_checkpoint, path, spec.assume) for path in paths[:1]]
        for path, following in itertools.zip_longest(paths, paths[1:]):
            current = loading.pop()
            if following is not None:
                loading.append(ahead.submit(load_checkpoint, following, spec.assume))
            try:
                yield from _judge_one(current.result(), spec)
            except DdpmctlError as error:
                yield _failed(path, error)


def pipeline_for(checkpoint: Checkpoint, sampling: Mapping[str, Value], compute: ComputeDevice) -> SamplingPipeline:
    """Return a painter of pictures from a checkpoint; ``sampling`` replaces settings by flat name.

    Raises:
        DataError: the weights do not fit the checkpoint's settings.
        UsageError: a sampling setting does not fit the model, such as more steps than T.
    """
    config = checkpoint.config.replace(**sampling)
    net = checkpoint.network().to(compute.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return SamplingPipeline(net, Diffusion.of(config.diffusion), config.sampling, compute)


def used_config(checkpoint: Checkpoint, spec: EvaluationSpec) -> Config:
    """Return the settings that a checkpoint is judged with, the number of sampler steps that auto comes to included.

    Raises:
        UsageError: a sampling setting does not fit the model.
    """
    config = checkpoint.config.replace(**spec.sampling)
    return replace(config, sampling=with_actual_steps(config.sampling, make_schedule(config.diffusion)))


@dataclass(frozen=True)
class _Due:
    """One checkpoint with what is known of it so far, and the pictures that are missing, by condition file."""

    checkpoint: Checkpoint
    config: Config
    keys: dict[str, str]
    answers: dict[str, FileResults]
    missing: dict[str, list[ImageRequest]]


def _due(checkpoint: Checkpoint, spec: EvaluationSpec) -> _Due:
    config = used_config(checkpoint, spec)
    content = spec.content(checkpoint.sha256, config)
    keys = {name: result_key(content, name, sets) for name, sets in spec.conditions.items()}
    # A grid shows every picture, and of those that were judged before only the first are kept.
    answers = {} if spec.grids else {name: found for name, key in keys.items() if (found := load_results(key, spec.conditions[name]))}
    missing = {
        name: requests_for(name, sets, seed=spec.seed, repeats=spec.repeats, first=answers[name].repeats if name in answers else 0)
        for name, sets in spec.conditions.items()
    }
    return _Due(checkpoint, config, keys, answers, {name: requests for name, requests in missing.items() if requests})


def _judge_one(checkpoint: Checkpoint, spec: EvaluationSpec) -> Iterator[EvaluationEvent]:
    due = _due(checkpoint, spec)
    scored = {}
    if due.missing:
        scored = yield from score_requests(pipeline_for(checkpoint, spec.sampling, spec.compute), spec.classifier, due.missing)
    yield _concluded(due, scored, spec)


def _concluded(due: _Due, scored: Mapping[str, ScoredImages], spec: EvaluationSpec) -> CheckpointResult:
    """Keep the answers, draw the grids, and return the checkpoint's result."""
    checkpoint, answers = due.checkpoint, dict(due.answers)
    for name, scored_images in scored.items():
        answers[name] = with_more_repeats(answers.get(name), spec.conditions[name], scored_images)
        save_results(due.keys[name], answers[name])
        if spec.grids:
            captions = [", ".join(r.labels) for r in scored_images.requests]
            title = spec.titles.get(checkpoint.path, checkpoint.path.stem)
            save_grid(spec.grids / f"{title}_{name}.png", scored_images.images, captions, columns=max(8, spec.repeats))
    asked = {name: answers[name].first(spec.repeats) for name in spec.conditions}
    return CheckpointResult(
        checkpoint.path, checkpoint.sha256, checkpoint.epoch, checkpoint.loss, checkpoint.recorded, asked, due.config, checkpoint.foreign, not due.missing
    )


def _evaluate_shared(paths: Sequence[Path], spec: EvaluationSpec) -> Iterator[EvaluationEvent]:
    """Yield what one process yields, on every rank; the missing pictures are made by all of them, batch by batch in turn.

    Rank 0 says what is missing, for the kept answers are in its cache; the others hear of the results when all are there.
    """
    job = spec.job
    dues = [_due_or_failed(path, spec) for path in paths] if job.is_leader else []
    batches = job.from_leader(lambda: [_Batch.of(due, part) for due in dues if isinstance(due, _Due) for part in in_batches(_flat(due))])
    maker = _Maker(spec)
    results = gathered(job, [functools.partial(maker.make, batch) for batch in batches])
    events: list[EvaluationEvent] = []
    for due in dues:
        if isinstance(due, Failed):
            events.append(due)
        else:
            scored = yield from _collected(due, results)
            events.append(_concluded(due, scored, spec))
        yield events[-1]
    if not job.is_leader:
        next(results, None)  # makes this rank's share; the results are rank 0's
    said = job.from_leader(lambda: events)
    if not job.is_leader:
        yield from said


def _due_or_failed(path: Path, spec: EvaluationSpec) -> _Due | Failed:
    try:
        due = _due(load_checkpoint(path, spec.assume), spec)
    except DdpmctlError as error:
        return _failed(path, error)
    return replace(due, checkpoint=replace(due.checkpoint, weights={}))  # read again by who makes its pictures: many do not fit in memory


def _failed(path: Path, error: DdpmctlError) -> Failed:
    return Failed(path, str(error).removeprefix(f"{path}: "))


def _flat(due: _Due) -> list[ImageRequest]:
    return [request for group in due.missing.values() for request in group]


def _collected(due: _Due, results: Iterator[tuple[Tensor, Tensor]]) -> Generator[EvaluationEvent, None, dict[str, ScoredImages]]:
    """Take a checkpoint's batches from the stream of all results."""
    total, done = len(_flat(due)), 0
    parts = []
    while done < total:
        parts.append(next(results))
        done += len(parts[-1][0])
        yield Progress("sampling", done, total)
    return by_condition_file(due.missing, *zip(*parts, strict=True)) if parts else {}


class _Batch(NamedTuple):
    """Pictures to make in one go, of the checkpoint in a file."""

    path: Path
    sha256: str
    requests: Sequence[ImageRequest]

    @staticmethod
    def of(due: _Due, requests: Sequence[ImageRequest]) -> _Batch:
        return _Batch(due.checkpoint.path, due.checkpoint.sha256, requests)


class _Maker:
    """Makes batches of pictures, keeping the network of the last one."""

    def __init__(self, spec: EvaluationSpec) -> None:
        self._spec = spec
        self._last: tuple[Path, SamplingPipeline] | None = None

    def make(self, batch: _Batch) -> tuple[Tensor, Tensor]:
        """Return pictures and answers.

        Raises:
            DataError: this rank finds another file under the path than rank 0.
        """
        if self._last is None or self._last[0] != batch.path:
            checkpoint = load_checkpoint(batch.path, self._spec.assume)
            if checkpoint.sha256 != batch.sha256:
                raise DataError(f"{batch.path}: is another file here than on rank 0")
            self._last = batch.path, pipeline_for(checkpoint, self._spec.sampling, self._spec.compute)
        return score_batch(self._last[1], self._spec.classifier, batch.requests)
