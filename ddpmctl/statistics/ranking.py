"""Which of several checkpoints is the best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Standing(NamedTuple):
    """A checkpoint's place among others: higher accuracy first, of equal ones higher exact match, of equal ones the later epoch.

    What is unknown is -1.
    """

    accuracy: float
    exact: float = -1.0
    epoch: int = -1

    @staticmethod
    def of(accuracy: float, exact: float, epoch: int | None) -> Standing:
        """Return a standing; NaN and ``epoch`` None are unknown."""
        return Standing(-1.0 if math.isnan(accuracy) else accuracy, -1.0 if math.isnan(exact) else exact, -1 if epoch is None else epoch)


def best_index(standings: Sequence[Standing]) -> int:
    """Return the index of the best; of equal ones the first.

    The highest of several noisy scores is biased upwards (winner's curse), so ``confirm_best`` scores the choice on new noise.
    """
    return max(range(len(standings)), key=lambda index: (standings[index], -index))
