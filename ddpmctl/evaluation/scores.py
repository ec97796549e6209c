"""Scores computed from a classifier's answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

THRESHOLD = 0.5


@dataclass(frozen=True)
class Score:
    """How well images show what was asked for.

    Attributes:
        hits: requested labels found, over all images.
        labels: requested labels, over all images.
        exact: images that show every requested object and no other.
        images: images scored.
    """

    hits: int
    labels: int
    exact: int
    images: int

    @property
    def accuracy(self) -> float:
        """The lab's pooled accuracy, hits / labels; NaN where nothing was requested."""
        return self.hits / self.labels if self.labels else float("nan")

    @property
    def exact_match(self) -> float:
        """The share of images that are right altogether; NaN without images."""
        return self.exact / self.images if self.images else float("nan")

    def to_dict(self) -> dict[str, int | float]:
        """Return counts and ratios as plain values."""
        return {**asdict(self), "accuracy": self.accuracy, "exact_match": self.exact_match}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Score:
        """Return the score that ``to_dict`` described."""
        return Score(*(int(values[name]) for name in ("hits", "labels", "exact", "images")))


def top_k_hits(probabilities: Tensor, requested: Tensor) -> list[int]:
    """Return, per image, how many requested labels are among its k highest outputs, k being the number requested.

    This is the lab's count, image by image and with ``topk``'s own way with ties, so that it
    agrees to the last digit. Extra objects are not punished.

    Args:
        probabilities: (B, 24), the classifier's outputs.
        requested: (B, 24), multi-hot.
    """
    hits = []
    for outputs, wanted in zip(probabilities.cpu(), requested.cpu().bool(), strict=True):
        top = outputs.topk(int(wanted.sum())).indices
        hits.append(int(wanted[top].sum()))
    return hits


def score(probabilities: Tensor, requested: Tensor) -> Score:
    """Return the pooled score of images, given the classifier's outputs and the multi-hot requests, both (B, 24)."""
    wanted = requested.cpu().bool()
    exact = ((probabilities.cpu() > THRESHOLD) == wanted).all(dim=1)
    return Score(hits=sum(top_k_hits(probabilities, requested)), labels=int(wanted.sum()), exact=int(exact.sum()), images=len(wanted))


def pooled(scores: list[Score]) -> Score:
    """Return the score of all images of several scores together."""
    return Score(*(sum(getattr(s, name) for s in scores) for name in ("hits", "labels", "exact", "images")))


__all__ = ["THRESHOLD", "Score", "pooled", "score", "top_k_hits"]
