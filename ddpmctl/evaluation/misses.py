"""Error types of requested objects that are missing: binding errors or absence.

An image shows a class if its probability is above one half. Each missing object is matched with at most one object
that is shown but not requested: two objects with exchanged colours, the same colour with another shape, or the same
shape with another colour. Where labels have no such aspects (``Task.aspects``), an object is missing or extra, and nothing is matched.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np

from ddpmctl.evaluation.scores import THRESHOLD, Probabilities, Score, highest, score
from ddpmctl.iclevr import ICLEVR
from ddpmctl.task import Task


@dataclass(frozen=True)
class Misses:
    """Counts of missing objects by error type, and of extra objects.

    Attributes:
        swapped: the colour is exchanged with another requested object.
        wrong_shape: matched with an object of the same colour.
        wrong_colour: matched with an object of the same shape.
        absent: not matched.
        extra: shown, not requested and not matched.
    """

    swapped: int = 0
    wrong_shape: int = 0
    wrong_colour: int = 0
    absent: int = 0
    extra: int = 0

    def __add__(self, other: Misses) -> Misses:
        """Add all counts."""
        return Misses(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def missed(self) -> int:
        """The number of requested objects that are not shown."""
        return self.swapped + self.wrong_shape + self.wrong_colour + self.absent


def account(requested: Iterable[str], shown: Iterable[str], task: Task = ICLEVR) -> Misses:
    """Return the counts of one image, from labels such as ``red cube``.

    The best matching counts: most exchanges, then most matched objects, then most equal colours.
    """
    wanted, seen = set(requested), set(shown)
    missing, others = sorted(wanted - seen), sorted(seen - wanted)
    if not task.aspects:
        return Misses(absent=len(missing), extra=len(others))
    candidates = []
    for exchanged in _exchanges(missing, others):
        rest = [label for label in missing if label not in exchanged]
        free = [label for label in others if label not in {_with_colour(a, b) for a, b in itertools.permutations(exchanged, 2)}]
        matched, shape = _matched(rest, free)
        candidates.append((len(exchanged), matched, shape, Misses(len(exchanged), shape, matched - shape, len(rest) - matched, len(free) - matched)))
    return max(candidates, key=lambda candidate: candidate[:3])[3]


def _matched(missing: Sequence[str], others: Sequence[str]) -> tuple[int, int]:
    """Return the size of the largest matching of missing and other objects, and its largest number of equal colours.

    Dynamic programming over the other objects; the state is the set of matched objects.
    """
    best = {0: 0}  # matched objects, as bits -> number of equal colours
    for other in others:
        for taken, colours in list(best.items()):
            for index, label in enumerate(missing):
                same_colour = _colour(label) == _colour(other)
                if not taken >> index & 1 and (same_colour or _shape(label) == _shape(other)):
                    reached = taken | 1 << index
                    best[reached] = max(best.get(reached, 0), colours + same_colour)
    return max((taken.bit_count(), colours) for taken, colours in best.items())


def account_for(probabilities: Probabilities, requests: Sequence[Sequence[str]], task: Task = ICLEVR) -> Misses:
    """Return the counts of a batch of images, from the classifier's outputs (B, C) and the requested labels."""
    return sum((account(labels, seen, task) for labels, seen in zip(requests, _shown(probabilities, task), strict=True)), Misses())


def breakdown(probabilities: Probabilities, requests: Sequence[Sequence[str]], task: Task = ICLEVR) -> dict[str, dict[str, Score]]:
    """Return scores by number of objects and, where labels have aspects, by whether two objects share the first, such as colour: {aspect: {value: score}}."""
    first = f"{task.aspects[0]}s" if task.aspects else ""
    groups: dict[str, dict[str, list[int]]] = {"objects": {}, **({first: {}} if first else {})}
    for index, labels in enumerate(requests):
        groups["objects"].setdefault(str(len(labels)), []).append(index)
        if first:
            shared = len({_colour(label) for label in labels}) < len(labels)
            groups[first].setdefault("one shared" if shared else "all differ", []).append(index)
    wanted = task.multi_hot(list(map(tuple, requests)))
    return {aspect: {value: score(probabilities[chosen], wanted[chosen]) for value, chosen in sorted(parts.items())} for aspect, parts in groups.items()}


def recall(probabilities: Probabilities, requests: Sequence[Sequence[str]], task: Task = ICLEVR) -> dict[str, dict[str, tuple[int, int]]]:
    """Return (hits, requested) by class and by each aspect: {aspect: {value: counts}}; hits are among the k highest outputs."""
    counts: dict[str, dict[str, tuple[int, int]]] = {"class": {}, **{aspect: {} for aspect in task.aspects}}
    for outputs, labels in zip(np.asarray(probabilities), requests, strict=True):
        top = {task.classes[index] for index in highest(outputs, len(labels))}
        for label in labels:
            for aspect, value in (("class", label), *zip(task.aspects, task.words(label), strict=True)):
                hits, requested = counts[aspect].get(value, (0, 0))
                counts[aspect][value] = (hits + (label in top), requested + 1)
    return {aspect: dict(sorted(parts.items())) for aspect, parts in counts.items()}


def confusion(probabilities: Probabilities, requests: Sequence[Sequence[str]], task: Task = ICLEVR) -> list[list[float]]:
    """Return a C x C table: the fraction of images with a requested class (row) that show a class (column).

    Other requested classes of the image do not count.
    """
    shown, asked = [[0] * len(task.classes) for _ in task.classes], [0] * len(task.classes)
    for seen, labels in zip(_shown(probabilities, task), requests, strict=True):
        for label in labels:
            row = task.index[label]
            asked[row] += 1
            for other in seen:
                if other == label or other not in labels:
                    shown[row][task.index[other]] += 1
    return [[value / max(count, 1) for value in row] for row, count in zip(shown, asked, strict=True)]


def _shown(probabilities: Probabilities, task: Task) -> list[list[str]]:
    """Return the classes that each image shows."""
    return [[task.classes[index] for index in np.flatnonzero(present)] for present in np.asarray(probabilities)[:, : len(task.classes)] > THRESHOLD]


def _exchanges(missing: Sequence[str], others: Sequence[str]) -> Iterator[frozenset[str]]:
    """Yield the empty set, and every pair of missing objects that are both shown with the other's colour."""
    yield frozenset()
    for first, second in itertools.combinations(missing, 2):
        if _with_colour(first, second) in others and _with_colour(second, first) in others:
            yield frozenset((first, second))


def _with_colour(label: str, other: str) -> str:
    return f"{_colour(other)} {_shape(label)}"


def _colour(label: str) -> str:
    return label.split(maxsplit=1)[0]


def _shape(label: str) -> str:
    return label.split()[1]
