"""Conditions for data that bring none: label sets of the images themselves, some of them kept out of training."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

from ddpmctl.data.source import MOST_HELD_OUT
from ddpmctl.task import LabelSet

MOST_TEST = 64
SHARE_HELD_OUT = 10  # one of so many label sets is kept out, unless the number is given
UNLABELLED = 16  # images that are sampled of data without labels
TEST, HELD_OUT = "test", "heldout"


def conditions_of(labels: Sequence[LabelSet], hold_out: int | None = None) -> dict[str, list[LabelSet]]:
    """Return ``test``, the most frequent label sets, and ``heldout``, sets that training must not see, if there are any.

    Only sets of two or more labels are held out, and only as long as each of their labels is in another set. Which ones is decided by
    hashes, so that the same sets are held out when images are added.

    Args:
        labels: of every image.
        hold_out: how many sets are held out, at most; None: a tenth of those with two or more labels, up to 32.
    """
    counts = Counter(tuple(sorted(one)) for one in labels if one)
    if not counts:
        return {TEST: [()] * UNLABELLED}
    held_out = _held_out(counts, hold_out)
    kept = [one for one in counts if one not in set(held_out)]
    test = sorted(kept, key=lambda one: (-counts[one], _digest(one)))[:MOST_TEST]
    return {TEST: test, **({HELD_OUT: held_out} if held_out else {})}


def _held_out(counts: Counter[LabelSet], most: int | None) -> list[LabelSet]:
    several = sorted((one for one in counts if len(one) > 1), key=_digest)
    most = min(MOST_HELD_OUT, len(several) // SHARE_HELD_OUT) if most is None else most
    left = Counter(label for one in counts for label in one)  # sets that training shows, by label
    chosen: list[LabelSet] = []
    for one in several:
        if len(chosen) == most:
            break
        if all(left[label] > 1 for label in one):
            chosen.append(one)
            left.subtract(one)
    return chosen


def _digest(labels: LabelSet) -> bytes:
    return hashlib.sha256("\0".join(labels).encode()).digest()
