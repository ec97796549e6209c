"""Strict reading of the JSON files of a lab folder.

``scan_lab`` returns all problems (``ddpmctl data verify``); ``read_lab`` raises the first of them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from ddpmctl.errors import DataError, UsageError, json_kind, show
from ddpmctl.iclevr import ICLEVR, INDEX
from ddpmctl.task import LabelSet, Task

MAX_JSON_BYTES = 64 * 2**20
MAX_PROBLEMS = 1000  # per file
CONDITION_FILES = ("test", "new_test", "heldout")
REQUIRED = ("objects.json", "train.json", "test.json", "new_test.json")
LAYOUT = "a data folder holds objects.json, train.json, test.json, new_test.json, perhaps heldout.json, and the images beside them, in iclevr/ or in images/"


@dataclass(frozen=True)
class Problem:
    """One problem of a file."""

    path: str
    what: str


@dataclass(frozen=True)
class Lab:
    """The contents of a lab folder's JSON files; images are not read."""

    folder: Path
    labels: dict[str, tuple[str, ...]]  # file name -> labels, in the order of train.json; () if the labels are invalid
    conditions: dict[str, list[tuple[str, ...]]]  # "test", "new_test" and, if present, "heldout"
    train_digest: str  # sha256 of train.json in hex; "" if it cannot be read


def read_json(path: Path) -> object:
    """Return the value of a JSON file, read strictly.

    Raises:
        DataError: not a regular file, unreadable, over 64 MiB, not UTF-8, not JSON, a duplicate key, NaN or an infinite
            number, or nested too deeply.
    """
    return parse_json(read_bytes(path), path)


def scan_lab(folder: Path) -> tuple[Lab, list[Problem]]:
    """Read all JSON files of a lab folder; return the valid contents and all problems.

    Raises:
        UsageError: ``folder`` is not a folder.
    """
    if not os.path.isdir(folder):
        raise UsageError(f"--data {folder}: there is no such folder; without --data, the embedded benchmark is used; {LAYOUT}")
    problems: list[Problem] = []
    values: dict[str, object] = {}
    digest = ""
    for name in dict.fromkeys((*REQUIRED, *(f"{each}.json" for each in CONDITION_FILES))):
        path = folder / name
        if not os.path.lexists(path):
            if name in REQUIRED:
                problems.append(Problem(str(path), f"missing; {LAYOUT}"))
            continue
        try:
            raw = read_bytes(path)
            digest = hashlib.sha256(raw).hexdigest() if name == "train.json" else digest
            values[name] = parse_json(raw, path)
        except DataError as error:
            problems.append(Problem(str(path), str(error).removeprefix(f"{path}: ")))
    if "objects.json" in values:
        problems += check_objects(values["objects.json"], folder / "objects.json")
    labels: dict[str, tuple[str, ...]] = {}
    if "train.json" in values:
        labels, found = parse_train(values["train.json"], folder / "train.json")
        problems += found
    conditions: dict[str, list[tuple[str, ...]]] = {}
    for name in CONDITION_FILES:
        if f"{name}.json" in values:
            conditions[name], found = parse_conditions(values[f"{name}.json"], folder / f"{name}.json")
            problems += found
    return Lab(folder, labels, conditions, digest), problems


def read_lab(folder: Path) -> Lab:
    """Return the contents of a lab folder's JSON files.

    Raises:
        UsageError: ``folder`` is not a folder.
        DataError: a file has a problem; names the first problem and counts the others.
    """
    lab, problems = scan_lab(folder)
    missing = [name for name in REQUIRED if not os.path.lexists(folder / name)]
    if missing:
        raise DataError(f"{folder}: {', '.join(missing)} missing; {LAYOUT}")
    if problems:
        raise_first(problems, folder)
    return lab


def read_conditions(path: Path, task: Task = ICLEVR) -> list[LabelSet]:
    """Return the label sets of one condition file, of a task's labels.

    Raises:
        UsageError: there is no such file.
        DataError: not a JSON list of lists of known labels; names the first problem.
    """
    if not path.is_file():
        raise UsageError(f"{path}: there is no such condition file")
    conditions, problems = parse_conditions(read_json(path), path, task)
    if problems:
        raise DataError(f"{problems[0].path}: {problems[0].what}")
    return conditions


def raise_first(problems: Sequence[Problem], folder: Path) -> NoReturn:
    """Raise a DataError that names the first problem, counts the others and says how to list them."""
    others = len(problems) - 1
    more = f" (and {others} other problem{'s' if others > 1 else ''})" if others else ""
    raise DataError(f"{problems[0].path}: {problems[0].what}{more}; to see all problems: ddpmctl data verify {folder}")


def check_objects(value: object, path: Path) -> list[Problem]:
    """Return the differences between an ``objects.json`` and the lab's 24 classes."""
    if not isinstance(value, dict):
        return [Problem(str(path), f"must be an object of class names and their numbers, not {json_kind(value)}")]
    problems = []
    for name, index in INDEX.items():
        if name not in value:
            problems.append(Problem(str(path), f"{name!r} is missing (number {index}); it must hold the lab's 24 classes"))
        elif type(value[name]) is not int or value[name] != index:
            problems.append(Problem(str(path), f"{name!r} is {show(value[name])}, but its number is {index} in the lab's order"))
    unknown = [name for name in value if name not in INDEX]
    problems += [Problem(str(path), f"{show(name)} is not one of the lab's 24 classes{_nearest(name[:64])}") for name in unknown[:MAX_PROBLEMS]]
    return problems


