"""Events of a training run; the terminal output, the log and the tests read them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ddpmctl.config import Value
from ddpmctl.evaluation.scores import Score
from ddpmctl.progress import Notice, Progress
from ddpmctl.training.plan import Plan


@dataclass(frozen=True)
class Prepared:
    """The run's folder, data and network are ready; training follows."""

    plan: Plan


@dataclass(frozen=True)
class Resumed:
    """A run continues from its saved state; not logged.

    Attributes:
        fraction: used part of the budget, 0 to 1.
        seconds: estimated duration of the remaining training steps, at the speed so far; None where it is not known.
    """

    step: int
    epoch: int
    fraction: float
    seconds: float | None


@dataclass(frozen=True)
class Ticked:
    """Progress for display; not logged.

    Attributes:
        fraction: used part of the budget, 0 to 1.
    """

    step: int
    epoch: int
    loss: float
    images_per_second: float
    fraction: float


@dataclass(frozen=True)
class StopAgreed:
    """All ranks stop after the same step, because one of them received the signal ``number``."""

    number: int
    step: int
    epoch: int


@dataclass(frozen=True)
class StepDone:
    """One logged step; ``loss`` is the mean since the last logged one."""

    step: int
    epoch: int
    images_seen: int
    loss: float
    lr: float
    seconds: float


@dataclass(frozen=True)
class EpochDone:
    """An epoch ended, or the budget within it; ``loss`` is the mean over the epoch."""

    epoch: int
    step: int
    images_seen: int
    loss: float
    lr: float
    seconds: float
    images_per_second: float


@dataclass(frozen=True)
class Evaluated:
    """The current weights were scored on the condition files.

    Attributes:
        sharpness: Laplacian energy of the images as a ratio of that of training images with as many objects.
    """

    epoch: int
    step: int
    images_seen: int
    loss: float
    seconds: float
    scores: dict[str, Score]
    evaluator: str
    checkpoint: Path
    sharpness: float


@dataclass(frozen=True)
class Saved:
    """A file was written to the disk."""

    path: Path


@dataclass(frozen=True)
class RolledBack:
    """NaN or inf occurred; training continues from the last saved state.

    Attributes:
        reason: what was not finite, and at which step.
        step: of the restored state.
        lr_scale: factor of the learning rate from now on.
    """

    reason: str
    step: int
    lr_scale: float
    count: int


@dataclass(frozen=True)
class Overridden:
    """A resumed run has changed settings: (before, now) by name."""

    step: int
    changed: dict[str, tuple[Value, Value]]


Event = Progress | Notice | Prepared | Resumed | Ticked | StepDone | StopAgreed | EpochDone | Evaluated | Saved | RolledBack | Overridden
