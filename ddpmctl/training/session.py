"""Start a training run, or resume one."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from ddpmctl.benchmark.embedded import scene_count
from ddpmctl.checkpoints.format import Checkpoint
from ddpmctl.config import RECIPE, Config, Value, settings
from ddpmctl.data.dataset import Dataset, load_conditions, load_dataset
from ddpmctl.data.source import DataSource
from ddpmctl.device import ComputeDevice, make_compute_device, threads_that_fit
from ddpmctl.distributed.job import SINGLE, Job
from ddpmctl.distributed.replicas import replicas
from ddpmctl.errors import UsageError
from ddpmctl.evaluation.classifier_file import BUILT_IN, NoClassifierError
from ddpmctl.evaluation.classifiers import Classifier, load_classifier
from ddpmctl.files import prepare_folder
from ddpmctl.iclevr import ICLEVR
from ddpmctl.progress import Notice, Progress
from ddpmctl.runs.conditions import save_conditions
from ddpmctl.runs.folder import Run, TakenError, create_run, name_for, open_run
from ddpmctl.runs.lock import locked
from ddpmctl.runs.sources import RunSources
from ddpmctl.task import Task
from ddpmctl.training.events import Event, Prepared
from ddpmctl.training.loop import training_events
from ddpmctl.training.plan import Plan, check_room, make_plan
from ddpmctl.training.resuming import changed_bits
from ddpmctl.training.starting import load_start
from ddpmctl.training.trainer import Trainer, require_trainable


@dataclass(frozen=True)
class TrainingRequest:
    """What to train, on what, and where.

    Attributes:
        source: the training data.
        classifier: file of the classifier that scores; None for the default one of the data.
        weights: the checkpoint to start from, whose network the settings have; None for random weights.
        name: of the run's folder in ``runs_dir``; None for one made from the settings.
        resume: the run to resume; None for a new one.
        exist_ok: resume the run of that name if it exists.
        job: the processes that train together.
        received: returns the number of a signal that this process received, 0 for none.
        continued: returns how often this process went on after it was halted.
    """

    config: Config
    source: DataSource = field(default_factory=DataSource)
    classifier: Path | None = None
    weights: Path | None = None
    name: str | None = None
    runs_dir: Path = Path("runs")
    resume: Path | None = None
    exist_ok: bool = False
    job: Job = SINGLE
    received: Callable[[], int] = int
    continued: Callable[[], int] = int

    @property
    def folder(self) -> Path:
        """The run's folder, if no other run has its name."""
        return self.resume or self.runs_dir / (self.name or name_for(self.config))


def run_training(request: TrainingRequest) -> Generator[Event, None, None]:
    """Train, yielding events: progress of loading the data, ``Prepared``, then those of the training loop.

    Raises:
        UsageError, DataError: the request cannot be carried out.
    """
    if not request.exist_ok and not request.resume and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
        raise UsageError("--exist-ok: torchrun --max-restarts repeats the same command; add --exist-ok resume, so that it resumes the run")
    recorded = _recorded(request)
    compute, request = _on_device(request, recorded)
    if recorded is None:
        yield from _begin(request, compute)
    elif request.resume:
        yield from _resume(request, compute, recorded)
    else:
        yield from _resume_existing(request, compute, recorded)


def plan_only(request: TrainingRequest) -> Plan:
    """Return the plan of ``run_training``, without creating a folder or loading images."""
    compute, request = _on_device(request, _recorded(request))
    if request.resume or (request.name and Run(request.folder).config_file.is_file()):
        sources = RunSources.load(open_run(request.folder).data_file)
        request = replace(request, source=_moved(sources.source, request), classifier=request.classifier or sources.evaluator)
    conditions = load_conditions(request.source)
    task, count = conditions.task, conditions.images
    classifier, missing = _classifier(request, request.source, task, compute)
    no_images = Dataset(conditions.name, "", np.zeros((count, 3, 1, 1), np.uint8), np.zeros((count, task.columns), np.uint8), {}, None, task)
    return make_plan(Trainer(request.config, compute, no_images), request.folder, classifier.describe() if classifier else missing)


