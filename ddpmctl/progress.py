"""The two kinds of event that every long task yields, whatever it does."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Progress of a long task; ``stage`` names what is being done, such as "decoding" or "sampling"."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class Notice:
    """Something the user should know that stops nothing, such as a cache folder that cannot be written."""

    text: str
