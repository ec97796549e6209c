"""The lab's folder: its JSON files, read strictly, with every problem named.

``scan_lab`` finds all problems in one pass (``ddpmctl data verify``); ``read_lab`` raises the first of them, so that the two never
disagree about what is wrong.
"""

from __future__ import annotations

import difflib
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
from ddpmctl.labels import CLASSES, INDEX

MAX_JSON_BYTES = 64 * 2**20
MAX_PROBLEMS = 1000  # of one file: it is then surely another file, and to tell all of a million would take minutes
CONDITION_FILES = ("test", "new_test", "heldout")
REQUIRED = ("objects.json", "train.json", "test.json", "new_test.json")
LAYOUT = "a data folder holds objects.json, train.json, test.json, new_test.json, perhaps heldout.json, and the images beside them, in iclevr/ or in images/"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a file: where, and what."""

    path: str
    what: str


@dataclass(frozen=True)
class Lab:
    """What the JSON files of a lab folder say; nothing here has looked at an image."""

    folder: Path
    labels: dict[str, tuple[str, ...]]  # file name -> labels, in train.json's order; () where the labels are wrong
    conditions: dict[str, list[tuple[str, ...]]]  # "test", "new_test" and, where present, "heldout"
    train_digest: str  # sha256 of train.json's bytes, hex; "" where it could not be read


def read_json(path: Path) -> object:
    """Return the value in a JSON file, read strictly.

    Raises:
        DataError: not a regular file, unreadable, over 64 MiB, not UTF-8, no JSON, a key twice in one object, NaN or an infinite
            number, or nested too deeply. One line that names the file.
    """
    return _parse(_read_bytes(path), path)


def scan_lab(folder: Path) -> tuple[Lab, list[Problem]]:
    """Read all JSON files of a lab folder and return what could be read, with every problem found.

    Raises:
        UsageError: ``folder`` is no folder.
    """
    if not os.path.isdir(folder):
        raise UsageError(f"--data {folder}: there is no such folder; {LAYOUT}")
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
            raw = _read_bytes(path)
            digest = hashlib.sha256(raw).hexdigest() if name == "train.json" else digest
            values[name] = _parse(raw, path)
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
    """Return what the JSON files of a lab folder say.

    Raises:
        UsageError: ``folder`` is no folder.
        DataError: anything is wrong in any of them; names the first problem and counts the others.
    """
    lab, problems = scan_lab(folder)
    missing = [name for name in REQUIRED if not os.path.lexists(folder / name)]
    if missing:
        raise DataError(f"{folder}: {', '.join(missing)} missing; {LAYOUT}")
    if problems:
        raise_first(problems, folder)
    return lab


def read_conditions(path: Path) -> list[tuple[str, ...]]:
    """Return the label sets of one condition file.

    Raises:
        UsageError: there is no such file.
        DataError: it is no JSON list of lists of known labels; names the first problem.
    """
    if not path.is_file():
        raise UsageError(f"{path}: there is no such condition file")
    conditions, problems = parse_conditions(read_json(path), path)
    if problems:
        raise DataError(f"{problems[0].path}: {problems[0].what}")
    return conditions


def raise_first(problems: Sequence[Problem], folder: Path) -> NoReturn:
    """Raise a DataError that names the first problem, counts the others and says how to see them all."""
    others = len(problems) - 1
    more = f" (and {others} other problem{'s' if others > 1 else ''})" if others else ""
    raise DataError(f"{problems[0].path}: {problems[0].what}{more}; to see all that is wrong: ddpmctl data verify {folder}")


def check_objects(value: object, path: Path) -> list[Problem]:
    """Return what differs between an ``objects.json`` and the lab's 24 classes in the lab's order."""
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
    """Return ``train.json``'s entries, file name -> labels, and all problems: no entry for an unsafe name, () for labels that are wrong."""
    if not isinstance(value, dict):
        return {}, [Problem(str(path), f"must be an object of file names and their lists of labels, not {json_kind(value)}")]
    if not value:
        return {}, [Problem(str(path), "declares no image; add at least one file name with its labels")]
    labels: dict[str, tuple[str, ...]] = {}
    problems = []
    for name, entry in value.items():
        wrong = _unsafe_name(name)
        names, found = _label_list(entry)
        found = [f"file name {wrong}", *found] if wrong else found
        problems += [Problem(str(path), f"image {show(name)}: {what}") for what in found]
        if not wrong:
            labels[name] = names
        if len(problems) >= MAX_PROBLEMS:
            problems.append(Problem(str(path), f"has {len(problems)} problems and perhaps more; the rest of it was not looked at"))
            break
    return labels, problems