def _recorded(request: TrainingRequest) -> Config | None:
    """Return the settings of the run that is resumed, None for a new run."""

    def read() -> Config | None:
        exists = request.resume or (request.exist_ok and Run(request.folder).config_file.is_file())
        return open_run(request.folder).config() if exists else None

    return request.job.from_leader(read)


def _on_device(request: TrainingRequest, recorded: Config | None) -> tuple[ComputeDevice, TrainingRequest]:
    """Return the device, and the request with the precision and the number of threads that a resumed run must keep.

    What ``--exist-ok resume`` leaves open is taken from the existing run (``recorded``); what a new run leaves open is decided here.
    """
    config, job = request.config, request.job
    require_trainable(config)
    job.require_same("setting", {key: value for key, value in config.flat().items() if key not in ("device", "threads")})
    if recorded is not None and not request.resume:  # --resume begins with the run's settings
        kept: dict[str, Value] = {"precision": recorded.device.precision} if config.device.precision == "auto" else {}
        if config.device.threads is None:
            kept["threads"] = threads_that_fit(recorded.device.threads)
        config = config.replace(**kept)
    config = config.replace(precision=job.from_leader(lambda: make_compute_device(config.device).precision))
    compute = make_compute_device(config.device, job.local)
    by_torchrun = not job.is_single and "OMP_NUM_THREADS" in os.environ  # the same on every machine
    if recorded is None and config.device.threads is None and compute.device.type == "cpu" and not by_torchrun:
        config = config.replace(threads=torch.get_num_threads())
        make_compute_device(config.device, job.local)  # set as a resumed run sets it
    return compute, replace(request, config=config)


def _begin(request: TrainingRequest, compute: ComputeDevice) -> Generator[Event, None, None]:
    config, job = request.config, request.job
    task = load_conditions(request.source).task
    classifier, missing = _classifier(request, request.source, task, compute)
    if missing:
        yield Notice(f"{missing}; the run has losses and images, but no scores")
    if job.is_leader:
        prepare_folder(request.runs_dir, "--runs-dir")
        check_room(config, request.runs_dir, task)
    dataset = yield from _load(request)
    start = None if request.weights is None else load_start(request.weights, dataset.task, job)
    sources = RunSources(
        source=_absolute(request.source),
        key=dataset.key,
        evaluator=None if classifier is None or classifier.name == BUILT_IN else Path(classifier.name).resolve(),
        evaluator_sha256="" if classifier is None else classifier.sha256,
        task=dataset.task,
        weights="" if start is None else start.sha256,
    )

    def make() -> Path | None:
        try:
            return create_run(request.runs_dir, request.folder.name if request.exist_ok else request.name, config, sources).folder
        except TakenError:
            if not request.exist_ok:
                raise
            return None  # another process has just made it

    made = job.from_leader(make)
    if made is None:
        recorded = _recorded(request)
        assert recorded is not None  # otherwise its name would not be taken
        yield from _resume_existing(request, compute, recorded)
        return
    run = Run(made)
    with locked(run) if job.is_leader else nullcontext():
        if job.is_leader and dataset.task.scored != ICLEVR.scored:
            save_conditions(run, dataset.conditions)
        yield from _follow(request, run, dataset, classifier, compute, recorded=None, start=start)


def _resume_existing(request: TrainingRequest, compute: ComputeDevice, recorded: Config) -> Generator[Event, None, None]:
    """Resume the run of the request's name."""
    _require_same_run(request, recorded)
    yield Notice(f"{request.folder}: exists already; resuming it")
    yield from _resume(replace(request, resume=request.folder), compute, recorded)


def _require_same_run(request: TrainingRequest, recorded: Config) -> None:
    """Check that the existing run has the request's settings and data."""
    folder, job, before = request.folder, request.job, recorded.flat()
    names = {setting.name for section in RECIPE for setting in settings(section)}
    others = [f"{key}: {before[key]} in the run, {value} now" for key, value in request.config.flat().items() if key in names and before[key] != value]
    sources = job.from_leader(lambda: RunSources.load(Run(folder).data_file))
    before_data, now_data = (replace(source, path=None) for source in (sources.source, _absolute(request.source)))
    if before_data.scenes != now_data.scenes:
        others.append(f"scenes: {before_data.scenes} in the run, {request.source.scenes} now")
    elif before_data != now_data:
        others.append("how the images are read, such as --size, differs")
    if others:
        raise UsageError(f"--exist-ok: {folder} has other settings ({'; '.join(others)}); give the new run another --name")