def parse_train(value: object, path: Path) -> tuple[dict[str, tuple[str, ...]], list[Problem]]:
    """Return {file name: labels} of ``train.json`` and all problems; unsafe names have no entry, invalid labels are ()."""
    if not isinstance(value, dict):
        return {}, [Problem(str(path), f"must be an object of file names and their lists of labels, not {json_kind(value)}")]
    if not value:
        return {}, [Problem(str(path), "declares no image; add at least one file name with its labels")]
    labels: dict[str, tuple[str, ...]] = {}
    problems = []
    for name, entry in value.items():
        wrong = unsafe_name(name)
        names, found = _label_list(entry)
        found = [f"file name {wrong}", *found] if wrong else found
        problems += [Problem(str(path), f"image {show(name)}: {what}") for what in found]
        if not wrong:
            labels[name] = names
        if len(problems) >= MAX_PROBLEMS:
            problems.append(Problem(str(path), f"has {len(problems)} problems; the rest of the file was not checked"))
            break
    return labels, problems


def parse_conditions(value: object, path: Path, task: Task = ICLEVR) -> tuple[list[LabelSet], list[Problem]]:
    """Return the valid label sets of a condition file, and all problems (conditions are counted from 1)."""
    if not isinstance(value, list):
        return [], [Problem(str(path), f"must be a list of lists of labels, not {json_kind(value)}")]
    if not value:
        return [], [Problem(str(path), "has no condition; add at least one list of labels")]
    conditions = []
    problems = []
    for position, entry in enumerate(value, start=1):
        names, found = _label_list(entry, task)
        problems += [Problem(str(path), f"condition {position} of {len(value)}: {what}") for what in found]
        if not found:
            conditions.append(names)
        if len(problems) >= MAX_PROBLEMS:
            problems.append(Problem(str(path), f"has {len(problems)} problems; the rest of the file was not checked"))
            break
    return conditions, problems


def _label_list(entry: object, task: Task = ICLEVR) -> tuple[LabelSet, list[str]]:
    if not isinstance(entry, list):
        return (), [f"must have a list of labels, not {json_kind(entry)}"]
    if not entry:
        return (), ["the list of labels is empty; name at least one object"]
    if len(entry) > len(task.classes):
        return (), [f"names {len(entry)} labels, but there are {len(task.classes)} classes and none may be listed twice"]
    found = []
    for position, label in enumerate(entry, start=1):
        if not isinstance(label, str):
            found.append(f"label {position} must be a string, not {json_kind(label)}")
        elif label not in task.index:
            known = "in objects.json" if task.classes == ICLEVR.classes else "one of the labels of the data"
            found.append(f"label {position}, {show(label)}, is not {known}{_nearest(label[:64], task)}")
        elif label in entry[: position - 1]:
            found.append(f"label {position}, {show(label)}, is listed twice; a label set says which objects are present, not how many")
    return tuple(entry) if not found else (), found


def unsafe_name(name: str) -> str | None:
    """Return why the file name of an image is unsafe, or None: on every system it must be inside the folder."""
    if "\0" in name or not name.isprintable():
        return "has a character that is not allowed in a file name"
    if "\\" in name or name.startswith("/") or name[1:2] == ":":  # C:file is relative to another drive on Windows
        return "must be relative to the image folder, with / between its parts"
    parts = name.split("/")
    if ".." in parts:
        return "is outside of the folder ('..'); use a path inside it"
    if "" in parts or "." in parts:
        return "has an empty part; write it as folder/file.png"
    return None


@lru_cache(maxsize=1024)
def _nearest(label: str, task: Task = ICLEVR) -> str:
    near = task.nearest(label)
    return f": did you mean {' or '.join(map(repr, near))}?" if near else ""


def read_bytes(path: Path, most: int = MAX_JSON_BYTES) -> bytes:
    """Return the content of a regular file; DataError as for ``read_json``."""
    try:
        about = os.stat(path)
        if not stat.S_ISREG(about.st_mode):  # opening a pipe would block
            raise DataError(f"{path}: is not a regular file; put a JSON file there")
        with open(path, "rb") as file:
            raw = file.read(most + 1)
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    if len(raw) > most:
        raise DataError(f"{path}: is over {most // 2**20} MiB; this is not a label file")
    return raw


def parse_json(raw: bytes, path: Path) -> object:
    """Return the value of JSON text; ``path`` is used in messages. DataError as for ``read_json``."""
    try:
        return json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except RecursionError as error:
        raise DataError(f"{path}: is nested too deeply; a label file has two levels") from error
    except ValueError as error:  # includes json.JSONDecodeError
        raise DataError(f"{path}: is not valid JSON: {error}; correct the file") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {show(twice)} is listed twice")
    return out


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {show(text)} is too large")
    return number
