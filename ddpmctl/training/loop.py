"""Training runs: the stream of events from the first step to the last checkpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator
from contextlib import suppress

import torch

from ddpmctl.checkpoints.format import checked_bytes, load_tensor_bytes, not_finite, save_checkpoint, save_tensors
from ddpmctl.config import RECIPE, Config, Value
from ddpmctl.errors import DataError, DdpmctlError, DivergedError, show
from ddpmctl.evaluation.classifiers import Classifier
from ddpmctl.evaluation.fidelity import sharpness
from ddpmctl.evaluation.scoring import NoJudge, score_conditions
from ddpmctl.files import write_text
from ddpmctl.grids import save_grid
from ddpmctl.progress import Notice
from ddpmctl.runs.abandoned import abandon
from ddpmctl.runs.folder import Run, save_config
from ddpmctl.runs.record import NO_JUDGE, mean, scored_in
from ddpmctl.sampling.pipeline import NotFiniteError, SamplingPipeline, label_tensor
from ddpmctl.statistics.ranking import Standing
from ddpmctl.training.events import EpochDone, Evaluated, Event, Overridden, Resumed, RolledBack, Saved, StepDone, StopAgreed, Ticked
from ddpmctl.training.gradients import Diverged
from ddpmctl.training.log import RunLog
from ddpmctl.training.state import restore, training_state
from ddpmctl.training.trainer import Trainer

LOG_STEPS = 50
TICK_SECONDS = 0.5
MAX_ROLLBACKS = 3


def training_events(
    trainer: Trainer, run: Run, classifier: Classifier | None, *, recorded: Config | None = None, resume: bool = False
) -> Generator[Event, None, None]:
    """Train until the budget is used up, yielding events; this also writes the run's files.

    When the generator is closed early, it writes a state from which ``resume`` continues. The caller holds the run's lock.
    With several processes, only rank 0 scores and writes, and callers stop only at ``StopAgreed``, which all ranks yield after the same step.

    Args:
        trainer: before its first step.
        run: the folder to write to.
        classifier: scores each saved checkpoint; None: images are made, and nothing is scored.
        recorded: settings that the state must have, if the trainer's are to replace them.
        resume: continue from the run's state.

    Raises:
        DataError: there is no usable state to resume from.
        DivergedError: NaN or inf; details are in the run's diagnosis.json.
        UsageError: the disk is full, the run's folder is gone, or a batch does not fit in memory.
        PeerError: another process failed.
    """
    log = RunLog(run, writes=trainer.replicas.job.is_leader)
    yield from _begin(trainer, log, run, recorded or trainer.config, resume=resume)
    try:
        for event in _with_rollbacks(trainer, log, run, classifier):
            log.read(event)
            yield event
    except GeneratorExit:
        # Raised at a yield, so never in the middle of a step.
        save_state(trainer, log, run)
        raise
    except (OSError, DdpmctlError):
        log.require_folder()  # the reason of whatever failed
        raise


def save_state(trainer: Trainer, log: RunLog, run: Run) -> None:
    """Write the state and the sizes of the log files; only rank 0 writes."""
    if not trainer.replicas.job.is_leader:
        return
    save_tensors(run.state_file, {**training_state(trainer), "log": log.sizes()})


def _begin(trainer: Trainer, log: RunLog, run: Run, recorded: Config, *, resume: bool) -> Iterator[Event]:
    """Restore the run's state, or write the first one, so that there is always a state to resume from."""
    if not resume:
        save_state(trainer, log, run)
        return
    if trainer.replicas.job.from_leader(lambda: run.is_untouched):
        yield Notice(f"{run.folder}: nothing was trained here yet; training starts at the first step")
        log.cut({})
        save_state(trainer, log, run)
        return
    yield from _restore(trainer, log, run, recorded)
    if not trainer.done:
        used, seconds = trainer.fraction, trainer.counters.seconds
        yield Resumed(trainer.counters.step, trainer.counters.epoch + 1, used, seconds * (1 - used) / used if used else None)
    changed = _recipe_changes(recorded, trainer.config)
    if changed:
        save_state(trainer, log, run)  # from now on the state has the new settings
        if trainer.replicas.job.is_leader:
            # Where this machine had too few cores for the recorded number of threads, that number stays.
            save_config(run, trainer.config.replace(threads=trainer.config.device.threads or recorded.device.threads))
        event = Overridden(trainer.counters.step, changed)
        log.read(event)
        yield event


