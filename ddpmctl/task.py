"""What a data set asks of networks and classifiers: its classes, in order, and the size of its images.

A task travels with the data, the run, every checkpoint and every classifier. The lab's is ``ICLEVR`` (``ddpmctl/iclevr.py``).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ddpmctl.errors import DataError, UsageError, show

if TYPE_CHECKING:
    import numpy as np

LabelSet = tuple[str, ...]
"""The labels requested of one image."""

SIZES = (32, 64, 96, 128, 256)
MOST_CLASSES = 1000
LONGEST_NAME = 200
MOST_SCORED = 2
MOST_WORDS = 12  # of a text in which several labels are looked for: the time grows fast with their number
SAME_WORDS = {"grey": "gray", "colour": "color"}  # spellings of one word


@dataclass(frozen=True)
class Task:
    """What is to be drawn.

    Attributes:
        classes: names of the labels, in the order of their numbers; none for images without labels.
        size: pixels on a side.
        scored: names of the condition files on which training scores, one or two of them.
        aspects: what the words of every class say, such as colour and shape; empty where names are just names.
    """

    classes: tuple[str, ...]
    size: int
    scored: tuple[str, ...]
    aspects: tuple[str, ...] = ()

    @property
    def columns(self) -> int:
        """C, the columns of multi-hot labels; one, always zero, where there are no classes, because layers need at least one input."""
        return max(1, len(self.classes))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape of an image, (3, H, W)."""
        return (3, self.size, self.size)

    @property
    def names_objects(self) -> bool:
        """Whether a label names an object that an image shows at most once, as labels with aspects do."""
        return bool(self.aspects)

    @cached_property
    def index(self) -> dict[str, int]:
        """The number of each class."""
        return {name: index for index, name in enumerate(self.classes)}

    @cached_property
    def key(self) -> str:
        """A hash of classes and size: networks and classifiers of equal keys fit each other."""
        return hashlib.sha256(json.dumps([self.classes, self.size]).encode()).hexdigest()

    @cached_property
    def _by_words(self) -> dict[tuple[str, ...], list[str]]:
        found: dict[tuple[str, ...], list[str]] = {}
        for name in self.classes:
            found.setdefault(_key(name), []).append(name)
        return found

    def multi_hot(self, label_sets: Sequence[Sequence[str]]) -> np.ndarray:
        """Return label sets as multi-hot vectors, uint8 (N, C); UsageError for an unknown label, as ``parse_label``."""
        import numpy as np  # imported here to keep --help fast

        out = np.zeros((len(label_sets), self.columns), dtype=np.uint8)
        for row, names in zip(out, label_sets, strict=True):
            row[[self.index[self.parse_label(name)] for name in names]] = 1
        return out

    def parse_label(self, text: str) -> str:
        """Return the class that a person wrote: in any case and order of words, with a hyphen, or in the plural.

        Raises:
            UsageError: no class, or more than one, has exactly these words; the message offers what may be meant.
        """
        if text in self.index:
            return text
        if not self.classes:
            raise UsageError(f"{show(text)}: these images have no labels")
        found = self._by_words.get(_key(text), [])
        if len(found) != 1:
            raise UsageError(f"unknown label {show(text)}: {self._offer(text, found)}")
        return found[0]

    def words(self, label: str) -> tuple[str, ...]:
        """Return the word of each aspect, in order; none where there are no aspects."""
        return tuple(label.split(" ")) if self.aspects else ()

    def nearest(self, text: str) -> list[str]:
        """Return the classes that are spelled most like a text, at most three."""
        return difflib.get_close_matches(" ".join(text.lower().split())[:LONGEST_NAME], self.classes, n=3, cutoff=0.4)

    def _offer(self, text: str, near: list[str]) -> str:
        """Return a hint for an unknown label: similar labels, or the names of all."""
        words = set(_key(text))
        own = {name: set(_key(name)) for name in self.classes}
        if not near and words and words <= set().union(*own.values()):
            inside = [name for name, known in own.items() if known <= words]
            if len(_key(text)) <= MOST_WORDS and _made_of(_key(text), [_key(name) for name in inside]):
                return "several labels are separated by commas"
            near = inside or [name for name, known in own.items() if words <= known] or [name for name, known in own.items() if words & known]
        near = near or self.nearest(text)
        if near:
            return f"did you mean {' or '.join(map(repr, near[:8]))}?"
        if self.aspects:
            values = (dict.fromkeys(self.words(name)[number] for name in self.classes) for number in range(len(self.aspects)))
            return "a label is " + " and ".join(f"a {aspect} ({', '.join(found)})" for aspect, found in zip(self.aspects, values, strict=True))
        return f"the labels are {', '.join(self.classes[:30])}{' ...' if len(self.classes) > 30 else ''}"

    def to_dict(self) -> dict[str, Any]:
        """Return the task as plain values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @staticmethod
    def from_dict(values: Any) -> Task:
        """Return the task of ``to_dict``'s values, which may come from a file that nobody has checked.

        Raises:
            ValueError: they are not those of a task.
        """
        if not isinstance(values, Mapping) or set(values) != {"classes", "size", "scored", "aspects"}:
            raise ValueError("a task has classes, size, scored and aspects")
        classes, size, scored, aspects = (values[name] for name in ("classes", "size", "scored", "aspects"))
        if not all(isinstance(value, list) for value in (classes, scored, aspects)):
            raise ValueError("classes, scored and aspects are lists")
        if problem := class_problem(classes):
            raise ValueError(problem)
        if type(size) is not int or size not in SIZES:
            raise ValueError(f"size {show(size)} is none of {', '.join(map(str, SIZES))}")
        if not 1 <= len(scored) <= MOST_SCORED or not all(isinstance(name, str) and re.fullmatch(r"[a-z_]{1,40}", name) for name in scored):
            raise ValueError(f"scored {show(scored)} are not one or two names of condition files")
        if aspects and (len(aspects) != 2 or not all(isinstance(name, str) for name in aspects) or any(len(name.split(" ")) != 2 for name in classes)):
            raise ValueError(f"aspects {show(aspects)} do not fit the classes: there are two, and each class is of two words")
        return Task(tuple(classes), size, tuple(scored), tuple(aspects))


def require_same_task(name: str, task: Task, other_name: str, other: Task) -> None:
    """Check that two things, such as a checkpoint and a classifier, are for the same classes and size.

    Raises:
        DataError: they are not; says how they differ.
    """
    if task.key == other.key:
        return
    if task.classes == other.classes:
        raise DataError(f"{name}: is for images of {task.size}x{task.size} pixels, but {other_name} for {other.size}x{other.size}")
    only, theirs = ([show(label) for label in a.classes if label not in b.index][:3] for a, b in ((task, other), (other, task)))
    differ = f"; only the first has {', '.join(only)}" if only else f"; only the second has {', '.join(theirs)}" if theirs else ", in another order"
    raise DataError(f"{name}: has {len(task.classes)} classes, and {other_name} {len(other.classes)}{differ}")


def class_problem(names: Sequence[object]) -> str:
    """Return what is wrong with the names of classes, empty if nothing is."""
    if len(names) > MOST_CLASSES:
        return f"there are {len(names)} classes; at most {MOST_CLASSES} are possible"
    for name in names:
        if not isinstance(name, str) or not name.strip() or len(name) > LONGEST_NAME or not name.isprintable():
            return f"{show(name)} cannot be the name of a class: a name is printable text of at most {LONGEST_NAME} characters"
        if name != name.strip():
            return f"{show(name)} cannot be the name of a class: it begins or ends with a blank"
    if len(set(names)) < len(names):
        return f"the class {show(next(name for name in names if names.count(name) > 1))} is there twice"
    return ""


def _key(text: str) -> tuple[str, ...]:
    """Return the words of a label, sorted, without differences of case, plural and spelling."""
    words = re.split(r"[\s_-]+", unicodedata.normalize("NFC", text).casefold())
    return tuple(sorted(_singular(SAME_WORDS.get(word, word)) for word in words if word))


def _made_of(words: tuple[str, ...], labels: list[tuple[str, ...]]) -> bool:
    """Return whether words are those of some labels together."""
    if not words:
        return True
    for label in labels:
        rest = list(words)
        if words[0] in label and all(word in rest for word in label):
            for word in label:
                rest.remove(word)
            if _made_of(tuple(rest), labels):
                return True
    return False


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") else word
