"""Training runs: the stream of events from the first step to the last checkpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ddpmctl.checkpoints.format import load_tensor_bytes, load_tensors, not_finite, save_checkpoint, save_tensors
from ddpmctl.config import RECIPE, Config, Value
from ddpmctl.data.dataset import Dataset
from ddpmctl.device import ComputeDevice
from ddpmctl.distributed.job import SINGLE, Job
from ddpmctl.errors import DataError, DdpmctlError, DivergedError, show
from ddpmctl.evaluation.classifiers import Classifier
from ddpmctl.evaluation.scoring import score_conditions
from ddpmctl.files import atomic_write
from ddpmctl.grids import save_grid
from ddpmctl.progress import Notice
from ddpmctl.sampling.pipeline import SamplingPipeline
from ddpmctl.training.disk_space import room_for
from ddpmctl.training.events import EpochDone, Evaluated, Event, Finished, Overridden, Plan, RolledBack, Saved, Started, StepDone, StopAgreed, Ticked
from ddpmctl.training.log import NoLog, RunLog
from ddpmctl.training.run_folder import Run, save_config
from ddpmctl.training.trainer import Diverged, Trainer, probe_seconds_per_image

LOG_STEPS = 50
TICK_SECONDS = 0.5
MAX_ROLLBACKS = 3
SCORED = ("test", "new_test")


def make_plan(config: Config, run: Path, dataset_name: str, images: int, compute: ComputeDevice, evaluator: str, job: Job = SINGLE) -> Plan:
    """Return what training will do, with its duration estimated from two real steps (over several ranks, as if they shared without a loss)."""
    from ddpmctl.diffusion.schedules import make_schedule
    from ddpmctl.training.trainer import make_network

    training = config.training
    per_epoch = -(-images // training.batch_size)
    seconds = 60 * training.minutes if training.minutes is not None else None
    if training.epochs is not None:
        seconds = training.epochs * images * job.from_leader(lambda: probe_seconds_per_image(config, compute)) / job.size
    return Plan(
        config=config,
        run=run,
        data=dataset_name,
        images=images,
        parameters=sum(p.numel() for p in make_network(config).parameters()),
        device=compute.describe() if job.is_single else f"{job.size} processes, each on {compute.describe()}",
        precision=compute.precision,
        steps_per_epoch=per_epoch,
        steps=None if training.epochs is None else training.epochs * per_epoch,
        seconds=seconds,
        terminal_snr=make_schedule(config.diffusion).terminal_snr,
        evaluator=evaluator,
        disk=str(room_for(config)),
    )


def training_events(
    plan: Plan,
    run: Run,
    dataset: Dataset,
    evaluator: Classifier,
    compute: ComputeDevice,
    *,
    resume: bool = False,
    recorded: Config | None = None,
    job: Job = SINGLE,
    asked: Callable[[], int] = int,
) -> Generator[Event, None, None]:
    """Train until the budget is used up, yielding events; the run's files are written here, whoever listens.

    A reader that stops early loses nothing: on leaving, a state is written from which ``resume`` goes on. The caller holds the run (``held``).
    With several ranks, rank 0 alone scores and writes; a reader then stops at ``StopAgreed``, which is where all of them do.

    Args:
        plan: the settings, and what was said of them.
        run: the folder to write to.
        dataset: images (N, 3, 64, 64) and labels (N, 24).
        evaluator: scores each saved checkpoint.
        machine: where to train.
        resume: go on from the run's state.
        recorded: the settings that the state must be of, where the plan's are to replace them from now on.
        ranks: this process among those that train together, in a ``process_group``.
        asked: the number of a signal that has asked this process for an end, 0 for none.

    Raises:
        DataError: there is no usable state to resume from.
        DivergedError: the numbers are no longer finite; what is known of them stands in the run's diagnosis.json.
        UsageError: the disk is full, or a batch does not fit in memory.
        PeerError: another rank is gone.
    """
    trainer, log = Trainer(plan.config, compute, dataset, job=job, asked=asked), RunLog(run) if job.is_leader else NoLog(run)
    yield from _begin(trainer, log, run, recorded or plan.config, resume=resume)
    yield Started(plan, trainer.counters.step)
    try:
        for event in _with_rollbacks(trainer, log, run, evaluator):
            log.read(event)
            yield event
    except GeneratorExit:
        # Raised where an event was yielded, so never in the middle of a step.
        save_state(trainer, log, run)
        raise


def save_state(trainer: Trainer, log: RunLog, run: Run) -> None:
    """Write all that is needed to go on from here, and how long the log is here; of several ranks, which are equal, the first one does."""
    if not trainer.job.is_leader:
        return
    state = trainer.state()
    save_tensors(run.state_file, {**state, "log": log.sizes()})


def _begin(trainer: Trainer, log: RunLog, run: Run, recorded: Config, *, resume: bool) -> Iterator[Event]:
    """Bring the trainer to the run's state, or write the first one: from then on there is always something to go back to."""
    if not resume:
        save_state(trainer, log, run)
        return
    if trainer.job.from_leader(lambda: run.is_untouched):
        yield Notice(f"{run.folder}: nothing was trained here yet; training begins at its first step")
        log.cut({})
        save_state(trainer, log, run)
        return
    yield from _restore(trainer, log, run, recorded)
    changed = _recipe_changes(recorded, trainer.config)
    if changed:
        save_state(trainer, log, run)  # from here on the state is one of the new settings
        if trainer.job.is_leader:
            save_config(run, trainer.config)
        event = Overridden(trainer.counters.step, changed)
        log.read(event)
        yield event