def _restore(trainer: Trainer, log: RunLog, run: Run, recorded: Config) -> Iterator[Event]:
    where = str(run.state_file)
    # Rank 0 sends the bytes: other machines may not see its disk, and the file may be replaced before they read it.
    state = load_tensor_bytes(trainer.replicas.job.from_leader(lambda: checked_bytes(run.state_file)), where)
    restore(trainer, state, where)
    try:
        of, sizes = Config.from_dict(state["config"]), dict(state["log"])
    except (KeyError, TypeError, AttributeError, ValueError, DdpmctlError) as error:
        raise DataError(f"{where}: a part is missing or invalid ({show(repr(error))})") from None
    if other := _recipe_changes(of, recorded):
        changes = "; ".join(f"{name}: {before} in the state, {now} in config.toml" for name, (before, now) in other.items())
        raise DataError(f"{where}: its settings differ from {run.config_file.name} ({changes}); restore the file, and change settings with --override")
    log.require_own(sizes, trainer.counters.epoch, trainer.counters.last_loss, where)
    if short := log.cut(sizes):
        yield Notice(f"{run.folder}: {', '.join(short)} lost rows from before the saved state; these rows stay missing")
    differs = trainer.config.training.minutes is not None or _recipe_changes(recorded, trainer.config)  # otherwise the same files are written again
    if differs and trainer.replicas.job.is_leader and (names := abandon(run, trainer.counters.scored_epoch)):
        yield Notice(f"{run.folder}: checkpoints written after the state were moved to checkpoints/abandoned: {', '.join(names)}")
    _retain(trainer, run)  # the run may have been stopped between a score and this


def _retain(trainer: Trainer, run: Run) -> None:
    """Delete the checkpoints that ``--keep`` does not keep. Those after the state stay until their epochs are trained again."""
    count = trainer.config.run.keep
    if count is not None and trainer.replicas.job.is_leader:
        run.retain(count, until=trainer.counters.scored_epoch)


def _recipe_changes(before: Config, now: Config) -> dict[str, tuple[Value, Value]]:
    old, new = before.to_dict(), now.to_dict()
    return {name: (value, new[section][name]) for section in RECIPE for name, value in old[section].items() if value != new[section][name]}


def _with_rollbacks(trainer: Trainer, log: RunLog, run: Run, classifier: Classifier | None) -> Iterator[Event]:
    """Yield the events of training; on NaN or inf, write a diagnosis and, with ``--on-nan rollback``, reload the last saved state."""
    while True:
        try:
            yield from _events(trainer, log, run, classifier)
            return
        except Diverged as error:
            reason = str(error)
            if trainer.replicas.job.is_leader:
                _write_diagnosis(run, error)
            seen_by_all = trainer.replicas.job.is_single or "batch_indices" in error.diagnosis  # in a step, not by rank 0 alone while it saves
        problem = f"{reason}; details are in {run.diagnosis_file}"
        if trainer.config.run.on_nan != "rollback" or not seen_by_all:
            raise DivergedError(f"{problem}. The last good state is kept: resume with --on-nan rollback, or train again with a lower --lr or --precision fp32")
        if trainer.counters.rollbacks >= MAX_ROLLBACKS:
            raise DivergedError(f"{problem}. It was rolled back {MAX_ROLLBACKS} times already; train again with a lower --lr or --precision fp32")
        yield from _restore(trainer, log, run, trainer.config)
        trainer.counters.rollbacks += 1
        trainer.counters.lr_scale /= 2
        yield RolledBack(reason, trainer.counters.step, trainer.counters.lr_scale, trainer.counters.rollbacks)
        save_state(trainer, log, run)


def _write_diagnosis(run: Run, error: Diverged) -> None:
    last = run.pointer("latest")
    known = {"reason": str(error), **error.diagnosis, "last_checkpoint": None if last is None else last.name, "state": run.state_file.name}
    write_text(run.diagnosis_file, json.dumps(known, indent=1) + "\n")


def _events(trainer: Trainer, log: RunLog, run: Run, classifier: Classifier | None) -> Iterator[Event]:
    """Yield the events of training; a state that is saved at a yield continues after that event."""
    last_tick, counters = 0.0, trainer.counters
    last_saved = time.perf_counter()
    minutes = trainer.config.run.checkpoint_minutes
    while True:
        if trainer.epoch_is_over:
            yield _end_epoch(trainer)
        if _score_is_due(trainer):
            yield from _score_and_save(trainer, log, run, classifier) if trainer.replicas.job.is_leader else _wait_for_score(trainer)
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
            yield StopAgreed(trainer.stop, counters.step, counters.epoch + 1)
        if time.perf_counter() - last_tick > TICK_SECONDS:
            last_tick = time.perf_counter()
            yield _tick(trainer)