def parse_conditions(value: object, path: Path) -> tuple[list[tuple[str, ...]], list[Problem]]:
    """Return a condition file's sound label lists, in order, and the problems of the others (conditions are counted from 1)."""
    if not isinstance(value, list):
        return [], [Problem(str(path), f"must be a list of lists of labels, not {json_kind(value)}")]
    if not value:
        return [], [Problem(str(path), "holds no condition; add at least one list of labels")]
    conditions = []
    problems = []
    for position, entry in enumerate(value, start=1):
        names, found = _label_list(entry)
        problems += [Problem(str(path), f"condition {position} of {len(value)}: {what}") for what in found]
        if not found:
            conditions.append(names)
        if len(problems) >= MAX_PROBLEMS:
            problems.append(Problem(str(path), f"has {len(problems)} problems and perhaps more; the rest of it was not looked at"))
            break
    return conditions, problems


def _label_list(entry: object) -> tuple[tuple[str, ...], list[str]]:
    if not isinstance(entry, list):
        return (), [f"must have a list of labels, not {json_kind(entry)}"]
    if not entry:
        return (), ["the list of labels is empty; name at least one object"]
    if len(entry) > len(CLASSES):
        return (), [f"names {len(entry)} labels, but there are {len(CLASSES)} classes and none may stand there twice"]
    found = []
    for position, label in enumerate(entry, start=1):
        if not isinstance(label, str):
            found.append(f"label {position} must be a string, not {json_kind(label)}")
        elif label not in INDEX:
            found.append(f"label {position}, {show(label)}, is not in objects.json{_nearest(label[:64])}")
        elif label in entry[: position - 1]:
            found.append(f"label {position}, {show(label)}, stands there twice; a condition says that an object is there, not how many")
    return tuple(entry) if not found else (), found


def _unsafe_name(name: str) -> str | None:
    """Return why a file name in train.json may not be opened, or None: it must stay inside the folder on every system."""
    if "\0" in name or not name.isprintable():
        return "holds a character that no file name may have"
    if "\\" in name or name.startswith("/") or name[1:2] == ":":  # C:file is a place of its own on Windows
        return "must be relative to the image folder, with / between its parts"
    parts = name.split("/")
    if ".." in parts:
        return "leads out of the folder ('..'); name files inside it"
    if "" in parts or "." in parts:
        return "has an empty part; write it as folder/file.png"
    return None


@lru_cache(maxsize=1024)
def _nearest(label: str) -> str:
    near = difflib.get_close_matches(" ".join(label.lower().split()), CLASSES, n=3, cutoff=0.4)
    return f": did you mean {' or '.join(map(repr, near))}?" if near else ""


def _read_bytes(path: Path) -> bytes:
    try:
        about = os.stat(path)
        if not stat.S_ISREG(about.st_mode):  # opening a pipe would wait for ever
            raise DataError(f"{path}: is not a regular file; put a JSON file there")
        with open(path, "rb") as file:
            raw = file.read(MAX_JSON_BYTES + 1)
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    if len(raw) > MAX_JSON_BYTES:
        raise DataError(f"{path}: is over {MAX_JSON_BYTES // 2**20} MiB; a label file of this size is surely another file")
    return raw


def _parse(raw: bytes, path: Path) -> object:
    try:
        return json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except RecursionError as error:
        raise DataError(f"{path}: is nested too deeply; a label file has two levels") from error
    except ValueError as error:  # json.JSONDecodeError is one of these
        raise DataError(f"{path}: is not valid JSON: {error}; mend the file") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {show(twice)} stands there twice")
    return out


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {show(text)} is too large")
    return number
