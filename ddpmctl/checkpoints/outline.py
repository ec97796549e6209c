"""The outline of a checkpoint: settings, epoch and recorded scores, read without its tensors and without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ddpmctl.checkpoints.contents import Declared
from ddpmctl.checkpoints.exported import open_checkpoint
from ddpmctl.checkpoints.names import FORMAT, recorded_in_name
from ddpmctl.checkpoints.untrusted import TensorFile
from ddpmctl.config import Config, Value
from ddpmctl.diffusion.schedules import make_schedule
from ddpmctl.errors import DataError, UsageError, show
from ddpmctl.iclevr import ICLEVR
from ddpmctl.task import Task

SCHEDULE_BUFFERS = ("alphabar_t", "alpha_bar_t", "alphas_cumprod")
LONGEST_SCHEDULE = 10_001


@dataclass(frozen=True, kw_only=True)
class CheckpointOutline:
    """A checkpoint without its weights.

    Attributes:
        sha256: hash of the file.
        task: what it was trained to draw; i-CLEVR's for files that name none.
        foreign: the file has no settings; ``config`` has the report's and the assumed ones.
        recorded: accuracies by condition file, from the metadata or the file name.
    """

    path: Path
    config: Config
    sha256: str
    foreign: bool
    task: Task = ICLEVR
    epoch: int | None = None
    loss: float | None = None
    recorded: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StateDict:
    """Where in a file the weights are.

    Attributes:
        keys: nested keys that lead to them, outermost first; none for a bare state dict.
        prefixed: they are among others, with names that begin with ``nn_model.``; the noise schedule is then stored beside them.
    """

    keys: tuple[str, ...]
    prefixed: bool

    def all_in(self, content: Any) -> dict[str, Any]:
        """Return the weights and what is stored beside them, by name, without the prefix of DataParallel."""
        for key in self.keys:
            content = content[key]
        return {name.removeprefix("module."): value for name, value in content.items()}

    def weights_in(self, content: Any) -> dict[str, Any]:
        """Return the weights without the prefixes of wrappers."""
        names = self.all_in(content)
        return {name.removeprefix("nn_model."): value for name, value in names.items() if name.startswith("nn_model.") or not self.prefixed}


def read_outline(path: Path, assume: Mapping[str, Value]) -> CheckpointOutline:
    """Return the outline of a checkpoint; its weights may still be wrong or not finite. Arguments and errors are those of ``load_checkpoint``."""
    with open_checkpoint(path) as file:
        return outline_in(path, file, assume)[0]


def outline_in(path: Path, file: TensorFile, assume: Mapping[str, Value]) -> tuple[CheckpointOutline, StateDict]:
    """Return the outline of an open checkpoint, and where its weights are. Errors are those of ``load_checkpoint``."""
    if isinstance(file.outline, dict) and file.outline.get("format") == FORMAT:
        return _own(path, file), StateDict(("weights",), prefixed=False)
    return _foreign(path, file, assume)


def _own(path: Path, file: TensorFile) -> CheckpointOutline:
    content = file.outline
    try:
        config = Config.from_dict(content["config"])
        known = content["known"]
        task = Task.from_dict(content["task"]) if "task" in content else ICLEVR
        recorded = {str(name): _share(value["accuracy"]) for name, value in known.get("scores", {}).items()}
        epoch, loss = known.get("epoch"), known.get("loss")
        if epoch is not None and not (type(epoch) is int and 0 <= epoch < 2**63):
            raise ValueError(f"epoch {show(epoch)}")
        if loss is not None and not (isinstance(loss, float) and math.isfinite(loss)):
            raise ValueError(f"loss {show(loss)}")
        if not isinstance(content["weights"], dict):
            raise TypeError("the weights have no names")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{path}: a part of the checkpoint is missing or invalid ({show(repr(error))})") from None
    except UsageError as error:
        raise DataError(f"{path}: its settings are invalid: {error}") from None
    return CheckpointOutline(path=path, config=config, sha256=file.sha256, foreign=False, task=task, epoch=epoch, loss=loss, recorded=recorded)


def _share(value: Any) -> float:
    """Return a recorded accuracy; ValueError where it is no number from 0 to 1."""
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise ValueError(f"score {show(value)}")
    return float(value)


def _foreign(path: Path, file: TensorFile, assume: Mapping[str, Value]) -> tuple[CheckpointOutline, StateDict]:
    """Return the outline of a state dict of the report's network, with the report's and the assumed settings, and where its weights are."""
    keys = _state_dict_keys(path, file.outline)
    names = StateDict(keys, prefixed=False).all_in(file.outline)
    where = StateDict(keys, prefixed=any(name.startswith("nn_model.") for name in names))
    first = where.weights_in(file.outline).get("init_conv.conv1.0.weight")
    if not isinstance(first, Declared) or len(first.shape) != 4:
        raise DataError(f"{path}: is neither a ddpmctl checkpoint nor a state dict of the report's network (init_conv, down1, ...)")
    try:
        config = Config.from_flat({"width": first.shape[0]})
    except UsageError as error:
        raise DataError(f"{path}: no known network has these weights ({error})") from None
    if where.prefixed:
        config = config.replace(**_schedule_of(path, file, where.all_in(file.outline)))
    try:
        config = config.replace(**assume)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    known = recorded_in_name(path)
    epoch = known.pop("epoch", None)
    outline = CheckpointOutline(path=path, config=config, sha256=file.sha256, foreign=True, epoch=None if epoch is None else int(epoch), recorded=known)
    return outline, where


def _schedule_of(path: Path, file: TensorFile, names: Mapping[str, Any]) -> dict[str, Value]:
    """Return the settings of the schedule whose alpha_bar is stored with the weights."""
    bar = next((names[name] for name in SCHEDULE_BUFFERS if isinstance(names.get(name), Declared)), None)
    if bar is None or len(bar.shape) != 1 or not 3 <= bar.shape[0] <= LONGEST_SCHEDULE:
        return {}
    stored, timesteps = file.vector(bar), bar.shape[0] - 1
    for schedule in ("linear", "cosine-periodic", "cosine"):
        config = Config.from_flat({"schedule": schedule, "timesteps": timesteps})
        if stored is not None and np.allclose(make_schedule(config.diffusion).alpha_bar, stored, atol=1e-4):
            return {"schedule": schedule, "timesteps": timesteps}
    raise DataError(f"{path}: its schedule is unknown; give one with --assume schedule=NAME after removing the buffer")


def _state_dict_keys(path: Path, outline: Any) -> tuple[str, ...]:
    """Return the nested keys of the state dict, outermost first; none for a bare state dict."""
    keys: Sequence[str] = ()
    for key in ("model", "state_dict", "model_state_dict"):
        if isinstance(outline, dict) and isinstance(outline.get(key), dict):
            keys = (*keys, key)
            outline = outline[key]
    if not isinstance(outline, dict) or not all(isinstance(name, str) for name in outline):
        raise DataError(f"{path}: has no state dict")
    return tuple(keys)
