"""Score checkpoints on condition files; results are cached."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch

from ddpmctl import __version__
from ddpmctl.checkpoints.format import Checkpoint, load_checkpoint
from ddpmctl.config import Config, Value
from ddpmctl.device import ComputeDevice
from ddpmctl.diffusion.denoiser import Diffusion
from ddpmctl.diffusion.schedules import make_schedule
from ddpmctl.distributed.job import SINGLE, Job
from ddpmctl.errors import DataError, DdpmctlError
from ddpmctl.evaluation.classifiers import Classifier
from ddpmctl.evaluation.result_cache import load_results, result_key, save_results, with_more_repeats
from ddpmctl.evaluation.results import CheckpointResult, EvaluationEvent, Failed, FileResults
from ddpmctl.evaluation.scoring import ScoredBatch, by_condition_file, score_batch
from ddpmctl.files import named_after
from ddpmctl.grids import save_grid
from ddpmctl.progress import Progress
from ddpmctl.sampling.pipeline import Batch, ImageRequest, SamplingPipeline, in_batches, requests_for, require_recogniser, with_actual_steps


@dataclass(frozen=True)
class EvaluationSpec:
    """The settings of an evaluation.

    Attributes:
        conditions: label sets by condition file.
        repeats: images per condition.
        sampling: flat settings that replace the checkpoint's.
        assume: flat settings for checkpoints without settings.
        grids: folder for sample grids, or None.
        titles: names of checkpoints whose file names are not unique.
        every_image: return and cache all images, not only the first of each condition.
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
    every_image: bool = False

    def content(self, sha256: str, config: Config) -> list[object]:
        """Return everything that the results depend on, except the condition file and the number of repeats."""
        return [
            __version__, sha256, asdict(config.model), asdict(config.diffusion), asdict(config.sampling),
            self.classifier.sha256, self.compute.precision, self.compute.device.type, self.seed,
        ]  # fmt: skip


def evaluate_checkpoints(paths: Sequence[Path], spec: EvaluationSpec) -> Generator[EvaluationEvent, None, tuple[list[CheckpointResult], list[Failed]]]:
    """Score checkpoints: yield progress and each failure; return the results and the failures, in order and on every rank.

    Results of unchanged files and settings are read from the cache. All ranks of a job sample and score batches; rank 0 collects them.
    """
    queue: deque[_Due | Failed] = deque()
    worker = _Worker(spec)
    rows: list[CheckpointResult] = []
    failures: list[Failed] = []
    parts: list[ScoredBatch] = []

    def conclude() -> Iterator[Failed]:
        due = queue.popleft()
        if isinstance(due, Failed):
            failures.append(due)
            yield due
        else:
            rows.append(_concluded(due, parts, spec))
            parts.clear()

    for item in spec.job.map_ordered(worker.score, _missing_batches(paths, spec, worker, queue)):
        if isinstance(item, Progress):
            yield item
            continue
        while isinstance(queue[0], Failed) or not queue[0].missing:  # complete in the cache
            yield from conclude()
        parts.append(item)
        if sum(len(part.images) for part in parts) == queue[0].count:
            yield from conclude()
    while queue:
        yield from conclude()
    return spec.job.from_leader(lambda: (rows, failures))


