"""Lists of labels as a person writes them: on the command line, and in Python."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ddpmctl.errors import UsageError
from ddpmctl.iclevr import ICLEVR
from ddpmctl.task import LabelSet, Task

PART = re.compile(r'\s*(?:"([^"]*)"|([^,;"]*))\s*[,;]')  # a label, in quotes or without, and what ends it


def parse_labels(texts: Sequence[str], task: Task = ICLEVR) -> list[LabelSet]:
    """Return ``--labels`` texts as label sets; a list with commas or semicolons, perhaps with one at its end, is one image's objects.

    A label that contains a comma stands in quotes within the list, or alone.

    Raises:
        UsageError: an empty list, an unknown label, or one named twice.
    """
    if not task.classes:
        raise UsageError("--labels: the model was trained on images without labels; leave --labels out")
    sets = []
    for text in texts:
        names = [text.strip()] if text.strip() in task.index else split_labels(text)
        if not all(names):
            raise UsageError(f"--labels {text!r}: a label is missing; give e.g. --labels {example(task)}")
        sets.append(label_set(names, task))
    return sets


def label_set(names: Sequence[str], task: Task) -> LabelSet:
    """Return the labels that a person named.

    Raises:
        UsageError: an unknown label, or one named twice.
    """
    try:
        labels = tuple(map(task.parse_label, names))
    except UsageError as error:
        raise UsageError(f"--labels: {error}") from None
    if len(set(labels)) < len(labels):
        raise UsageError(f"--labels {','.join(names)!r}: a label is named twice, but images hold no object twice")
    return labels


def split_labels(text: str) -> list[str]:
    """Return the parts of a list of labels.

    Raises:
        UsageError: a quotation mark is not where a label begins or ends.
    """
    rest, parts = re.sub(r"[,;]\s*$", "", text) + ",", []  # so that every label has an end
    while rest:
        match = PART.match(rest)
        if match is None:
            raise UsageError(f"--labels {text!r}: a label with a comma stands wholly in quotes, as in '\"rot, rund\",blau'")
        parts.append((match[1] if match[1] is not None else match[2]).strip())
        rest = rest[match.end() :]
    return parts


def example(task: Task) -> str:
    """Return labels as they are written on a command line."""
    if task.classes == ICLEVR.classes:
        return '"red cube,blue sphere"'
    named = [f'"{name}"' if "," in name or ";" in name else name for name in task.classes[:2]]
    text = ",".join(named[:2] if task.aspects else named[:1])
    return f"'{text}'" if '"' in text else f'"{text}"'
