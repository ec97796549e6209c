"""Every kind of event that the terminal shows, under one name; the terminal imports it with the first event, since it loads torch."""

from ddpmctl.evaluation.results import Failed
from ddpmctl.progress import Notice, Progress
from ddpmctl.training.events import EpochDone, Evaluated, Overridden, RolledBack, Ticked

__all__ = ["EpochDone", "Evaluated", "Failed", "Notice", "Overridden", "Progress", "RolledBack", "Ticked"]
