"""TensorBoard event files of a run, for ``train --tensorboard``."""

from __future__ import annotations

from typing import Any

from ddpmctl.errors import UsageError
from ddpmctl.runs.folder import Run
from ddpmctl.training.events import EpochDone, Evaluated, Event, RolledBack, StepDone


def require_tensorboard() -> None:
    """Check that TensorBoard is installed.

    Raises:
        UsageError: it is not; the message says how to install it.
    """
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise UsageError("--tensorboard: the package tensorboard is not installed; run: python -m pip install tensorboard") from None


class TensorBoard:
    """Writes losses, learning rate and scores over steps.

    A resumed run writes a new file that begins at its first step; TensorBoard then leaves out later steps of earlier files.
    """

    def __init__(self, run: Run) -> None:
        """Write to the run's folder ``tensorboard``."""
        self._folder = run.tensorboard
        self._writer: Any = None

    def read(self, event: Event) -> None:
        """Write an event's values; events of other kinds are ignored."""
        match event:
            case StepDone():
                self._write(event.step, {"loss/steps": event.loss, "lr": event.lr})
            case EpochDone():
                self._write(event.step, {"loss/epoch": event.loss, "images per second": event.images_per_second})
            case Evaluated():
                scores = {f"{name}/{file}": getattr(score, name) for file, score in event.scores.items() for name in ("accuracy", "exact_match")}
                self._write(event.step, {**scores, "sharpness": event.sharpness})
            case RolledBack():
                self.close()

    def _write(self, step: int, values: dict[str, float]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if self._writer is None:
            self._writer = SummaryWriter(str(self._folder), purge_step=step)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the file; the next event begins a new one."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
