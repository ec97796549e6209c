"""``ddpmctl data labels``: how often each label occurs, and which occur together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ddpmctl.data.declared import Declared
from ddpmctl.iclevr import ICLEVR


@dataclass(frozen=True)
class LabelCounts:
    """Counts over the images of a data set.

    Attributes:
        images, unlabelled: how many there are, and how many have no label.
        counts: images that show each label, by label, in the order of the classes.
        together: (C, C), images that show both labels; on the diagonal the counts.
        sizes: {labels in an image: images}.
    """

    images: int
    unlabelled: int
    counts: dict[str, int]
    together: np.ndarray
    sizes: dict[int, int]

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as plain values; of pairs only those that occur."""
        names = list(self.counts)
        pairs = [[names[i], names[j], int(self.together[i, j])] for i, j in zip(*np.triu(self.together, 1).nonzero(), strict=True)]
        sizes = {str(size): count for size, count in self.sizes.items()}
        return {"images": self.images, "labels": self.counts, "together": pairs, "labels_in_an_image": sizes}

    def partner(self, label: str) -> tuple[str, int] | None:
        """Return the label that occurs most often together with another, and how often; None if it is always alone."""
        names = list(self.counts)
        row = self.together[names.index(label)].copy()
        row[names.index(label)] = 0
        return (names[int(row.argmax())], int(row.max())) if row.any() else None


def count_labels(declared: Declared) -> LabelCounts:
    """Return the counts of a data set's labels."""
    task = declared.task(ICLEVR.size)
    rows = task.multi_hot(list(declared.labels.values()))[:, : len(task.classes)].astype(np.float32)
    together = (rows.T @ rows).astype(np.int64)
    lengths = sorted(map(len, declared.labels.values()))
    counts = {name: int(together[index, index]) for index, name in enumerate(task.classes)}
    return LabelCounts(len(lengths), lengths.count(0), counts, together, {size: lengths.count(size) for size in dict.fromkeys(lengths)})
