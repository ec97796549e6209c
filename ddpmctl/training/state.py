"""The training state: everything that a run needs to continue, as tensors and plain values."""

from __future__ import annotations

from typing import Any

from ddpmctl.checkpoints.format import not_finite
from ddpmctl.errors import DataError, show
from ddpmctl.training.gradients import Diverged
from ddpmctl.training.state_validation import check_optimizer_state, check_weights, validated_counters
from ddpmctl.training.trainer import Trainer

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
        raise DataError(f"{where}: is no training state of this version")
    if state.get("data") != trainer.dataset.key:
        raise DataError(f"{where}: the run was trained on other data than {trainer.dataset.name}")
    peaks = [[group["peak_lr"] for group in optimizer.param_groups] for optimizer in trainer.optimizers]
    try:
        counters = validated_counters(state["counters"])
        if counters.batch > trainer.batches_per_epoch:
            raise ValueError("batch index exceeds the epoch's length")
        check_weights(trainer.net.state_dict(), state["net"])
        trainer.net.load_state_dict(state["net"])
        if trainer.average is not None:
            check_weights(trainer.average.state_dict(), state["average"])
            trainer.average.load_state_dict(state["average"])
        for optimizer, saved in zip(trainer.optimizers, state["optimizers"], strict=True):
            check_optimizer_state(optimizer, saved)
            optimizer.load_state_dict(saved)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise DataError(f"{where}: does not fit the run's settings ({show(str(error).splitlines()[0] if str(error) else repr(error))})") from None
    for optimizer, own in zip(trainer.optimizers, peaks, strict=True):
        for group, peak in zip(optimizer.param_groups, own, strict=True):
            group["peak_lr"] = peak
    trainer.go_on_from(counters)
