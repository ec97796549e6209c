"""Checkpoints: ours, which carry their settings, and bare state dicts under the report's names, which do not."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddpmctl.config import Config, Value
from ddpmctl.diffusion.schedules import make_schedule
from ddpmctl.errors import DataError, UsageError
from ddpmctl.files import atomic_write
from ddpmctl.registry import NETWORKS

FORMAT = "ddpmctl checkpoint 1"
FILE_NAME = re.compile(r"epoch(?P<epoch>\d+)_(?P<test>\d(?:\.\d+)?)_(?P<new_test>\d(?:\.\d+)?)\.pth")
SCHEDULE_BUFFERS = ("alphabar_t", "alpha_bar_t", "alphas_cumprod")


@dataclass(frozen=True)
class Checkpoint:
    """Weights and what is known of them.

    Attributes:
        weights: the network's state dict, the averaged one where the run keeps an average.
        sha256: of the file.
        foreign: the file carries no settings of its own; they are the report's, and what was assumed.
        recorded: accuracies by condition file, from the metadata or the file name.
    """

    path: Path
    config: Config
    weights: dict[str, Tensor]
    sha256: str
    foreign: bool
    epoch: int | None = None
    loss: float | None = None
    recorded: dict[str, float] = field(default_factory=dict)

    def network(self) -> nn.Module:
        """Return the network with these weights, on the CPU, in evaluation mode.

        Raises:
            DataError: the weights belong to another network.
        """
        with torch.device("meta"):
            net: nn.Module = NETWORKS.get(self.config.model.net)(self.config.model)
        shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
        wrong = [name for name, shape in shapes.items() if name not in self.weights or tuple(self.weights[name].shape) != shape]
        wrong += [name for name in self.weights if name not in shapes]
        if wrong:
            raise DataError(
                f"{self.path}: the weights are not those of a {self.config.model.net} of width {self.config.model.width} "
                f"({len(wrong)} of {len(shapes)} differ, the first is {wrong[0]!r})"
            )
        net = NETWORKS.get(self.config.model.net)(self.config.model)
        net.load_state_dict(self.weights)
        return net.eval().to(memory_format=torch.channels_last)


def save_checkpoint(path: Path, config: Config, weights: Mapping[str, Tensor], **known: Any) -> None:
    """Write a checkpoint atomically; ``known`` holds epoch, loss, scores and the like as plain values."""
    save_tensors(path, {"format": FORMAT, "config": config.to_dict(), "known": known, "weights": dict(weights)})


def save_tensors(path: Path, content: Mapping[str, Any]) -> None:
    """Write tensors and plain values to a file that appears whole or not at all.

    Raises:
        UsageError: the folder cannot be written to.
    """
    with atomic_write(path) as temporary:
        torch.save(content, temporary)


def load_tensors(path: Path) -> tuple[Any, str]:
    """Return a file's content and its sha256; nothing in the file is executed.

    Raises:
        UsageError: there is no such file.
        DataError: the file is damaged or is no file of tensors.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever a damaged file provokes
        raise DataError(f"{path}: is no checkpoint, or a damaged one ({type(error).__name__})") from None
    return content, hashlib.sha256(data).hexdigest()


def load_checkpoint(path: Path, assume: Mapping[str, Value] | None = None) -> Checkpoint:
    """Return a checkpoint, ours or a state dict under the report's names (bare, or with the prefix ``nn_model.``).

    Args:
        path: the file.
        assume: settings by flat name for files that carry none, e.g. {"act": "relu"}.

    Raises:
        UsageError: there is no such file.
        DataError: the file is damaged, or is no checkpoint of a network known here.
    """
    content, sha256 = load_tensors(path)
    if isinstance(content, dict) and content.get("format") == FORMAT:
        return _own(path, content, sha256)
    return _foreign(path, content, sha256, assume or {})


def _own(path: Path, content: dict[str, Any], sha256: str) -> Checkpoint:
    try:
        config = Config.from_flat({name: value for section in content["config"].values() for name, value in section.items()})
        known, weights = content["known"], content["weights"]
        _check_tensors(path, weights)
        recorded = {name: float(value["accuracy"]) for name, value in known.get("scores", {}).items()}
        return Checkpoint(path, config, weights, sha256, foreign=False, epoch=known.get("epoch"), loss=known.get("loss"), recorded=recorded)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{path}: the checkpoint lacks a part or has it in another form ({error!r})") from None
    except UsageError as error:
        raise DataError(f"{path}: its settings cannot be used here: {error}") from None


def _foreign(path: Path, content: Any, sha256: str, assume: Mapping[str, Value]) -> Checkpoint:
    for key in ("model", "state_dict", "model_state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise DataError(f"{path}: holds no state dict")
    tensors = {name.removeprefix("module."): value for name, value in content.items()}
    prefixed = {name.removeprefix("nn_model."): value for name, value in tensors.items() if name.startswith("nn_model.")}
    weights = prefixed or tensors
    first = weights.get("init_conv.conv1.0.weight")
    if not isinstance(first, Tensor) or first.ndim != 4:
        raise DataError(f"{path}: holds neither a ddpmctl checkpoint nor a state dict under the report's names (init_conv, down1, ...)")
    _check_tensors(path, weights)
    known = recorded_in_name(path)
    buffers = _schedule_of(path, tensors) if prefixed else {}
    try:
        config = Config.from_flat({"width": first.shape[0], **buffers})
    except UsageError as error:
        raise DataError(f"{path}: its weights are of no network that can be built here ({error})") from None
    try:
        config = config.replace(**assume)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    epoch = known.pop("epoch", None)
    return Checkpoint(path, config, weights, sha256, foreign=True, epoch=None if epoch is None else int(epoch), recorded=known)


def recorded_in_name(path: Path) -> dict[str, float]:
    """Return epoch and accuracies that a file name such as ``epoch315_0.625_0.619.pth`` records, else nothing."""
    match = FILE_NAME.fullmatch(path.name)
    return {name: float(text) for name, text in match.groupdict().items()} if match else {}


def _schedule_of(path: Path, tensors: Mapping[str, Any]) -> dict[str, Value]:
    """Return the settings of the schedule whose alpha_bar lies beside the weights."""
    bar = next((tensors[name] for name in SCHEDULE_BUFFERS if isinstance(tensors.get(name), Tensor)), None)
    if bar is None or bar.ndim != 1 or not 3 <= len(bar) <= 10_001:
        return {}
    for schedule in ("linear", "cosine-periodic", "cosine"):
        config = Config.from_flat({"schedule": schedule, "timesteps": len(bar) - 1})
        if np.allclose(make_schedule(config.diffusion).alpha_bar, bar.double().numpy(), atol=1e-4):
            return {"schedule": schedule, "timesteps": len(bar) - 1}
    raise DataError(f"{path}: its schedule buffer is none of ours; name one with --assume schedule=NAME after removing the buffer")


def _check_tensors(path: Path, weights: Any) -> None:
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise DataError(f"{path}: holds other things than tensors among its weights")
    bad = next((name for name, value in weights.items() if value.is_floating_point() and not torch.isfinite(value).all()), None)
    if bad is not None:
        raise DataError(f"{path}: the weights {bad!r} are not finite")
