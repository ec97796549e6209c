"""Scores computed from classifier outputs."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

Probabilities = npt.NDArray[np.float32]
"""A classifier's outputs, (B, 24)."""

THRESHOLD = 0.5


@dataclass(frozen=True)
class Score:
    """Counts over a set of images.

    Attributes:
        hits: requested labels found.
        labels: requested labels.
        exact: images that show every requested object and no other.
        images: number of images.
    """

    hits: int
    labels: int
    exact: int
    images: int

    @property
    def accuracy(self) -> float:
        """The lab's pooled accuracy, hits / labels; NaN without labels."""
        return self.hits / self.labels if self.labels else float("nan")

    @property
    def exact_match(self) -> float:
        """exact / images; NaN without images."""
        return self.exact / self.images if self.images else float("nan")

    def to_dict(self) -> dict[str, int | float]:
        """Return counts and ratios as a dict."""
        return {**asdict(self), "accuracy": self.accuracy, "exact_match": self.exact_match}


def highest(outputs: Probabilities, count: int) -> npt.NDArray[np.intp]:
    """Return which ``count`` classes have the highest outputs (24,) of one image, in no order.

    Where equal outputs compete for the last place, it is torch's ``topk`` that decides, as in the lab's code.
    """
    if count == 0:
        return np.empty(0, np.intp)
    lowest = np.partition(outputs, -count)[-count]
    top = np.flatnonzero(outputs >= lowest)
    if len(top) > count:
        import torch

        top = torch.from_numpy(outputs).topk(count).indices.numpy()
    return top


def top_k_hits(probabilities: Probabilities, requested: npt.NDArray[np.generic]) -> list[int]:
    """Return, per image, how many of its k requested labels are among the k highest outputs.

    This is the lab's count. Extra objects are not punished.
    """
    every_wanted = np.asarray(requested).astype(bool)
    return [int(wanted[highest(outputs, int(wanted.sum()))].sum()) for outputs, wanted in zip(np.asarray(probabilities), every_wanted, strict=True)]


def score(probabilities: Probabilities, requested: npt.NDArray[np.generic]) -> Score:
    """Return the score of images from classifier outputs and multi-hot requests, both (B, 24)."""
    wanted = np.asarray(requested).astype(bool)
    exact = ((np.asarray(probabilities) > THRESHOLD) == wanted).all(axis=1)
    return Score(hits=sum(top_k_hits(probabilities, requested)), labels=int(wanted.sum()), exact=int(exact.sum()), images=len(wanted))


def pooled(scores: list[Score]) -> Score:
    """Return the sum of several scores."""
    return Score(*(sum(getattr(s, name) for s in scores) for name in ("hits", "labels", "exact", "images")))