def _resume(request: TrainingRequest, compute: ComputeDevice, recorded: Config) -> Generator[Event, None, None]:
    """Resume a run with its own data and classifier."""
    folder, job = request.folder, request.job
    run = Run(folder)
    if changed := changed_bits(recorded, request.config, compute, job):
        yield Notice(f"{folder}: resumes with {changed}; its last bits will differ from those of an uninterrupted run")
    sources = job.from_leader(lambda: RunSources.load(run.data_file))
    if request.source.path is not None and sources.source.path is None:
        raise UsageError("--data: the run trains on the embedded benchmark, and a resumed run keeps its data")
    source = _moved(sources.source, request)
    data = source.path
    if data is not None and not data.exists():
        raise UsageError(f"{data}: the run's data folder no longer exists; give the new one with --data DIR")
    named = replace(request, classifier=request.classifier or sources.evaluator)
    classifier = _classifier(named, source, sources.task, compute)[0] if sources.evaluator_sha256 else None  # a run without scores goes on without
    if classifier is not None and classifier.sha256 != sources.evaluator_sha256:
        theirs = sources.evaluator_sha256[:12]
        raise UsageError(f"--resume {folder}: its scores are by evaluator {theirs}, not by {classifier.describe()}; name the file with --evaluator")
    with locked(run) if job.is_leader else nullcontext():
        if job.is_leader:
            check_room(request.config, folder, sources.task, already=len(list(run.checkpoints.glob("*.pth"))))
        dataset = yield from _load(replace(request, source=source))
        yield from _follow(request, run, dataset, classifier, compute, recorded=recorded)


def _moved(source: DataSource, request: TrainingRequest) -> DataSource:
    """Return a run's data, from where the request says: the folder may have moved; its content is checked against the run's."""
    return source if request.source.path is None else replace(source, path=request.source.path)


def _absolute(source: DataSource) -> DataSource:
    """Return data so that another process finds them: with the whole path, and the number of scenes."""
    if source.path is None:
        return replace(source, scenes=scene_count(source.scenes))
    return replace(source, path=source.path.resolve())


def _described(classifier: Classifier | None) -> str:
    """Return the classifier in words, with its warning if it has one."""
    if classifier is None:
        return "none, so nothing is scored"
    return "; ".join(filter(None, (classifier.describe(), classifier.warning)))


def _classifier(request: TrainingRequest, source: DataSource, task: Task, compute: ComputeDevice) -> tuple[Classifier | None, str]:
    """Return the classifier that scores, or None and the reason: data of its own have none until one is trained.

    Raises:
        UsageError, DataError: it cannot be used.
    """
    if not task.classes:
        return None, "the images have no labels to score"
    try:
        return load_classifier(request.classifier, source.path, compute.device, task), ""
    except NoClassifierError as error:
        return None, str(error)


def _load(request: TrainingRequest) -> Generator[Event, None, Dataset]:
    with request.job.first_on_each_machine():
        dataset = yield from load_dataset(request.source)
    request.job.require_same("data set", {"its content": dataset.key[:12]})
    return dataset


def _follow(
    request: TrainingRequest, run: Run, dataset: Dataset, classifier: Classifier | None, compute: ComputeDevice,
    *, recorded: Config | None, start: Checkpoint | None = None,
) -> Generator[Event, None, None]:  # fmt: skip
    """Train to the end; ``recorded``: the settings that a resumed run had before; ``start``: the checkpoint that a new one begins with."""
    with replicas(request.job, compute.device) as together:
        weights = None if start is None else start.weights
        trainer = Trainer(request.config, compute, dataset, replicas=together, received=request.received, continued=request.continued, start=weights)
        yield Progress("measuring the speed", 0, 1)  # of one small batch, which takes long for a large network
        plan = make_plan(trainer, run.folder, _described(classifier))
        yield Progress("measuring the speed", 1, 1)
        yield Prepared(plan)
        yield from training_events(trainer, run, classifier, recorded=recorded, resume=recorded is not None)
