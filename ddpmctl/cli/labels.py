"""Labels on the command line: which task they are of, and how lists of them are read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ddpmctl.errors import DdpmctlError, UsageError
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
        try:
            labels = tuple(map(task.parse_label, names))
        except UsageError as error:
            raise UsageError(f"--labels: {error}") from None
        if len(set(labels)) < len(labels):
            raise UsageError(f"--labels {text!r}: a label is named twice, but images hold no object twice")
        sets.append(labels)
    return sets


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


def checkpoint_files(named: Path | None, runs_dir: Path) -> list[Path]:
    """Return the checkpoint that a command would use; none where there is none, which the command then says."""
    from ddpmctl.runs.folder import Run, best_checkpoint, newest_best
    from ddpmctl.runs.named import located

    try:
        path = newest_best(runs_dir)[0] if named is None else located(named, runs_dir)
        best = best_checkpoint(Run(path)) if path.is_dir() else (path, "")
        return [] if best is None else [best[0]]
    except (DdpmctlError, OSError):
        return []


def task_of(named: Path | None, runs_dir: Path) -> Task:
    """Return the task of the checkpoint or run that a command would use; i-CLEVR's where there is none, which the command then says."""
    from ddpmctl.checkpoints.outline import read_outline

    try:
        return next((read_outline(file, {}).task for file in checkpoint_files(named, runs_dir)), ICLEVR)
    except (DdpmctlError, OSError):
        return ICLEVR
