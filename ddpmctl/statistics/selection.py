"""Choosing the best of several checkpoints without believing the score that it was chosen by.

The highest of many noisy scores is too high by about as much as the noise allows (the winner's curse); a
score from images that had no part in the choice is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ddpmctl.statistics.tallies import Tally


def chosen(tallies: Sequence[Tally]) -> int:
    """Return the index of the highest accuracy, the first of equals."""
    return max(range(len(tallies)), key=lambda index: (tallies[index].accuracy, -index))
