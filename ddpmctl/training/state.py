"""The training state: everything that a run needs to continue, as tensors and plain values; a saved one is checked before it is used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ddpmctl.checkpoints.format import not_finite, weights_problem
from ddpmctl.errors import DataError, show
from ddpmctl.training.gradients import Diverged
from ddpmctl.training.trainer import Counters, Trainer

STATE_FORMAT = "ddpmctl training state 2"


def training_state(trainer: Trainer) -> dict[str, Any]:
    """Return the state of a trainer between two steps.

    Raises:
        Diverged: weights are not finite.
    """
    trainer.counters.epoch_loss, trainer.counters.logged_loss = (float(trainer.sums[name]) for name in ("epoch_loss", "logged_loss"))
    state = {
        "format": STATE_FORMAT,
        "config": trainer.config.to_dict(),
        "data": trainer.dataset.key,
        "counters": dict(trainer.counters.__dict__),
        "net": trainer.net.state_dict(),
        "average": None if trainer.average is None else trainer.average.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
    }
    for part in ("net", "average"):
        if (bad := not_finite(state[part] or {})) is not None:
            step = trainer.counters.step
            raise Diverged(f"the weights {bad!r} are not finite after step {step}", {"step": step, "part": part, "name": bad})
    return state


def restore(trainer: Trainer, state: Any, where: str) -> None:
    """Set a trainer to a saved state; learning rates stay those of its own settings.

    Raises:
        DataError: the state has another format, is of other data, or does not fit the settings; ``where`` names it.
    """
    if not isinstance(state, dict) or state.get("format") != STATE_FORMAT:
        raise DataError(f"{where}: is not a training state of this version")
    if state.get("data") != trainer.dataset.key:
        raise DataError(f"{where}: the run was trained on other data than {trainer.dataset.name}")
    peaks = [[group["peak_lr"] for group in optimizer.param_groups] for optimizer in trainer.optimizers]
    try:
        counters = _validated_counters(state["counters"])
        if counters.batch > trainer.batches_per_epoch:
            raise ValueError("batch index exceeds the epoch's length")
        _check_weights(trainer.net.state_dict(), state["net"])
        trainer.net.load_state_dict(state["net"])
        if trainer.average is not None:
            _check_weights(trainer.average.state_dict(), state["average"])
            trainer.average.load_state_dict(state["average"])
        for optimizer, saved in zip(trainer.optimizers, state["optimizers"], strict=True):
            _check_optimizer_state(optimizer, saved)
            optimizer.load_state_dict(saved)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise DataError(f"{where}: does not fit the run's settings ({show(str(error).splitlines()[0] if str(error) else repr(error))})") from None
    for optimizer, own in zip(trainer.optimizers, peaks, strict=True):
        for group, peak in zip(optimizer.param_groups, own, strict=True):
            group["peak_lr"] = peak
    trainer.go_on_from(counters)


def _validated_counters(saved: Any) -> Counters:
    """Return saved counters; ValueError where one is missing, unknown, of another type or out of range."""
    fresh = Counters()
    if not isinstance(saved, dict) or set(saved) != set(fresh.__dict__):
        raise ValueError("unknown or missing counters")
    for name, value in saved.items():
        if type(value) is not type(getattr(fresh, name)) or not _is_a_count_or_sum(value) or (value < 0 and name != "best"):
            raise ValueError(f"counter {name!r} is {show(value)}")
    return Counters(**saved)


def _is_a_count_or_sum(value: float) -> bool:
    return value < 2**63 if isinstance(value, int) else math.isfinite(value)  # isfinite fails for whole numbers of hundreds of digits


def _check_weights(expected: Mapping[str, Tensor], saved: Any) -> None:
    """Compare saved weights with a network's; ValueError where names, shapes or types differ, or no network can use the values."""
    if not isinstance(saved, dict) or set(saved) != set(expected):
        raise ValueError("weights of another network")
    for name, value in expected.items():
        if not isinstance(saved[name], Tensor) or saved[name].shape != value.shape or saved[name].dtype != value.dtype:
            raise ValueError(f"weights {name!r} have another shape or type")
    if (problem := weights_problem(saved)) is not None:
        raise ValueError(f"weights {problem}")


def _check_optimizer_state(optimizer: torch.optim.Optimizer, saved: Any) -> None:
    """Compare an optimizer's saved state with its parameters (torch itself would fail only within a step); ValueError where they differ."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    groups, states = saved["param_groups"], saved["state"]
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in optimizer.param_groups]:
        raise ValueError("the optimizers update other weights; start a new run with --weights CHECKPOINT")
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
