"""Scoring checkpoints: many files, each on every condition file; results are kept by content."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ddpmctl import __version__
from ddpmctl.config import Config, Value
from ddpmctl.data.cache import cache_folder
from ddpmctl.diffusion.denoiser import Diffusion
from ddpmctl.diffusion.schedules import make_schedule
from ddpmctl.engine.checkpoint import Checkpoint, load_checkpoint
from ddpmctl.engine.events import Event, Failed, Judged
from ddpmctl.engine.generate import Painter, settled
from ddpmctl.engine.judge import judge
from ddpmctl.engine.machine import Machine
from ddpmctl.errors import DdpmctlError
from ddpmctl.evaluator.classifiers import Evaluator
from ddpmctl.evaluator.scores import Score
from ddpmctl.files import atomic_write
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

    def key(self, sha256: str, config: Config) -> str:
        """Return the hash of everything that the scores depend on."""
        content = [
            __version__, sha256, asdict(config.model), asdict(config.diffusion), asdict(config.sampling), dict(self.conditions),
            self.evaluator.sha256, self.machine.precision, self.machine.device.type, self.seed, self.repeats,
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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


def _judge_one(checkpoint: Checkpoint, task: Task) -> Iterator[Event]:
    config = checkpoint.config.replace(**task.sampling)
    config = replace(config, sampling=settled(config.sampling, make_schedule(config.diffusion)))
    kept_file = cache_folder() / "results" / f"{task.key(checkpoint.sha256, config)}.json"
    scores = None if task.grids else _kept(kept_file)
    kept = scores is not None
    if scores is None:
        painter = painter_for(checkpoint, task.sampling, task.machine)
        judged = yield from judge(painter, task.evaluator, task.conditions, seed=task.seed, repeats=task.repeats)
        scores = {name: judgement.score for name, judgement in judged.items()}
        _keep(kept_file, scores)
        for name, judgement in judged.items() if task.grids else ():
            assert task.grids is not None
            captions = [", ".join(r.labels) for r in judgement.requests]
            title = task.titles.get(checkpoint.path, checkpoint.path.stem)
            save_grid(task.grids / f"{title}_{name}.png", judgement.pictures, captions, columns=max(8, task.repeats))
    yield Judged(checkpoint.path, checkpoint.epoch, checkpoint.loss, checkpoint.recorded, scores, config.sampling, kept)


def _kept(file: Path) -> dict[str, Score] | None:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return {name: Score.from_dict(value) for name, value in content["scores"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # never kept, or damaged: then it is measured again


def _keep(file: Path, scores: Mapping[str, Score]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as temporary:
            temporary.write_text(json.dumps({"scores": {name: value.to_dict() for name, value in scores.items()}}), encoding="utf-8")
    except (OSError, DdpmctlError):
        pass  # a cache that cannot be written costs time at the next call, nothing else