def _restore(trainer: Trainer, log: RunLog, run: Run, recorded: Config) -> Iterator[Event]:
    where = str(run.state_file)
    state = _state_of_first(trainer, run)
    trainer.restore(state, where)
    try:
        of = Config.from_flat({name: value for section in state["config"].values() for name, value in section.items()})
        sizes = dict(state["log"])
    except (KeyError, TypeError, AttributeError, ValueError, DdpmctlError) as error:
        raise DataError(f"{where}: lacks a part or has it in another form ({show(repr(error))})") from None
    if other := _recipe_changes(of, recorded):
        changes = "; ".join(f"{name}: {before} in the state, {now} in config.toml" for name, (before, now) in other.items())
        raise DataError(f"{where}: is of other settings than {run.config_file.name} ({changes}); restore the file, and change settings with --override")
    if short := log.cut(sizes):
        yield Notice(f"{run.folder}: {', '.join(short)} lost rows after the state was saved; they are not made anew")


def _state_of_first(trainer: Trainer, run: Run) -> Any:
    """Return the run's state as rank 0 finds it: other machines may not see its disk, and it may be written anew before they look."""
    if trainer.job.is_single:
        return load_tensors(run.state_file)[0]
    from ddpmctl.distributed.ddp import bytes_of_first
    from ddpmctl.distributed.job import peer_errors

    data = b""
    if trainer.job.is_leader:
        load_tensors(run.state_file)  # refuses what is damaged before the others hear of it
        data = run.state_file.read_bytes()
    with peer_errors():
        return load_tensor_bytes(bytes_of_first(trainer.job, data, trainer.compute.device), str(run.state_file))


def _recipe_changes(before: Config, now: Config) -> dict[str, tuple[Value, Value]]:
    old, new = before.to_dict(), now.to_dict()
    return {name: (value, new[section][name]) for section in RECIPE for name, value in old[section].items() if value != new[section][name]}


def _with_rollbacks(trainer: Trainer, log: RunLog, run: Run, evaluator: Classifier) -> Iterator[Event]:
    """Yield training's events; where numbers are no longer finite, write down what is known and, if told to, go back and try again."""
    begun = time.perf_counter()
    while True:
        try:
            yield from _events(trainer, log, run, evaluator)
            yield Finished(run.folder, trainer.counters.epoch, time.perf_counter() - begun)
            return
        except Diverged as error:
            reason = str(error)
            if trainer.job.is_leader:
                _write_diagnosis(run, error)
            seen_by_all = trainer.job.is_single or "batch_indices" in error.diagnosis  # found in a step, and not by rank 0 alone while it saves
        problem = f"{reason}; what is known stands in {run.diagnosis_file}"
        if trainer.config.run.on_nan != "rollback" or not seen_by_all:
            raise DivergedError(f"{problem}. The last good state is kept: resume with --on-nan rollback, or train anew with a lower --lr or --precision fp32")
        if trainer.counters.rollbacks >= MAX_ROLLBACKS:
            raise DivergedError(f"{problem}. It was rolled back {MAX_ROLLBACKS} times already; train anew with a lower --lr or --precision fp32")
        yield from _restore(trainer, log, run, trainer.config)
        trainer.counters.rollbacks += 1
        trainer.counters.lr_scale /= 2
        yield RolledBack(reason, trainer.counters.step, trainer.counters.lr_scale, trainer.counters.rollbacks)
        save_state(trainer, log, run)


def _write_diagnosis(run: Run, error: Diverged) -> None:
    last = run.pointer("latest")
    known = {"reason": str(error), **error.diagnosis, "last_checkpoint": None if last is None else last.name, "state": run.state_file.name}
    with atomic_write(run.diagnosis_file) as temporary:
        temporary.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def _events(trainer: Trainer, log: RunLog, run: Run, evaluator: Classifier) -> Iterator[Event]:
    """Yield the events of training; wherever one is yielded, a state that is saved there goes on with what follows it."""
    last_tick, counters = 0.0, trainer.counters
    last_saved = time.perf_counter()
    minutes = trainer.config.run.checkpoint_minutes
    while True:
        if trainer.epoch_is_over:
            yield _end_epoch(trainer)
        if _score_is_due(trainer):
            yield from _score_and_save(trainer, log, run, evaluator) if trainer.job.is_leader else _wait_for_score(trainer)
            last_saved = time.perf_counter()
        if trainer.done:
            return
        if minutes is not None and time.perf_counter() - last_saved > 60 * minutes:
            save_state(trainer, log, run)
            last_saved = time.perf_counter()
            yield Saved(run.state_file)
        trainer.step()
        if counters.step % LOG_STEPS == 0:
            done = StepDone(counters.step, counters.epoch + 1, counters.images_seen, trainer.mean_loss("logged"), counters.lr, counters.seconds)
            trainer.end_logged()
            yield done
        if trainer.stop:
            yield StopAgreed(trainer.stop)
        if time.perf_counter() - last_tick > TICK_SECONDS:
            last_tick = time.perf_counter()
            yield _tick(trainer)


