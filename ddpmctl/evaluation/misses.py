"""What became of the objects that a picture does not show: binding errors told apart from absence.

A picture shows what the classifier gives more than one half. A requested object that is not shown is set
beside an object that is shown without having been requested, where one can stand for it: two that exchanged
their colours, the right colour on a wrong shape, the right shape in a wrong colour. Each shown object stands for one at most.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ddpmctl.evaluation.scores import THRESHOLD, Score, score
from ddpmctl.labels import CLASSES, multi_hot


@dataclass(frozen=True)
class Misses:
    """Requested objects that are not shown, by what is shown in their place, and objects that nobody requested.

    Attributes:
        swapped: objects that exchanged their colours with another requested one.
        wrong_shape: the colour is there, on another shape.
        wrong_colour: the shape is there, in another colour.
        absent: nothing stands for it.
        extra: shown, not requested, and standing for nothing.
    """

    swapped: int = 0
    wrong_shape: int = 0
    wrong_colour: int = 0
    absent: int = 0
    extra: int = 0

    def __add__(self, other: Misses) -> Misses:
        """Return the account of both."""
        return Misses(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def missed(self) -> int:
        """Requested objects that are not shown."""
        return self.swapped + self.wrong_shape + self.wrong_colour + self.absent


def account(requested: Iterable[str], shown: Iterable[str]) -> Misses:
    """Return what became of one picture's objects, both given as labels such as ``red cube``.

    Of all ways to let shown objects stand for requested ones, the one counts that explains the most: exchanges first, then
    the most objects, then colours before shapes.
    """
    wanted, seen = set(requested), set(shown)
    missing, others = sorted(wanted - seen), sorted(seen - wanted)
    trajectories = []
    for exchanged in _exchanges(missing, others):
        rest = [label for label in missing if label not in exchanged]
        free = [label for label in others if label not in {_with_colour(a, b) for a, b in itertools.permutations(exchanged, 2)}]
        matched, shape = _matched(rest, free)
        trajectories.append((len(exchanged), matched, shape, Misses(len(exchanged), shape, matched - shape, len(rest) - matched, len(free) - matched)))
    return max(trajectories, key=lambda way: way[:3])[3]


def _matched(missing: Sequence[str], others: Sequence[str]) -> tuple[int, int]:
    """Return the most objects that others can stand for, each once, and of those the most that have the right colour.

    Goes through the others one by one and keeps, for every set of objects already stood for, the best way to it.
    """
    best = {0: 0}  # objects stood for, as bits -> those of them with the right colour
    for other in others:
        for taken, colours in list(best.items()):
            for index, label in enumerate(missing):
                same_colour = _colour(label) == _colour(other)
                if not taken >> index & 1 and (same_colour or _shape(label) == _shape(other)):
                    reached = taken | 1 << index
                    best[reached] = max(best.get(reached, 0), colours + same_colour)
    return max((taken.bit_count(), colours) for taken, colours in best.items())


def account_for(probabilities: Tensor, requests: Sequence[Sequence[str]]) -> Misses:
    """Return the account of several pictures: the classifier's outputs (B, 24), and the labels requested of each."""
    shown = [[CLASSES[index] for index in answer.nonzero().flatten().tolist()] for answer in probabilities.cpu() > THRESHOLD]
    return sum((account(labels, seen) for labels, seen in zip(requests, shown, strict=True)), Misses())


def breakdown(probabilities: Tensor, requests: Sequence[Sequence[str]]) -> dict[str, dict[str, Score]]:
    """Return scores by number of objects and by whether two share a colour: {aspect: {value: score}}.

    Args:
        probabilities: the classifier's outputs, (B, 24).
        requests: the labels requested of each picture.
    """
    groups: dict[str, dict[str, list[int]]] = {"objects": {}, "colours": {}}
    for index, labels in enumerate(requests):
        groups["objects"].setdefault(str(len(labels)), []).append(index)
        shared = len({_colour(label) for label in labels}) < len(labels)
        groups["colours"].setdefault("one shared" if shared else "all differ", []).append(index)
    wanted = torch.from_numpy(multi_hot(list(map(tuple, requests)))).float()
    return {
        aspect: {value: score(probabilities[chosen], wanted[chosen]) for value, chosen in sorted(parts.items())} for aspect, parts in groups.items()
    }


def recall(probabilities: Tensor, requests: Sequence[Sequence[str]]) -> dict[str, dict[str, tuple[int, int]]]:
    """Return (hits, requested) by class, colour and shape: {aspect: {value: counts}}; hits as the lab counts them, among the k highest."""
    counts: dict[str, dict[str, tuple[int, int]]] = {"class": {}, "colour": {}, "shape": {}}
    for outputs, labels in zip(probabilities.cpu(), requests, strict=True):
        top = {CLASSES[index] for index in outputs.topk(len(labels)).indices.tolist()}
        for label in labels:
            for aspect, value in (("class", label), ("colour", _colour(label)), ("shape", _shape(label))):
                hits, requested = counts[aspect].get(value, (0, 0))
                counts[aspect][value] = (hits + (label in top), requested + 1)
    return {aspect: dict(sorted(parts.items())) for aspect, parts in counts.items()}


def confusion(probabilities: Tensor, requests: Sequence[Sequence[str]]) -> list[list[float]]:
    """Return a 24 x 24 table: row, a requested class; column, how often a picture asked for it shows that class.

    Only columns of classes that the picture was not asked for, and the diagonal, count, so that a second requested object is no confusion.
    """
    shown, asked = [[0] * len(CLASSES) for _ in CLASSES], [0] * len(CLASSES)
    for answer, labels in zip(probabilities.cpu() > THRESHOLD, requests, strict=True):
        seen = [CLASSES[index] for index in answer.nonzero().flatten().tolist()]
        for label in labels:
            row = CLASSES.index(label)
            asked[row] += 1
            for other in seen:
                if other == label or other not in labels:
                    shown[row][CLASSES.index(other)] += 1
    return [[value / max(count, 1) for value in row] for row, count in zip(shown, asked, strict=True)]


def _exchanges(missing: Sequence[str], others: Sequence[str]) -> Iterator[frozenset[str]]:
    """Yield no exchange, and every pair of missing objects that are both shown with the other's colour."""
    yield frozenset()
    for first, second in itertools.combinations(missing, 2):
        if _with_colour(first, second) in others and _with_colour(second, first) in others:
            yield frozenset((first, second))


def _with_colour(label: str, giver: str) -> str:
    return f"{_colour(giver)} {_shape(label)}"


def _colour(label: str) -> str:
    return label.split(maxsplit=1)[0]


def _shape(label: str) -> str:
    return label.split()[1]


__all__ = ["Misses", "account", "account_for", "breakdown", "confusion", "recall"]
