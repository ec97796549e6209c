"""The records that the engine yields; the terminal, the log and the tests all read this one stream."""

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
class Ticked:
    """A sign of life between steps; not logged.

    Attributes:
        fraction: of the budget, 0 to 1.
    """

    step: int
    epoch: int
    loss: float
    images_per_second: float
    fraction: float


@dataclass(frozen=True)
class StopAgreed:
    """All ranks of a job are after the same step and have agreed to end here: one of them was sent the signal ``number``."""

    number: int


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
    """One pass over the images, or what the budget left of it; ``loss`` is the mean over it."""

    epoch: int
    step: int
    images_seen: int
    loss: float
    lr: float
    seconds: float
    images_per_second: float


@dataclass(frozen=True)
class Evaluated:
    """The weights of this moment were scored on the condition files."""

    epoch: int
    step: int
    images_seen: int
    loss: float
    seconds: float
    scores: dict[str, Score]
    evaluator: str
    checkpoint: Path


@dataclass(frozen=True)
class Saved:
    """A file is safely on disk."""

    path: Path


@dataclass(frozen=True)
class RolledBack:
    """Numbers were no longer finite; training goes on from an earlier state.

    Attributes:
        reason: what was not finite, and where.
        step: of the state gone back to.
        lr_scale: what is left of the learning rate.
    """

    reason: str
    step: int
    lr_scale: float
    count: int


@dataclass(frozen=True)
class Overridden:
    """A resumed run goes on with other settings: (before, now) by name."""

    step: int
    changed: dict[str, tuple[Value, Value]]


Event = Progress | Notice | Prepared | Ticked | StepDone | StopAgreed | EpochDone | Evaluated | Saved | RolledBack | Overridden
