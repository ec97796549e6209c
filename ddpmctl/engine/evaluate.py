"""Scoring checkpoints: many files, each on every condition file; results are kept by content."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from ddpmctl import __version__
from ddpmctl.config import Config, Value
from ddpmctl.diffusion.denoiser import Diffusion
from ddpmctl.diffusion.schedules import make_schedule
from ddpmctl.engine.answers import extended, keep_answers, kept_answers, key_of
from ddpmctl.engine.checkpoint import Checkpoint, load_checkpoint
from ddpmctl.engine.events import Event, Failed, Judged
from ddpmctl.engine.generate import Painter, requests_for, settled
from ddpmctl.engine.judge import judge_requests
from ddpmctl.engine.machine import Machine
from ddpmctl.errors import DdpmctlError
from ddpmctl.evaluator.classifiers import Evaluator
from ddpmctl.report.grids import save_grid


@dataclass(frozen=True)
class Task:
    """What every checkpoint is put through.

    Attributes:
        conditions: label sets by condition file.
        sampling: flat settings that replace the checkpoint's own.
        assume: flat settings for checkpoints that carry none.
        repeats: pictures a condition.
        grids: folder for sample grids, or None.
        titles: names for checkpoints whose file names are not unique.
    """

    conditions: Mapping[str, Sequence[tuple[str, ...]]]
    evaluator: Evaluator
    machine: Machine
    seed: int = 0
    repeats: int = 1
    sampling: Mapping[str, Value] = field(default_factory=dict)
    assume: Mapping[str, Value] = field(default_factory=dict)
    grids: Path | None = None
    titles: Mapping[Path, str] = field(default_factory=dict)

    def content(self, sha256: str, config: Config) -> list[object]:
        """Return everything that the answers depend on but the condition file and the number of pictures."""
        return [
            __version__, sha256, asdict(config.model), asdict(config.diffusion), asdict(config.sampling),
            self.evaluator.sha256, self.machine.precision, self.machine.device.type, self.seed,
        ]  # fmt: skip


def evaluate(paths: Sequence[Path], task: Task) -> Iterator[Event]:
    """Yield a ``Judged`` or ``Failed`` for each checkpoint, with progress between.

    Unchanged files under an unchanged task are answered from the results kept in the cache.
    """
    with ThreadPoolExecutor(1, "load") as ahead:  # the next file is read and checked while this one's pictures are made
        loading = [ahead.submit(load_checkpoint, path, task.assume) for path in paths[:1]]
        for path, following in itertools.zip_longest(paths, paths[1:]):
            current = loading.pop()
            if following is not None:
                loading.append(ahead.submit(load_checkpoint, following, task.assume))
            try:
                yield from _judge_one(current.result(), task)
            except DdpmctlError as error:
                yield Failed(path, str(error).removeprefix(f"{path}: "))


def painter_for(checkpoint: Checkpoint, sampling: Mapping[str, Value], machine: Machine) -> Painter:
    """Return a painter of pictures from a checkpoint; ``sampling`` replaces settings by flat name.

    Raises:
        DataError: the weights do not fit the checkpoint's settings.
        UsageError: a sampling setting does not fit the model, such as more steps than T.
    """
    config = checkpoint.config.replace(**sampling)
    net = checkpoint.network().to(machine.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Painter(net, Diffusion.of(config.diffusion), config.sampling, machine)


def used_config(checkpoint: Checkpoint, task: Task) -> Config:
    """Return the settings that a checkpoint is judged with, the number of sampler steps that auto comes to included.

    Raises:
        UsageError: a sampling setting does not fit the model.
    """
    config = checkpoint.config.replace(**task.sampling)
    return replace(config, sampling=settled(config.sampling, make_schedule(config.diffusion)))


def _judge_one(checkpoint: Checkpoint, task: Task) -> Iterator[Event]:
    config = used_config(checkpoint, task)
    content = task.content(checkpoint.sha256, config)
    keys = {name: key_of(content, name, sets) for name, sets in task.conditions.items()}
    # A grid shows every picture, and of those that were judged before only the first are kept.
    answers = {} if task.grids else {name: found for name, key in keys.items() if (found := kept_answers(key, task.conditions[name]))}
    missing = {
        name: requests_for(name, sets, seed=task.seed, repeats=task.repeats, first=answers[name].repeats if name in answers else 0)
        for name, sets in task.conditions.items()
    }
    missing = {name: requests for name, requests in missing.items() if requests}
    if missing:
        judged = yield from judge_requests(painter_for(checkpoint, task.sampling, task.machine), task.evaluator, missing)
        for name, judgement in judged.items():
            answers[name] = extended(answers.get(name), task.conditions[name], judgement)
            keep_answers(keys[name], answers[name])
            if task.grids:
                captions = [", ".join(r.labels) for r in judgement.requests]
                title = task.titles.get(checkpoint.path, checkpoint.path.stem)
                save_grid(task.grids / f"{title}_{name}.png", judgement.pictures, captions, columns=max(8, task.repeats))
    asked = {name: answers[name].first(task.repeats) for name in task.conditions}
    yield Judged(checkpoint.path, checkpoint.sha256, checkpoint.epoch, checkpoint.loss, checkpoint.recorded, asked, config, checkpoint.foreign, not missing)