def _score_is_due(trainer: Trainer) -> bool:
    counters = trainer.counters
    due = trainer.done or counters.epoch % trainer.config.training.save_every == 0
    return counters.batch == 0 and counters.epoch > counters.scored_epoch and due


def _end_epoch(trainer: Trainer) -> EpochDone:
    # The counters are updated before the event is yielded: the caller may stop there, and the state is then saved.
    counters, loss = trainer.counters, trainer.mean_loss("epoch")
    rate = counters.epoch_images / max(counters.epoch_seconds, 1e-9)
    trainer.end_epoch(loss)
    return EpochDone(counters.epoch, counters.step, counters.images_seen, loss, counters.lr, counters.seconds, rate)


def _tick(trainer: Trainer) -> Ticked:
    counters = trainer.counters
    rate = counters.images_seen / max(counters.seconds, 1e-9)
    loss = trainer.mean_loss("epoch") if counters.epoch_images else counters.last_loss
    return Ticked(counters.step, counters.epoch + 1, loss, rate, trainer.fraction)


def _score_and_save(trainer: Trainer, log: RunLog, run: Run, classifier: Classifier | None) -> Iterator[Event]:
    config, counters = trainer.config, trainer.counters
    pipeline = SamplingPipeline(trainer.sampling_network(), trainer.diffusion, config.sampling, trainer.compute, task=trainer.dataset.task)
    task = trainer.dataset.task
    conditions = {name: trainer.dataset.conditions[name] for name in task.scored}
    try:
        scored = yield from score_conditions(pipeline, classifier or NoJudge(task), conditions, seed=config.training.seed)
    except NotFiniteError:
        raise Diverged(f"the sampled images are not finite after step {counters.step}", {"step": counters.step}) from None
    scores = {name: scored_images.score for name, scored_images in scored.items()} if classifier else {}
    judge = classifier.sha256 if classifier else NO_JUDGE
    path = run.checkpoints / f"{'_'.join([f'epoch{counters.epoch}', *(str(score.accuracy) for score in scores.values())])}.pth"
    known = {
        "epoch": counters.epoch, "step": counters.step, "images_seen": counters.images_seen, "loss": counters.last_loss, "seconds": counters.seconds,
        "scores": {name: value.to_dict() for name, value in scores.items()}, "evaluator": judge, "data": trainer.dataset.key,
    }  # fmt: skip
    weights = trainer.weights()
    if (bad := not_finite(weights)) is not None:
        raise Diverged(f"the weights {bad!r} are not finite after step {counters.step}", {"step": counters.step, "name": bad})
    log.require_folder()
    save_checkpoint(path, config, weights, task, **known)
    for name, scored_images in scored.items():
        save_grid(run.samples / f"epoch{counters.epoch}_{name}.png", scored_images.images, ["\n".join(r.labels) for r in scored_images.requests])
    run.point("latest", path)
    accuracy, exact = (mean({name: getattr(value, what) for name, value in scores.items()}) for what in ("accuracy", "exact_match"))
    standing = Standing.of(accuracy, exact, counters.epoch)
    if not scores or standing > _best_so_far(run, counters.best):  # without scores, the newest is the best
        counters.best = standing.accuracy
        run.point("best", path)
    counters.scored_epoch = counters.epoch
    trainer.replicas.job.from_leader(lambda: None)  # ends ``_wait_for_score`` on the other ranks
    images, requests = torch.cat([one.images for one in scored.values()]), [request for one in scored.values() for request in one.requests]
    sharp = sharpness(images, label_tensor(requests, task), trainer.images, trainer.labels)
    yield Evaluated(counters.epoch, counters.step, counters.images_seen, counters.last_loss, counters.seconds, scores, judge, path, sharp)
    save_state(trainer, log, run)
    _retain(trainer, run)
    yield Saved(path)
    yield Saved(run.state_file)


def _best_so_far(run: Run, accuracy: float) -> Standing:
    """Return the best standing among the scores with the accuracy of the best; the state holds this accuracy, and results.csv the rest."""
    with suppress(DataError):  # a damaged file: the later epoch is the better one
        return max((found for scored in scored_in(run) if (found := scored.standing).accuracy == accuracy), default=Standing(accuracy))
    return Standing(accuracy)


def _wait_for_score(trainer: Trainer) -> Iterator[Event]:
    """Wait while rank 0 samples and scores, which may take longer than the timeout of a step's collectives."""
    counters = trainer.counters
    while not trainer.replicas.job.wait_for_leader(until=trainer.received):
        yield StopAgreed(trainer.received(), counters.step, counters.epoch)
    counters.scored_epoch = counters.epoch
