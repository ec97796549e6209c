"""The form of EDM and StyleGAN: dataset.json with a class number or a vector for each image, as a folder or a zip file."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Any

from ddpmctl.data.archives import ZipMember, open_zip
from ddpmctl.data.declared import Declared, images_below, is_image, listing
from ddpmctl.data.folders import MAX_JSON_BYTES, MAX_PROBLEMS, Problem, parse_json, read_bytes, unsafe_name
from ddpmctl.data.source import DataSource
from ddpmctl.errors import show
from ddpmctl.registry import FORMATS
from ddpmctl.task import MOST_CLASSES

FILE = "dataset.json"


@FORMATS.register("edm")
class Edm:
    """dataset.json of EDM and StyleGAN, as a folder or a zip file; a zip file without it has no labels."""

    @staticmethod
    def recognises(root: Path) -> bool:
        """Return whether it is a zip file, or a folder with dataset.json."""
        return zipfile.is_zipfile(root) if root.is_file() else (root / FILE).is_file()

    @staticmethod
    def scan(source: DataSource) -> tuple[Declared, list[Problem]]:
        """Return the images, with labels named ``class N``, and all problems."""
        root = source.path
        assert root is not None
        if root.is_file():
            names = sorted(name for name in open_zip(root).namelist() if is_image(name))
            raw = ZipMember(root, FILE).read(MAX_JSON_BYTES) if FILE in open_zip(root).namelist() else b'{"labels": null}'
        else:
            names, raw = images_below(root), read_bytes(root / FILE)
        where = f"{root}/{FILE}"
        problems, digest = listing(root, names)
        numbers, found = _numbers(parse_json(raw, Path(where)), where)
        problems += found
        if numbers is None:
            return Declared("edm", root, dict.fromkeys(names, ()), (), digest, {}), problems
        count = 1 + max((number for each in numbers.values() for number in each), default=-1)
        width = len(str(max(count - 1, 0)))
        classes = tuple(f"class {number:0{width}d}" for number in range(count))
        named = {name: tuple(classes[number] for number in each) for name, each in numbers.items()}
        return Declared("edm", root, named, classes, hashlib.sha256(raw).hexdigest(), {}), problems


def _numbers(value: object, where: str) -> tuple[dict[str, tuple[int, ...]] | None, list[Problem]]:
    """Return the class numbers of each image, None if there are no labels, and all problems."""
    entries = value.get("labels") if isinstance(value, dict) else None
    if isinstance(value, dict) and "labels" in value and entries is None:
        return None, []
    if not isinstance(entries, list):
        return {}, [Problem(where, 'must be an object with a list "labels" of [file name, class number or vector]')]
    numbers: dict[str, tuple[int, ...]] = {}
    problems: list[Problem] = []
    for position, entry in enumerate(entries, start=1):
        name, found, wrong = _entry(entry)
        wrong = f"the image {show(name)} is listed twice" if not wrong and name in numbers else wrong
        if wrong:
            problems.append(Problem(where, f"label {position} of {len(entries)}: {wrong}"))
            if len(problems) >= MAX_PROBLEMS:
                break
        else:
            numbers[name] = found
    return numbers, problems


def _entry(entry: Any) -> tuple[str, tuple[int, ...], str]:
    """Return an entry's image, its class numbers, and what is wrong with it."""
    if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
        return "", (), f"{show(entry)} is not [file name, class number or vector]"
    name, label = entry
    if wrong := unsafe_name(name):
        return name, (), f"the file name {show(name)} {wrong}"
    if type(label) is int and 0 <= label < MOST_CLASSES:
        return name, (label,), ""
    if isinstance(label, list) and len(label) <= MOST_CLASSES and all(type(one) in (int, float) and one in (0, 1) for one in label):
        return name, tuple(number for number, one in enumerate(label) if one), ""
    if label is None:
        return name, (), ""
    return name, (), f"{show(label)} is neither a class number from 0 to {MOST_CLASSES - 1} nor a vector of 0 and 1"
