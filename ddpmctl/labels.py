"""The 24 object classes of i-CLEVR, in the lab's order, and their multi-hot encoding."""

from __future__ import annotations

import difflib
import re
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
    """Return the class number (0-23) of a label such as ``"red cube"``; UsageError as for ``parse_label``."""
    return INDEX[name if name in INDEX else parse_label(name)]


def parse_label(text: str) -> str:
    """Return the label that a person wrote: in any case and order, with a hyphen, in the plural, or with "grey".

    Raises:
        UsageError: the text has not exactly one colour and one shape; the message offers what may be meant.
    """
    words = _words(text)
    found = [label for label in CLASSES if sorted(label.split()) == sorted(words)]
    if not found:
        raise UsageError(f"unknown label {text!r}: {_offer(words, text)}")
    return found[0]


def _words(text: str) -> list[str]:
    """Return the words of a label in the spelling of ``COLOURS`` and ``SHAPES``, where they are known."""
    words = [word for word in re.split(r"[\s_-]+", text.lower()) if word]
    return [{"grey": "gray", **{f"{shape}s": shape for shape in SHAPES}}.get(word, word) for word in words]


def _offer(words: Sequence[str], text: str) -> str:
    """Return a hint for an unknown label: similar labels, or the form of a label."""
    colours, shapes = [word for word in words if word in COLOURS], [word for word in words if word in SHAPES]
    if len(words) == len(colours) + len(shapes) > 0:
        if len(colours) == len(shapes):  # as many as two labels have
            return "several labels are separated by commas"
        near = [f"{colour} {shape}" for colour in dict.fromkeys(colours or COLOURS) for shape in dict.fromkeys(shapes or SHAPES)]
    else:
        near = difflib.get_close_matches(" ".join(words), CLASSES, n=3, cutoff=0.4)
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    return f"a label is a colour ({', '.join(COLOURS)}) and a shape ({', '.join(SHAPES)})"


def multi_hot(label_sets: Sequence[Sequence[str]]) -> np.ndarray:
    """Return label sets as multi-hot vectors, uint8 (N, 24)."""
    import numpy as np  # imported here to keep --help fast

    out = np.zeros((len(label_sets), len(CLASSES)), dtype=np.uint8)
    for row, names in zip(out, label_sets, strict=True):
        row[[class_index(name) for name in names]] = 1
    return out
