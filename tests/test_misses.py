"""Error types of missing objects, and scores by class and by number of objects."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddpmctl.evaluation.misses import Misses, account, account_for, breakdown, confusion, recall
from ddpmctl.iclevr import CLASSES, ICLEVR

KNOWN = {
    "all there": ("red cube, blue sphere", "red cube, blue sphere", Misses()),
    "colours exchanged": ("red cube, blue sphere", "blue cube, red sphere", Misses(swapped=2)),
    "colours exchanged beside one that is right": ("red cube, blue sphere, green cylinder", "blue cube, red sphere, green cylinder", Misses(swapped=2)),
    "wrong shape": ("red cube", "red sphere", Misses(wrong_shape=1)),
    "wrong colour": ("red cube", "blue cube", Misses(wrong_colour=1)),
    "absent": ("red cube, blue sphere", "blue sphere", Misses(absent=1)),
    "one of a colour for two": ("red cube, red sphere", "red cube", Misses(absent=1)),
    "extra": ("red cube", "red cube, gray cylinder", Misses(extra=1)),
    "absent and extra": ("red cube", "gray cylinder", Misses(absent=1, extra=1)),
    "one explanation each": ("red cube", "red sphere, blue cube", Misses(wrong_shape=1, extra=1)),
    "as many explained as can be": ("red cube, red sphere", "red cylinder, blue cube", Misses(wrong_shape=1, wrong_colour=1)),
    "an exchange before anything else": ("red cube, blue sphere", "blue cube, red sphere, red cylinder", Misses(swapped=2, extra=1)),
    "three colours handed round": (
        "red cube, blue sphere, green cylinder", "blue cube, green sphere, red cylinder", Misses(wrong_shape=3)
    ),
    "everything shown": ("red cube", ", ".join(CLASSES), Misses(extra=23)),
}  # fmt: skip


def split(text: str) -> list[str]:
    return text.split(", ") if text else []


@pytest.mark.parametrize("case", KNOWN)
def test_error_types_of_known_cases(case: str) -> None:
    requested, shown, expected = KNOWN[case]
    assert account(split(requested), split(shown)) == expected
    outputs = torch.from_numpy(ICLEVR.multi_hot([tuple(split(shown))])).float() * 0.9
    assert account_for(outputs, [split(requested)]) == expected


def test_counts_of_images_add_up() -> None:
    cases = list(KNOWN.values())
    outputs = torch.from_numpy(ICLEVR.multi_hot([tuple(split(shown)) for _, shown, _ in cases])).float()
    total = account_for(outputs, [split(requested) for requested, _, _ in cases])
    assert total == sum((expected for _, _, expected in cases), Misses())
    assert total.missed == total.swapped + total.wrong_shape + total.wrong_colour + total.absent


@given(st.sets(st.sampled_from(CLASSES), min_size=1), st.sets(st.sampled_from(CLASSES)))
def test_every_object_is_counted_once(requested: set[str], shown: set[str]) -> None:
    found = account(requested, shown)
    assert found.missed == len(requested - shown)
    assert found.missed - found.absent + found.extra == len(shown - requested)


def test_recall_by_class_colour_and_shape_equals_the_labs_count() -> None:
    outputs = torch.zeros(2, 24)
    outputs[0, CLASSES.index("red cube")] = 0.3  # among the two highest, though below one half
    outputs[0, CLASSES.index("gray cylinder")] = 0.9
    outputs[1, CLASSES.index("red sphere")] = 0.8
    counts = recall(outputs, [("red cube", "blue sphere"), ("red sphere",)])
    assert counts["class"] == {"blue sphere": (0, 1), "red cube": (1, 1), "red sphere": (1, 1)}
    assert counts["colour"] == {"blue": (0, 1), "red": (2, 2)}
    assert counts["shape"] == {"cube": (1, 1), "sphere": (1, 2)}


def test_breakdown_by_number_of_objects_and_shared_colours() -> None:
    requests = [("red cube",), ("red cube", "red sphere"), ("red cube", "blue sphere")]
    outputs = torch.from_numpy(ICLEVR.multi_hot([("red cube",), ("red cube",), ("red cube", "blue sphere")])).float()
    parts = breakdown(outputs, requests)
    assert {name: (s.images, s.exact) for name, s in parts["objects"].items()} == {"1": (1, 1), "2": (2, 1)}
    assert {name: (s.images, s.exact) for name, s in parts["colours"].items()} == {"all differ": (2, 2), "one shared": (1, 0)}


def test_other_requested_objects_are_not_in_the_confusion() -> None:
    outputs = torch.from_numpy(ICLEVR.multi_hot([("red cube", "blue sphere"), ("gray cube",)])).float()
    table = confusion(outputs, [("red cube", "blue sphere"), ("red cube",)])
    row = table[CLASSES.index("red cube")]
    assert row[CLASSES.index("red cube")] == 0.5
    assert row[CLASSES.index("gray cube")] == 0.5
    assert row[CLASSES.index("blue sphere")] == 0
    assert table[CLASSES.index("blue sphere")][CLASSES.index("blue sphere")] == 1
