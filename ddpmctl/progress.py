"""Events that every long task yields."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Progress of one stage of a task, such as "decoding" or "sampling"."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class Notice:
    """A warning that does not stop the task, such as a read-only cache folder."""

    text: str
