"""The label sets in the benchmark's training data, and the held-out ones.

The counts are those of the lab's train.json: every class alone, every pair, and 1,888 of the 2,024 triples. Of the 136 missing
triples, 32 are the held-out conditions. Sets are ordered by hashes, so that the choice is the same on every machine and version.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from importlib import resources

from ddpmctl.iclevr import CLASSES

ABSENT_TRIPLES = 136
HELD_OUT_ROUNDS = 4  # each round uses every class once: 4 rounds of 8 triples


def lab_conditions(name: str) -> list[tuple[str, ...]]:
    """Return the label sets of the lab's ``"test"`` or ``"new_test"`` file."""
    text = resources.files("ddpmctl.benchmark").joinpath("assets", f"{name}.json").read_text(encoding="utf-8")
    return [tuple(labels) for labels in json.loads(text)]


@functools.cache
def held_out_triples() -> tuple[tuple[str, ...], ...]:
    """Return the 32 held-out conditions of three objects; every class is in exactly four."""
    taken = _lab_sets()
    chosen: list[tuple[str, ...]] = []
    for round_ in range(HELD_OUT_ROUNDS):
        for salt in itertools.count():
            order = sorted(CLASSES, key=lambda name: _digest(f"{round_}/{salt}/{name}"))
            triples = [tuple(sorted(order[i : i + 3], key=CLASSES.index)) for i in range(0, len(order), 3)]
            if not any(frozenset(triple) in taken for triple in triples):
                break
        chosen += triples
        taken |= {frozenset(triple) for triple in triples}
    return tuple(chosen)


@functools.cache
def absent_triples() -> frozenset[frozenset[str]]:
    """Return the 136 triples that are not in the training data: the held-out ones, the lab's single one, and 103 more."""
    lab = _lab_sets()
    absent = {frozenset(triple) for triple in held_out_triples()} | {frozenset(("cyan cube", "green cylinder", "blue cube"))}
    for triple in sorted(itertools.combinations(CLASSES, 3), key=lambda names: _digest("/".join(names))):
        if len(absent) == ABSENT_TRIPLES:
            break
        if frozenset(triple) not in lab:
            absent.add(frozenset(triple))
    return frozenset(absent)


@functools.cache
def training_triples() -> tuple[tuple[str, ...], ...]:
    """Return the 1,888 triples of the training data, in the order of the class numbers."""
    return tuple(triple for triple in itertools.combinations(CLASSES, 3) if frozenset(triple) not in absent_triples())


def _lab_sets() -> set[frozenset[str]]:
    return {frozenset(labels) for name in ("test", "new_test") for labels in lab_conditions(name)}


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
