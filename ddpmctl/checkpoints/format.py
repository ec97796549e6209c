"""Checkpoint files: our format, with settings, and state dicts of the report's network, without settings."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddpmctl.checkpoints.exported import open_checkpoint
from ddpmctl.checkpoints.names import FORMAT
from ddpmctl.checkpoints.outline import CheckpointOutline, StateDict, outline_in
from ddpmctl.checkpoints.untrusted import TensorFile, checked, mismatches, open_tensors
from ddpmctl.config import Config, Value
from ddpmctl.errors import DataError, show
from ddpmctl.files import write_verified
from ddpmctl.iclevr import ICLEVR
from ddpmctl.registry import NETWORKS
from ddpmctl.task import Task


@dataclass(frozen=True, kw_only=True)
class Checkpoint(CheckpointOutline):
    """Weights and metadata.

    Attributes:
        weights: the network's state dict, in its dtypes; the EMA weights if the run has an EMA.
    """

    weights: dict[str, Tensor]

    def network(self) -> nn.Module:
        """Return the network with these weights, on the CPU, in evaluation mode."""
        net: nn.Module = NETWORKS.get(self.config.model.net)(self.config.model, self.task)
        net.load_state_dict(self.weights)
        return net.eval().to(memory_format=torch.channels_last)


def save_checkpoint(path: Path, config: Config, weights: Mapping[str, Tensor], task: Task = ICLEVR, **known: Any) -> None:
    """Write a checkpoint atomically; ``known`` is metadata such as epoch, loss and scores, as plain values."""
    own = {} if task == ICLEVR else {"task": task.to_dict()}  # without it, as earlier versions wrote them
    save_tensors(path, {"format": FORMAT, "config": config.to_dict(), "known": known, **own, "weights": dict(weights)})


def save_tensors(path: Path, content: Mapping[str, Any]) -> None:
    """Write tensors and plain values atomically, after reading the file back from the disk.

    Raises:
        UsageError: the folder cannot be written to, or the disk is full.
    """
    data = io.BytesIO()  # torch.save does not report a full disk clearly
    torch.save(content, data)
    write_verified(path, data.getbuffer())


def checked_bytes(path: Path) -> bytes:
    """Return the bytes of a file of tensors, for processes that cannot see it.

    Raises:
        UsageError: there is no such file.
        DataError: the file is damaged or not a file of tensors.
    """
    with open_tensors(path):
        return path.read_bytes()


def load_tensor_bytes(data: bytes, name: str) -> Any:
    """Return the content of a file in memory; ``name`` is used in messages.

    Raises:
        DataError: it is damaged or is not a file of tensors.
    """
    return checked(io.BytesIO(data), name).load()


def load_checkpoint(path: Path, assume: Mapping[str, Value] | None = None) -> Checkpoint:
    """Return a checkpoint in our format, or a state dict of the report's network (also with the prefix ``nn_model.``).

    Settings and shapes are checked before tensors are loaded. ``assume`` gives settings by flat name for files without
    settings, e.g. {"act": "relu"}.

    Raises:
        UsageError: there is no such file.
        DataError: the file is damaged, or is not a checkpoint of a known network.
    """
    with open_checkpoint(path) as file:
        outline, where = outline_in(path, file, assume or {})
        return load_weights(outline, file, where)


def load_weights(outline: CheckpointOutline, file: TensorFile, where: StateDict) -> Checkpoint:
    """Return the checkpoint of an open file, from what ``outline_in`` returned.

    Raises:
        DataError: the weights are not those of the network, or are not finite.
    """
    net = _check_shapes(outline, where.weights_in(file.outline))
    weights = usable_weights(net, where.weights_in(file.load()), str(outline.path))
    return Checkpoint(**vars(outline), weights=weights)


def _check_shapes(outline: CheckpointOutline, declared: Any) -> nn.Module:
    """Compare the declared shapes with the network of the settings, before tensors are loaded; return the network, without memory for weights."""
    path, config = outline.path, outline.config
    with torch.device("meta"):
        net: nn.Module = NETWORKS.get(config.model.net)(config.model, outline.task)
    try:
        wrong = mismatches(net, declared)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
    if wrong:
        count, kind = f"{len(wrong)} of {len(net.state_dict())} differ", f"a {config.model.net} of width {config.model.width}"
        raise DataError(f"{path}: the weights are not those of {kind} ({count}, the first is {show(wrong[0])})")
    return net


def usable_weights(net: nn.Module, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Return tensors in the dtypes of a network's weights, whose names and shapes they have.

    Raises:
        DataError: in these dtypes, values are not finite, or a variance of batch norm is negative; ``where`` names the file.
    """
    dtypes = {name: value.dtype for name, value in net.state_dict().items()}
    weights = {name: value.to(dtypes[name]) for name, value in tensors.items()}
    if (problem := weights_problem(weights)) is not None:
        raise DataError(f"{where}: the weights {problem}")
    return weights


def weights_problem(weights: Mapping[str, Tensor]) -> str | None:
    """Return the name of a tensor that is not finite, or of a negative variance, with the reason; None if there is none."""
    if (bad := not_finite(weights)) is not None:
        return f"{bad!r} are not finite"
    negative = (name for name, value in weights.items() if name.endswith("running_var") and (value < 0).any())
    return next((f"{name!r} are negative variances" for name in negative), None)


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor with an infinite or NaN value, or None."""
    return next((name for name, value in tensors.items() if value.is_floating_point() and not torch.isfinite(value).all()), None)