def pipeline_for(checkpoint: Checkpoint, sampling: Mapping[str, Value], compute: ComputeDevice) -> SamplingPipeline:
    """Return the sampling pipeline of a checkpoint; ``sampling`` replaces settings by flat name.

    Raises:
        UsageError: a sampling setting does not fit the model, such as more steps than T.
    """
    config = _sampling_config(checkpoint, sampling)
    net = checkpoint.network().to(compute.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return SamplingPipeline(net, Diffusion.of(config.diffusion), config.sampling, compute)


def used_config(checkpoint: Checkpoint, spec: EvaluationSpec) -> Config:
    """Return the settings for sampling from a checkpoint, with the actual number of steps instead of auto.

    Raises:
        UsageError: a sampling setting does not fit the model.
    """
    config = _sampling_config(checkpoint, spec.sampling)
    return replace(config, sampling=with_actual_steps(config.sampling, make_schedule(config.diffusion)))


def _sampling_config(checkpoint: Checkpoint, sampling: Mapping[str, Value]) -> Config:
    config = checkpoint.config.replace(**sampling)
    require_recogniser(config)
    return config


@dataclass(frozen=True)
class _Due:
    """A checkpoint with its cached results and the missing images, by condition file."""

    checkpoint: Checkpoint
    config: Config
    keys: dict[str, str]
    answers: dict[str, FileResults]
    missing: dict[str, list[ImageRequest]]

    @property
    def count(self) -> int:
        """The number of missing images."""
        return sum(map(len, self.missing.values()))


def _due(checkpoint: Checkpoint, spec: EvaluationSpec) -> _Due:
    config = used_config(checkpoint, spec)
    content = spec.content(checkpoint.sha256, config)
    keys = {name: result_key(content, name, sets) for name, sets in spec.conditions.items()}
    # A grid shows every image, but the cache has only the first image of each condition.
    answers = {} if spec.grids else {name: found for name, key in keys.items() if (found := load_results(key, spec.conditions[name]))}
    if spec.every_image:
        answers = {name: found for name, found in answers.items() if found.has_every_image}
    missing = {
        name: requests_for(name, sets, seed=spec.seed, repeats=spec.repeats, first=answers[name].repeats if name in answers else 0)
        for name, sets in spec.conditions.items()
    }
    return _Due(checkpoint, config, keys, answers, {name: requests for name, requests in missing.items() if requests})


def _concluded(due: _Due, parts: Sequence[ScoredBatch], spec: EvaluationSpec) -> CheckpointResult:
    """Cache the results of a checkpoint, write its grids, and return its result."""
    checkpoint, answers = due.checkpoint, dict(due.answers)
    scored = by_condition_file(due.missing, parts) if parts else {}
    for name, scored_images in scored.items():
        answers[name] = with_more_repeats(answers.get(name), spec.conditions[name], scored_images, every_image=spec.every_image)
        save_results(due.keys[name], answers[name])
        if spec.grids:
            captions = [", ".join(r.labels) for r in scored_images.requests]
            title = spec.titles.get(checkpoint.path, checkpoint.path.stem)
            save_grid(spec.grids / named_after(title, f"_{name}.png"), scored_images.images, captions, columns=max(8, spec.repeats))
    asked = {name: answers[name].first(spec.repeats) for name in spec.conditions}
    return CheckpointResult(
        checkpoint.path, checkpoint.sha256, checkpoint.epoch, checkpoint.loss, checkpoint.recorded, asked, due.config, checkpoint.foreign, not due.missing
    )


def _missing_batches(paths: Sequence[Path], spec: EvaluationSpec, worker: _Worker, queue: deque[_Due | Failed]) -> Iterator[_CheckpointBatch]:
    """Yield the missing batches, checkpoint by checkpoint; append each checkpoint to ``queue`` before its first batch."""
    with ThreadPoolExecutor(1, "load") as ahead:  # load the next file while sampling from this one
        loading = [ahead.submit(load_checkpoint, path, spec.assume) for path in paths[:1]]
        for path, following in itertools.zip_longest(paths, paths[1:]):
            current = loading.pop()
            if following is not None:
                loading.append(ahead.submit(load_checkpoint, following, spec.assume))
            try:
                checkpoint = current.result()
                due = _due(checkpoint, spec)
            except DdpmctlError as error:
                queue.append(Failed(path, str(error).removeprefix(f"{path}: ")))
                continue
            if due.missing:
                worker.offer(checkpoint)
            queue.append(replace(due, checkpoint=replace(checkpoint, weights={})))  # weights of many checkpoints do not fit in memory
            for batch in in_batches([request for group in due.missing.values() for request in group]):
                yield _CheckpointBatch(path, checkpoint.sha256, batch)


class _CheckpointBatch(NamedTuple):
    """A batch of images of one checkpoint."""

    path: Path
    sha256: str
    batch: Batch


class _Worker:
    """Samples and scores batches; keeps the last network."""

    def __init__(self, spec: EvaluationSpec) -> None:
        self._spec = spec
        self._offered: Checkpoint | None = None
        self._last: tuple[str, SamplingPipeline] | None = None

    def offer(self, checkpoint: Checkpoint) -> None:
        """Keep a loaded checkpoint for the next batch, unless another one is kept."""
        self._offered = self._offered or checkpoint

    def score(self, work: _CheckpointBatch) -> Generator[Progress, None, ScoredBatch]:
        """Sample and score one batch.

        Raises:
            DataError: the file differs from the file on rank 0.
        """
        if self._last is None or self._last[0] != work.sha256:
            offered = self._offered
            checkpoint = offered if offered and offered.sha256 == work.sha256 else load_checkpoint(work.path, self._spec.assume)
            if checkpoint.sha256 != work.sha256:
                raise DataError(f"{work.path}: is not the same file as on rank 0")
            self._last = work.sha256, pipeline_for(checkpoint, self._spec.sampling, self._spec.compute)
        self._offered = None
        return (yield from score_batch(self._last[1], self._spec.classifier, work.batch))
