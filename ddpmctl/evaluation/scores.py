"""Scores computed from classifier outputs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

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


def top_k_hits(probabilities: Tensor, requested: Tensor) -> list[int]:
    """Return, per image, how many of its k requested labels are among the k highest outputs.

    This is the lab's count, with ``topk``'s order of ties. Extra objects are not punished.
    """
    hits = []
    for outputs, wanted in zip(probabilities.cpu(), requested.cpu().bool(), strict=True):
        top = outputs.topk(int(wanted.sum())).indices
        hits.append(int(wanted[top].sum()))
    return hits


def score(probabilities: Tensor, requested: Tensor) -> Score:
    """Return the score of images from classifier outputs and multi-hot requests, both (B, 24)."""
    wanted = requested.cpu().bool()
    exact = ((probabilities.cpu() > THRESHOLD) == wanted).all(dim=1)
    return Score(hits=sum(top_k_hits(probabilities, requested)), labels=int(wanted.sum()), exact=int(exact.sum()), images=len(wanted))


def pooled(scores: list[Score]) -> Score:
    """Return the sum of several scores."""
    return Score(*(sum(getattr(s, name) for s in scores) for name in ("hits", "labels", "exact", "images")))
