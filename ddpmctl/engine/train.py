"""Training runs: the stream of events from the first step to the last checkpoint."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import NamedTuple

from ddpmctl.config import Config
from ddpmctl.data.dataset import Dataset
from ddpmctl.engine.checkpoint import load_tensors, save_checkpoint, save_tensors
from ddpmctl.engine.events import EpochDone, Evaluated, Event, Finished, Plan, Saved, Started, StepDone, Ticked
from ddpmctl.engine.generate import Painter
from ddpmctl.engine.judge import judge
from ddpmctl.engine.machine import Machine
from ddpmctl.engine.runs import Run, RunLog
from ddpmctl.engine.trainer import Trainer, probe_seconds_per_image
from ddpmctl.errors import DataError
from ddpmctl.evaluator.classifiers import Evaluator
from ddpmctl.report.grids import save_grid

LOG_STEPS = 50
TICK_SECONDS = 0.5
SCORED = ("test", "new_test")


def make_plan(config: Config, run: Path, dataset_name: str, images: int, machine: Machine, evaluator: str) -> Plan:
    """Return what training will do, with its duration estimated from two real steps."""
    from ddpmctl.diffusion.schedules import make_schedule
    from ddpmctl.engine.trainer import make_network

    training = config.training
    per_epoch = -(-images // training.batch_size)
    seconds = 60 * training.minutes if training.minutes is not None else None
    if training.epochs is not None:
        seconds = training.epochs * images * probe_seconds_per_image(config, machine)
    return Plan(
        config=config,
        run=run,
        data=dataset_name,
        images=images,
        parameters=sum(p.numel() for p in make_network(config).parameters()),
        device=machine.describe(),
        precision=machine.precision,
        steps_per_epoch=per_epoch,
        steps=None if training.epochs is None else training.epochs * per_epoch,
        seconds=seconds,
        terminal_snr=make_schedule(config.diffusion).terminal_snr,
        evaluator=evaluator,
    )


def train(plan: Plan, run: Run, dataset: Dataset, evaluator: Evaluator, machine: Machine, *, resume: bool = False) -> Generator[Event, None, None]:
    """Train until the budget is used up, yielding events; the run's files are written here, whoever listens.

    A reader that stops early loses nothing: on leaving, a state is written from which ``resume`` goes on.

    Args:
        plan: the settings, and what was said of them.
        run: the folder to write to.
        dataset: images (N, 3, 64, 64) and labels (N, 24).
        evaluator: scores each saved checkpoint.
        machine: where to train.
        resume: go on from the run's state.

    Raises:
        DataError: there is no usable state to resume from; the loss is no longer finite.
    """
    trainer = Trainer(plan.config, machine, dataset)
    if resume:
        state, _ = load_tensors(run.state_file)
        trainer.restore(state, str(run.state_file))
    log = RunLog(run)
    yield Started(plan, trainer.counters.step)
    try:
        for event in _events(trainer, run, evaluator):
            log.read(event)
            yield event
    except GeneratorExit:
        # Raised where an event was yielded, so never in the middle of a step.
        save_tensors(run.state_file, trainer.state())
        raise


def _events(trainer: Trainer, run: Run, evaluator: Evaluator) -> Iterator[Event]:
    begun, last_tick = time.perf_counter(), 0.0
    while True:
        if _score_is_due(trainer):
            yield from _score_and_save(trainer, run, evaluator)
        if trainer.done:
            break
        lr = trainer.step()
        counters = trainer.counters
        # Counters move on before their event is yielded: a reader may leave there, and the state is then saved as it stands.
        if counters.step % LOG_STEPS == 0:
            done = StepDone(counters.step, counters.epoch + 1, counters.images_seen, trainer.mean_loss("logged"), lr, counters.seconds)
            trainer.end_logged()
            _check_finite(done.loss, done.step, lr)
            yield done
        if counters.batch == trainer.batches_per_epoch or trainer.done:
            yield _end_epoch(trainer, lr)
        if time.perf_counter() - last_tick > TICK_SECONDS:
            last_tick = time.perf_counter()
            yield _tick(trainer)
    yield Finished(run.folder, trainer.counters.epoch, time.perf_counter() - begun)


def _score_is_due(trainer: Trainer) -> bool:
    counters = trainer.counters
    due = trainer.done or counters.epoch % trainer.config.training.save_every == 0
    return counters.batch == 0 and counters.epoch > counters.scored_epoch and due


def _end_epoch(trainer: Trainer, lr: float) -> EpochDone:
    counters, loss = trainer.counters, trainer.mean_loss("epoch")
    _check_finite(loss, counters.step, lr)
    rate = counters.epoch_images / max(counters.epoch_seconds, 1e-9)
    trainer.end_epoch(loss)
    return EpochDone(counters.epoch, counters.step, counters.images_seen, loss, lr, counters.seconds, rate)


def _tick(trainer: Trainer) -> Ticked:
    counters = trainer.counters
    rate = counters.images_seen / max(counters.seconds, 1e-9)
    loss = trainer.mean_loss("epoch") if counters.epoch_images else counters.last_loss
    return Ticked(counters.step, counters.epoch + 1, loss, rate, trainer.fraction)


def _check_finite(loss: float, step: int, lr: float) -> None:
    if not math.isfinite(loss):
        raise DataError(f"the loss is no longer finite at step {step} (learning rate {lr:g}); lower --lr, or try --precision fp32")


def _score_and_save(trainer: Trainer, run: Run, evaluator: Evaluator) -> Iterator[Event]:
    config, counters = trainer.config, trainer.counters
    painter = Painter(trainer.sampling_network(), trainer.diffusion, config.sampling, trainer.machine)
    judged = yield from judge(painter, evaluator, {name: trainer.dataset.conditions[name] for name in SCORED}, seed=config.training.seed)
    scores = {name: judgement.score for name, judgement in judged.items()}
    path = run.checkpoints / f"epoch{counters.epoch}_{scores['test'].accuracy}_{scores['new_test'].accuracy}.pth"
    known = {
        "epoch": counters.epoch, "step": counters.step, "images_seen": counters.images_seen, "loss": counters.last_loss, "seconds": counters.seconds,
        "scores": {name: value.to_dict() for name, value in scores.items()}, "evaluator": evaluator.sha256, "data": trainer.dataset.key,
    }  # fmt: skip
    save_checkpoint(path, config, trainer.weights(), **known)
    for name, judgement in judged.items():
        save_grid(run.samples / f"epoch{counters.epoch}_{name}.png", judgement.pictures, [", ".join(r.labels) for r in judgement.requests])
    run.point("latest", path)
    mean = sum(value.accuracy for value in scores.values()) / len(scores)
    if mean > counters.best:
        counters.best = mean
        run.point("best", path)
    counters.scored_epoch = counters.epoch
    yield Evaluated(counters.epoch, counters.step, counters.images_seen, counters.last_loss, counters.seconds, scores, evaluator.sha256, path)
    yield Saved(path)
    save_tensors(run.state_file, trainer.state())
    yield Saved(run.state_file)


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
