"""Checks of a saved training state, part by part, before any of it is used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpmctl.checkpoints.format import not_finite
from ddpmctl.errors import show


@dataclass
class Counters:
    """Progress of a run; with the config and the seed it determines the remaining steps.

    Attributes:
        seconds: duration of the training steps, including those before a resume.
        epoch_loss: sum of loss x images since the epoch began.
        logged_loss, logged_images: the same since the last logged step.
        scored_epoch: the last epoch after which a checkpoint was scored and saved.
        last_loss: mean loss of the last whole epoch.
        lr: learning rate of the last step.
        lr_scale: factor of the learning rate from rollbacks.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    images_seen: int = 0
    seconds: float = 0.0
    epoch_images: int = 0
    epoch_seconds: float = 0.0
    scored_epoch: int = 0
    last_loss: float = 0.0
    best: float = -1.0
    lr: float = 0.0
    lr_scale: float = 1.0
    rollbacks: int = 0
    epoch_loss: float = 0.0
    logged_loss: float = 0.0
    logged_images: int = 0


def validated_counters(saved: Any) -> Counters:
    """Return saved counters; ValueError where one is missing, unknown, of another type or out of range."""
    fresh = Counters()
    if not isinstance(saved, dict) or set(saved) != set(fresh.__dict__):
        raise ValueError("unknown or missing counters")
    for name, value in saved.items():
        if type(value) is not type(getattr(fresh, name)) or not math.isfinite(value) or (value < 0 and name != "best"):
            raise ValueError(f"counter {name!r} is {show(value)}")
    return Counters(**saved)


def check_weights(expected: Mapping[str, Tensor], saved: Any) -> None:
    """Compare saved weights with a network's; ValueError where names, shapes or types differ, or values are not finite."""
    if not isinstance(saved, dict) or set(saved) != set(expected):
        raise ValueError("weights of another network")
    for name, value in expected.items():
        if not isinstance(saved[name], Tensor) or saved[name].shape != value.shape or saved[name].dtype != value.dtype:
            raise ValueError(f"weights {name!r} have another shape or type")
    if (bad := not_finite(saved)) is not None:
        raise ValueError(f"weights {bad!r} are not finite")


def check_optimizer_state(optimizer: torch.optim.Optimizer, saved: Any) -> None:
    """Compare an optimizer's saved state with its parameters (torch itself would fail only within a step); ValueError where they differ."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    groups, states = saved["param_groups"], saved["state"]
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in optimizer.param_groups]:
        raise ValueError("state of another optimizer")
    if [set(group) for group in groups] != [set(group) for group in optimizer.param_groups]:
        raise ValueError("optimizer groups have other settings")
    if states and set(states) != set(range(len(parameters))):
        raise ValueError("optimizer state of other parameters")
    names = {frozenset(entries) for entries in states.values()}
    if len(names) > 1:
        raise ValueError("optimizer state has different entries for different parameters")
    for index, entries in states.items():
        for name, value in entries.items():
            if isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameters[index].shape:
                raise ValueError(f"optimizer entry {name!r} of parameter {index} has another shape")
