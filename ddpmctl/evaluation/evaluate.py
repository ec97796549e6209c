"""Score checkpoints on condition files; results are cached.

What the cache has is found without loading torch, which takes longer than all the rest.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from ddpmctl import __version__
from ddpmctl.checkpoints.exported import open_checkpoint
from ddpmctl.checkpoints.outline import CheckpointOutline, outline_in
from ddpmctl.config import Config, Value
from ddpmctl.diffusion.schedules import make_schedule
from ddpmctl.distributed.job import SINGLE, Job
from ddpmctl.errors import DataError, DdpmctlError
from ddpmctl.evaluation.classifier_file import ClassifierFile, KnownClassifier
from ddpmctl.evaluation.remembered_device import RememberedDevice
from ddpmctl.evaluation.result_cache import load_results, result_key, save_results, with_more_repeats
from ddpmctl.evaluation.results import CheckpointResult, EvaluationEvent, Failed, FileResults
from ddpmctl.files import named_after
from ddpmctl.grids import save_grid
from ddpmctl.progress import Progress
from ddpmctl.sampling.requests import BATCH, Batch, ImageRequest, in_batches, requests_for, with_actual_steps
from ddpmctl.task import require_same_task

if TYPE_CHECKING:
    from ddpmctl.checkpoints.format import Checkpoint
    from ddpmctl.device import ComputeDevice
    from ddpmctl.evaluation.classifiers import Classifier
    from ddpmctl.evaluation.scoring import ScoredBatch, ScoredImages
    from ddpmctl.sampling.pipeline import SamplingPipeline


class Tools(NamedTuple):
    """The loaded classifier and the compute device."""

    classifier: Classifier
    compute: ComputeDevice


@dataclass(frozen=True)
class EvaluationSpec:
    """The settings of an evaluation.

    Attributes:
        conditions: label sets by condition file.
        classifier, compute: what scores the images, or what is known of it before it is loaded.
        repeats: images per condition.
        sampling: flat settings that replace the checkpoint's.
        assume: flat settings for checkpoints without settings.
        grids: folder for sample grids, or None.
        titles: names of checkpoints whose file names are not unique.
        every_image: return and cache all images, not only the first of each condition.
    """

    conditions: Mapping[str, Sequence[tuple[str, ...]]]
    classifier: KnownClassifier
    compute: ComputeDevice | RememberedDevice
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
            self.classifier.sha256, self.compute.precision, self.compute.kind, self.seed,
        ]  # fmt: skip

    def tools(self) -> Tools:
        """Return classifier and device, loaded.

        Raises:
            UsageError, DataError: one of them cannot be used.
        """
        compute = self.compute.load() if isinstance(self.compute, RememberedDevice) else self.compute
        classifier = self.classifier.load(str(compute.device)) if isinstance(self.classifier, ClassifierFile) else self.classifier
        return Tools(cast("Classifier", classifier), compute)


def evaluate_checkpoints(paths: Sequence[Path], spec: EvaluationSpec) -> Generator[EvaluationEvent, None, tuple[list[CheckpointResult], list[Failed]]]:
    """Score checkpoints: yield progress and each failure; return the results and the failures, in order and on every rank.

    Results of unchanged files and settings are read from the cache. All ranks of a job sample and score batches; rank 0 collects them.
    """
    queue: deque[_Due | Failed] = deque()
    worker = _Worker(spec)
    rows: list[CheckpointResult] = []
    failures: list[Failed] = []
    parts: list[ScoredBatch | Failed] = []

    def conclude() -> Iterator[Failed]:
        due = queue.popleft()
        if not isinstance(due, Failed):
            due = next((part for part in parts if isinstance(part, Failed)), due)
        if isinstance(due, Failed):
            failures.append(due)
            yield due
        else:
            rows.append(_concluded(due, [part for part in parts if not isinstance(part, Failed)], spec))
        parts.clear()

    for item in spec.job.map_ordered(worker.score, _missing_batches(paths, spec, worker, queue)):
        if isinstance(item, Progress):
            yield item
            continue
        while isinstance(queue[0], Failed) or not queue[0].missing:  # complete in the cache
            yield from conclude()
        parts.append(item)
        if len(parts) == queue[0].batches:
            yield from conclude()
    while queue:
        yield from conclude()
    return spec.job.from_leader(lambda: (rows, failures))


def pipeline_for(checkpoint: Checkpoint, sampling: Mapping[str, Value], compute: ComputeDevice) -> SamplingPipeline:
    """Return the sampling pipeline of a checkpoint; ``sampling`` replaces settings by flat name.

    Raises:
        UsageError: a sampling setting does not fit the model, such as more steps than T.
    """
    import torch

    from ddpmctl.diffusion.denoiser import Diffusion
    from ddpmctl.sampling.pipeline import SamplingPipeline
    from ddpmctl.sampling.recognition import require_recogniser

    config = checkpoint.config.replace(**sampling)
    require_recogniser(config)
    net = checkpoint.network().to(compute.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return SamplingPipeline(net, Diffusion.of(config.diffusion), config.sampling, compute, str(checkpoint.path), checkpoint.task)


def used_config(checkpoint: CheckpointOutline, spec: EvaluationSpec) -> Config:
    """Return the settings for sampling from a checkpoint, with the actual number of steps instead of auto.

    Raises:
        UsageError: a sampling setting does not fit the model.
    """
    config = checkpoint.config.replace(**spec.sampling)
    if config.sampling.particles > 1 and (spec.sampling or spec.assume):  # a checkpoint's own settings were checked when it was trained
        from ddpmctl.sampling.recognition import require_recogniser

        require_recogniser(config)
    return replace(config, sampling=with_actual_steps(config.sampling, make_schedule(config.diffusion)))


@dataclass(frozen=True)
class _Due:
    """A checkpoint with its cached results and the missing images, by condition file."""

    outline: CheckpointOutline
    config: Config
    keys: dict[str, str]
    answers: dict[str, FileResults]
    missing: dict[str, list[ImageRequest]]

    @property
    def batches(self) -> int:
        """The number of batches of the missing images."""
        return math.ceil(sum(map(len, self.missing.values())) / BATCH)


def _due(outline: CheckpointOutline, spec: EvaluationSpec) -> _Due:
    require_same_task(str(outline.path), outline.task, spec.classifier.describe(), spec.classifier.task)
    config = used_config(outline, spec)
    content = spec.content(outline.sha256, config)
    keys = {name: result_key(content, name, sets) for name, sets in spec.conditions.items()}
    # A grid shows every image, but the cache has only the first image of each condition.
    answers = {} if spec.grids else {name: found for name, key in keys.items() if (found := load_results(key, spec.conditions[name], spec.classifier.task))}
    if spec.every_image:
        answers = {name: found for name, found in answers.items() if found.has_every_image}
    missing = {
        name: requests_for(name, sets, seed=spec.seed, repeats=spec.repeats, first=answers[name].repeats if name in answers else 0)
        for name, sets in spec.conditions.items()
    }
    return _Due(outline, config, keys, answers, {name: requests for name, requests in missing.items() if requests})


def _concluded(due: _Due, parts: Sequence[ScoredBatch], spec: EvaluationSpec) -> CheckpointResult:
    """Cache the results of a checkpoint, write its grids, and return its result."""
    outline, answers = due.outline, dict(due.answers)
    for name, scored_images in _by_file(due, parts).items():
        answers[name] = with_more_repeats(answers.get(name), spec.conditions[name], scored_images, every_image=spec.every_image)
        save_results(due.keys[name], answers[name])
        if spec.grids:
            captions = ["\n".join(r.labels) for r in scored_images.requests]
            title = spec.titles.get(outline.path, outline.path.stem)
            save_grid(spec.grids / named_after(title, f"_{name}.png"), scored_images.images, captions, columns=max(8, spec.repeats))
    asked = {name: answers[name].first(spec.repeats) for name in spec.conditions}
    return CheckpointResult(outline.path, outline.sha256, outline.epoch, outline.loss, outline.recorded, asked, due.config, outline.foreign, not due.missing)


def _by_file(due: _Due, parts: Sequence[ScoredBatch]) -> dict[str, ScoredImages]:
    if not parts:
        return {}
    from ddpmctl.evaluation.scoring import by_condition_file

    return by_condition_file(due.missing, parts, due.outline.task)


def _missing_batches(paths: Sequence[Path], spec: EvaluationSpec, worker: _Worker, queue: deque[_Due | Failed]) -> Iterator[_CheckpointBatch]:
    """Yield the missing batches, checkpoint by checkpoint; append each checkpoint to ``queue`` before its first batch."""
    with ThreadPoolExecutor(1, "load") as ahead:  # load the next file while sampling from this one
        loading = [ahead.submit(_prepared, path, spec) for path in paths[:1]]
        for path, following in itertools.zip_longest(paths, paths[1:]):
            current = loading.pop()
            if following is not None:
                loading.append(ahead.submit(_prepared, following, spec))
            try:
                due, checkpoint = current.result()
            except DdpmctlError as error:
                queue.append(Failed(path, _reason(error, path)))
                continue
            if checkpoint is not None:
                worker.offer(checkpoint)
            queue.append(due)
            for batch in in_batches([request for group in due.missing.values() for request in group]):
                yield _CheckpointBatch(path, due.outline.sha256, batch)


def _prepared(path: Path, spec: EvaluationSpec) -> tuple[_Due, Checkpoint | None]:
    """Return which results of a checkpoint are missing, and the loaded checkpoint if any are."""
    with open_checkpoint(path) as file:
        outline, where = outline_in(path, file, spec.assume)
        due = _due(outline, spec)
        if not due.missing:
            return due, None

        from ddpmctl.checkpoints.format import load_weights

        return due, load_weights(outline, file, where)


def _reason(error: DdpmctlError, path: Path) -> str:
    return str(error).removeprefix(f"{path}: ")


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
        self._unusable: dict[str, str] = {}  # reasons by hash

    def offer(self, checkpoint: Checkpoint) -> None:
        """Keep a loaded checkpoint for the next batch, unless another one is kept."""
        self._offered = self._offered or checkpoint

    def score(self, work: _CheckpointBatch) -> Generator[Progress, None, ScoredBatch | Failed]:
        """Sample and score one batch; of a network whose images are not finite, only one batch is sampled.

        Raises:
            DataError: the file differs from the file on rank 0.
        """
        if work.sha256 in self._unusable:
            return Failed(work.path, self._unusable[work.sha256])
        from ddpmctl.checkpoints.format import load_checkpoint
        from ddpmctl.evaluation.scoring import score_batch
        from ddpmctl.sampling.pipeline import NotFiniteError

        classifier, compute = self._spec.tools()
        if self._last is None or self._last[0] != work.sha256:
            offered = self._offered
            checkpoint = offered if offered and offered.sha256 == work.sha256 else load_checkpoint(work.path, self._spec.assume)
            if checkpoint.sha256 != work.sha256:
                raise DataError(f"{work.path}: is not the same file as on rank 0")
            self._last = work.sha256, pipeline_for(checkpoint, self._spec.sampling, compute)
        self._offered = None
        try:
            return (yield from score_batch(self._last[1], classifier, work.batch))
        except NotFiniteError as error:
            self._unusable[work.sha256] = _reason(error, work.path)
            return Failed(work.path, self._unusable[work.sha256])
