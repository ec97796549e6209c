"""``train --weights``: a new run that starts from the weights of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from ddpmctl.checkpoints.format import Checkpoint, load_checkpoint
from ddpmctl.checkpoints.outline import read_outline
from ddpmctl.config import Config, settings
from ddpmctl.config_sources import Resolved
from ddpmctl.distributed.job import Job
from ddpmctl.errors import UsageError
from ddpmctl.task import Task, require_same_task


def with_network_of(path: Path, resolved: Resolved) -> Resolved:
    """Return settings with the network, and what it predicts, of the checkpoint that training starts from.

    Raises:
        UsageError: such a setting was given, and differs.
        DataError: the checkpoint is damaged.
    """
    config, origins = read_outline(path, {}).config, dict(resolved.origins)
    before, own = resolved.config.flat(), config.flat()
    for name in (*(setting.name for setting in settings("model")), "objective"):
        if before[name] != own[name] and origins[name] != "default" and not origins[name].startswith("preset"):
            raise UsageError(f"--{name}: {before[name]} is not that of --weights {path}, {own[name]}; leave it out")
        before[name], origins[name] = own[name], f"weights {path}"
    return Resolved(Config.from_flat(before), origins)


def load_start(path: Path, task: Task, job: Job) -> Checkpoint:
    """Return the checkpoint that a new run on a task starts from.

    Raises:
        UsageError, DataError: it is of other images, or damaged.
    """
    start = load_checkpoint(path)
    require_same_task(f"--weights {path}", start.task, "the data", task)
    job.require_same("--weights", {"its content": start.sha256[:12]})
    return start
