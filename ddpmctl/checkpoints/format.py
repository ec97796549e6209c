"""Checkpoints: ours, which carry their settings, and bare state dicts under the report's names, which do not."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddpmctl.checkpoints.untrusted import Declared, TensorFile, checked, open_tensors
from ddpmctl.config import Config, Value
from ddpmctl.diffusion.schedules import make_schedule
from ddpmctl.errors import DataError, UsageError, show
from ddpmctl.files import write_verified
from ddpmctl.registry import NETWORKS

FORMAT = "ddpmctl checkpoint 1"
FILE_NAME = re.compile(r"epoch(?P<epoch>\d+)_(?P<test>\d(?:\.\d+)?)_(?P<new_test>\d(?:\.\d+)?)\.pth")
FLOATING = ("DoubleStorage", "FloatStorage", "HalfStorage", "BFloat16Storage")
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
        """Return the network with these weights, on the CPU, in evaluation mode."""
        net: nn.Module = NETWORKS.get(self.config.model.net)(self.config.model)
        net.load_state_dict(self.weights)
        return net.eval().to(memory_format=torch.channels_last)


def save_checkpoint(path: Path, config: Config, weights: Mapping[str, Tensor], **known: Any) -> None:
    """Write a checkpoint atomically; ``known`` holds epoch, loss, scores and the like as plain values."""
    save_tensors(path, {"format": FORMAT, "config": config.to_dict(), "known": known, "weights": dict(weights)})


def save_tensors(path: Path, content: Mapping[str, Any]) -> None:
    """Write tensors and plain values to a file that appears whole or not at all, after it was read back from the disk.

    Raises:
        UsageError: the folder cannot be written to, or has no room.
    """
    data = io.BytesIO()  # torch reports a disk that fills up in the middle of its writing in ways that cannot be told apart
    torch.save(content, data)
    write_verified(path, data.getbuffer())


def load_tensors(path: Path) -> tuple[Any, str]:
    """Return a file's content and its sha256; nothing in the file is executed.

    Raises:
        UsageError: there is no such file.
        DataError: the file is damaged or is no file of tensors.
    """
    with open_tensors(path) as file:
        return file.load(), file.sha256


def checked_bytes(path: Path) -> bytes:
    """Return the bytes of a file of tensors, for processes that cannot see it.

    Raises:
        UsageError: there is no such file.
        DataError: the file is damaged or is no file of tensors.
    """
    with open_tensors(path):
        return path.read_bytes()


def load_tensor_bytes(data: bytes, name: str) -> Any:
    """Return the content of a file that is already in memory; ``name`` is what messages call it.

    Raises:
        DataError: it is damaged or is no file of tensors.
    """
    return checked(io.BytesIO(data), name).load()


def load_checkpoint(path: Path, assume: Mapping[str, Value] | None = None) -> Checkpoint:
    """Return a checkpoint, ours or a state dict under the report's names (bare, or with the prefix ``nn_model.``).

    What a file says of its settings and shapes is checked before its tensors take any memory.

    Args:
        path: the file.
        assume: settings by flat name for files that carry none, e.g. {"act": "relu"}.

    Raises:
        UsageError: there is no such file.
        DataError: the file is damaged, or is no checkpoint of a network known here.
    """
    with open_tensors(path) as file:
        if isinstance(file.outline, dict) and file.outline.get("format") == FORMAT:
            return _own(path, file)
        return _foreign(path, file, assume or {})


def _own(path: Path, file: TensorFile) -> Checkpoint:
    content = file.outline
    try:
        config = Config.from_dict(content["config"])
        known = content["known"]
        recorded = {str(name): float(value["accuracy"]) for name, value in known.get("scores", {}).items()}
        epoch, loss = known.get("epoch"), known.get("loss")
        if not isinstance(epoch, int | None) or not isinstance(loss, float | None):
            raise TypeError("epoch or loss")
        _check_shapes(path, config, content["weights"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{path}: the checkpoint lacks a part or has it in another form ({show(repr(error))})") from None
    except UsageError as error:
        raise DataError(f"{path}: its settings cannot be used here: {error}") from None
    weights = file.load()["weights"]
    _check_finite(path, weights)
    return Checkpoint(path, config, weights, file.sha256, foreign=False, epoch=epoch, loss=loss, recorded=recorded)


def _foreign(path: Path, file: TensorFile, assume: Mapping[str, Value]) -> Checkpoint:
    keys = _way_to_weights(path, file.outline)
    shapes = _at(file.outline, keys)
    prefixed = any(name.removeprefix("module.").startswith("nn_model.") for name in shapes)
    own = _own_names(shapes, prefixed=prefixed)
    first = own.get("init_conv.conv1.0.weight")
    if not isinstance(first, Declared) or len(first.shape) != 4:
        raise DataError(f"{path}: holds neither a ddpmctl checkpoint nor a state dict under the report's names (init_conv, down1, ...)")
    try:
        config = Config.from_flat({"width": first.shape[0]})
    except UsageError as error:
        raise DataError(f"{path}: its weights are of no network that can be built here ({error})") from None
    _check_shapes(path, _assuming(path, config, assume), own)
    tensors = _at(file.load(), keys)
    weights = _own_names(tensors, prefixed=prefixed)
    _check_finite(path, weights)
    config = _assuming(path, config.replace(**_schedule_of(path, tensors)) if prefixed else config, assume)
    known = recorded_in_name(path)
    epoch = known.pop("epoch", None)
    return Checkpoint(path, config, weights, file.sha256, foreign=True, epoch=None if epoch is None else int(epoch), recorded=known)


def _assuming(path: Path, config: Config, assume: Mapping[str, Value]) -> Config:
    try:
        return config.replace(**assume)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _way_to_weights(path: Path, outline: Any) -> list[str]:
    """Return the keys under which training scripts put a state dict, outermost first; none for a bare one."""
    keys = []
    for key in ("model", "state_dict", "model_state_dict"):
        if isinstance(outline, dict) and isinstance(outline.get(key), dict):
            keys.append(key)
            outline = outline[key]
    if not isinstance(outline, dict) or not all(isinstance(name, str) for name in outline):
        raise DataError(f"{path}: holds no state dict")
    return keys


def _at(content: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        content = content[key]
    return content


def _own_names(content: Mapping[str, Any], *, prefixed: bool) -> dict[str, Any]:
    """Return a state dict without the prefixes that wrappers give; where there is ``nn_model.``, what lies beside it is left out."""
    names = {name.removeprefix("module."): value for name, value in content.items()}
    return {name.removeprefix("nn_model."): value for name, value in names.items() if name.startswith("nn_model.") or not prefixed}


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


def _check_shapes(path: Path, config: Config, declared: Any) -> None:
    """Compare what a file declares with the network that its settings name, before either takes memory."""
    if not isinstance(declared, dict) or not all(isinstance(value, Declared) for value in declared.values()):
        raise DataError(f"{path}: holds other things than tensors among its weights")
    with torch.device("meta"):
        net: nn.Module = NETWORKS.get(config.model.net)(config.model)
    expected = {name: (tuple(value.shape), value.is_floating_point()) for name, value in net.state_dict().items()}
    found = {name: (value.shape, value.kind in FLOATING) for name, value in declared.items()}
    wrong = [name for name, value in expected.items() if found.get(name) != value] + [name for name in found if name not in expected]
    if wrong:
        raise DataError(
            f"{path}: the weights are not those of a {config.model.net} of width {config.model.width} "
            f"({len(wrong)} of {len(expected)} differ, the first is {show(wrong[0])})"
        )


def _check_finite(path: Path, weights: Mapping[str, Tensor]) -> None:
    if (bad := not_finite(weights)) is not None:
        raise DataError(f"{path}: the weights {bad!r} are not finite")


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor that holds an infinite number or none at all, or None."""
    return next((name for name, value in tensors.items() if value.is_floating_point() and not torch.isfinite(value).all()), None)
