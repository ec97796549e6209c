"""The 24 object classes of i-CLEVR, in the lab's order, and their multi-hot encoding."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ddpmctl.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

SHAPES = ("cube", "sphere", "cylinder")
COLOURS = ("gray", "red", "blue", "green", "brown", "purple", "cyan", "yellow")
CLASSES: tuple[str, ...] = tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)
INDEX: dict[str, int] = {name: index for index, name in enumerate(CLASSES)}

LabelSet = tuple[str, ...]
"""The requested objects of one image."""


def class_index(name: str) -> int:
    """Return the class number (0-23) of a label such as ``"red cube"``.

    Raises:
        UsageError: the label is unknown; the message suggests similar ones.
    """
    key = " ".join(name.lower().split())
    if key not in INDEX:
        near = difflib.get_close_matches(key, CLASSES, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"a label is a colour ({', '.join(COLOURS)}) and a shape ({', '.join(SHAPES)})"
        raise UsageError(f"unknown label {name!r}: {hint}")
    return INDEX[key]


def multi_hot(label_sets: Sequence[Sequence[str]]) -> np.ndarray:
    """Return label sets as multi-hot vectors, uint8 (N, 24)."""
    import numpy as np  # imported here to keep --help fast

    out = np.zeros((len(label_sets), len(CLASSES)), dtype=np.uint8)
    for row, names in zip(out, label_sets, strict=True):
        row[[class_index(name) for name in names]] = 1
    return out