def _score_is_due(trainer: Trainer) -> bool:
    counters = trainer.counters
    due = trainer.done or counters.epoch % trainer.config.training.save_every == 0
    return counters.batch == 0 and counters.epoch > counters.scored_epoch and due


def _end_epoch(trainer: Trainer) -> EpochDone:
    # Counters move on before their event is yielded: a reader may leave there, and the state is then saved as it stands.
    counters, loss = trainer.counters, trainer.mean_loss("epoch")
    rate = counters.epoch_images / max(counters.epoch_seconds, 1e-9)
    trainer.end_epoch(loss)
    return EpochDone(counters.epoch, counters.step, counters.images_seen, loss, counters.lr, counters.seconds, rate)


def _tick(trainer: Trainer) -> Ticked:
    counters = trainer.counters
    rate = counters.images_seen / max(counters.seconds, 1e-9)
    loss = trainer.mean_loss("epoch") if counters.epoch_images else counters.last_loss
    return Ticked(counters.step, counters.epoch + 1, loss, rate, trainer.fraction)


def _score_and_save(trainer: Trainer, log: RunLog, run: Run, evaluator: Classifier) -> Iterator[Event]:
    config, counters = trainer.config, trainer.counters
    pipeline = SamplingPipeline(trainer.sampling_network(), trainer.diffusion, config.sampling, trainer.compute)
    scored = yield from score_conditions(pipeline, evaluator, {name: trainer.dataset.conditions[name] for name in SCORED}, seed=config.training.seed)
    scores = {name: scored_images.score for name, scored_images in scored.items()}
    path = run.checkpoints / f"epoch{counters.epoch}_{scores['test'].accuracy}_{scores['new_test'].accuracy}.pth"
    known = {
        "epoch": counters.epoch, "step": counters.step, "images_seen": counters.images_seen, "loss": counters.last_loss, "seconds": counters.seconds,
        "scores": {name: value.to_dict() for name, value in scores.items()}, "evaluator": evaluator.sha256, "data": trainer.dataset.key,
    }  # fmt: skip
    weights = trainer.weights()
    if (bad := not_finite(weights)) is not None:
        raise Diverged(f"the weights {bad!r} are not finite after step {counters.step}", {"step": counters.step, "name": bad})
    save_checkpoint(path, config, weights, **known)
    for name, scored_images in scored.items():
        save_grid(run.samples / f"epoch{counters.epoch}_{name}.png", scored_images.images, [", ".join(r.labels) for r in scored_images.requests])
    run.point("latest", path)
    mean = sum(value.accuracy for value in scores.values()) / len(scores)
    if mean > counters.best:
        counters.best = mean
        run.point("best", path)
    counters.scored_epoch = counters.epoch
    if not trainer.job.is_single:
        trainer.job.from_leader(lambda: None)  # ends the others' waiting
    yield Evaluated(counters.epoch, counters.step, counters.images_seen, counters.last_loss, counters.seconds, scores, evaluator.sha256, path)
    save_state(trainer, log, run)
    if config.run.keep is not None:
        run.retain(config.run.keep)
    yield Saved(path)
    yield Saved(run.state_file)


def _wait_for_score(trainer: Trainer) -> Iterator[Event]:
    """Wait while rank 0 makes and scores its pictures, which may take longer than ranks wait for each other within a step."""
    counters = trainer.counters
    while not trainer.job.wait_for_leader(until=trainer.asked):
        yield StopAgreed(trainer.asked())
    counters.scored_epoch = counters.epoch


class Sources(NamedTuple):
    """What a run was made from: the lab's folder or the scenes of the embedded benchmark, and the evaluator's file and hash."""

    data: Path | None
    scenes: int | None
    evaluator: Path | None
    evaluator_sha256: str


def resumed_sources(run: Run) -> Sources:
    """Return what ``data.json`` records of a run's data and evaluator.

    Raises:
        DataError: the file is missing or damaged.
    """
    try:
        content = json.loads(run.data_file.read_text(encoding="utf-8"))
        data, scenes = (None, int(content["scenes"])) if content["data"] is None else (Path(content["data"]), None)
        evaluator = None if content["evaluator"] is None else Path(content["evaluator"])
        return Sources(data, scenes, evaluator, str(content["evaluator_sha256"]))
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{run.data_file}: missing or damaged, so the run's data are unknown") from None
