"""Labels as people write them."""

from __future__ import annotations

import pytest

from ddpmctl.errors import UsageError
from ddpmctl.iclevr import CLASSES, ICLEVR
from ddpmctl.label_lists import parse_labels


@pytest.mark.parametrize("label", CLASSES)
def test_every_label_is_read_in_the_spellings_that_people_use(label: str) -> None:
    colour, shape = label.split()
    spellings = [label, label.title(), label.upper(), f" {colour}  {shape} ", f"{colour}-{shape}", f"{colour}_{shape}"]
    spellings += [f"{shape} {colour}", f"{colour} {shape}s"]
    if colour == "gray":
        spellings += [f"grey {shape}", f"Grey-{shape}s"]
    assert {ICLEVR.parse_label(text) for text in spellings} == {label}


@pytest.mark.parametrize("text", ["red", "cube", "red blue cube", "red cube sphere", "red cube red cube", "a red cube", "redcube", "", "-"])
def test_a_label_is_never_guessed(text: str) -> None:
    with pytest.raises(UsageError, match="unknown label"):
        ICLEVR.parse_label(text)


def test_an_image_takes_a_list_with_commas_or_semicolons() -> None:
    texts = ["red cube,blue sphere", "red cube; blue sphere", "Red Cubes, blue-sphere,", "cube red;sphere blue; "]
    assert parse_labels(texts) == [("red cube", "blue sphere")] * len(texts)
