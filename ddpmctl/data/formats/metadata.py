"""Hugging Face's ``imagefolder``: metadata.jsonl or metadata.csv beside the images, with the columns file_name and labels."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ddpmctl.data.declared import Declared
from ddpmctl.data.folders import MAX_PROBLEMS, Problem, parse_json, read_bytes, unsafe_name
from ddpmctl.data.source import DataSource
from ddpmctl.errors import DataError, json_kind, show
from ddpmctl.registry import FORMATS
from ddpmctl.task import LabelSet

FILES = ("metadata.jsonl", "metadata.csv")
MOST_BYTES = 2**30
LABELS = "labels"


@FORMATS.register("metadata")
class Metadata:
    """Hugging Face imagefolder: metadata.jsonl or metadata.csv with file_name and labels."""

    @staticmethod
    def recognises(root: Path) -> bool:
        """Return whether a file of metadata is there."""
        return root.is_dir() and any((root / name).is_file() for name in FILES)

    @staticmethod
    def scan(source: DataSource) -> tuple[Declared, list[Problem]]:
        """Return the images and labels of a file of metadata, and all problems, with their lines."""
        root = source.path
        assert root is not None
        file = next((root / name for name in FILES if (root / name).is_file()), root / FILES[0])
        raw = read_bytes(file, MOST_BYTES)
        rows = _csv_rows(raw, file) if file.suffix == ".csv" else _json_rows(raw, file)
        labels: dict[str, LabelSet] = {}
        problems: list[Problem] = []
        for number, row in rows:
            name, found, wrong = _read(row, source.label_column)
            wrong = f"the image {show(name)} is listed twice" if not wrong and name in labels else wrong
            if wrong:
                problems.append(Problem(str(file), f"line {number}: {wrong}"))
            else:
                labels[name] = found
            if len(problems) >= MAX_PROBLEMS:
                break
        classes = tuple(sorted({label for one in labels.values() for label in one}))
        return Declared("metadata", root, labels, classes, hashlib.sha256(raw).hexdigest(), {}), problems


def _json_rows(raw: bytes, file: Path) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    """Yield the number and content of each line, or what is wrong with it."""
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if line.strip():
            try:
                value = parse_json(line, file)
            except DataError as error:
                yield number, str(error).removeprefix(f"{file}: ")
                continue
            yield number, value if isinstance(value, dict) else f"must be an object with file_name, not {json_kind(value)}"


def _csv_rows(raw: bytes, file: Path) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    try:
        rows = csv.DictReader(raw.decode("utf-8-sig").splitlines(keepends=True), strict=True)
        for row in rows:
            yield rows.line_num, "has more cells than the first line" if None in row else row
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except csv.Error as error:
        raise DataError(f"{file}: cannot be read as CSV ({error}); correct the file") from error


def _read(row: Mapping[str, Any] | str, columns: tuple[str, ...]) -> tuple[str, LabelSet, str]:
    """Return a row's image, its labels, and what is wrong with it, empty if nothing is."""
    if isinstance(row, str):
        return "", (), row
    name, column = row.get("file_name"), columns[0] if columns else LABELS
    if not isinstance(name, str) or not name:
        return "", (), f"file_name is {show(name)}; it must be the name of an image"
    missing = [one for one in columns if one not in row]
    found = [f"{one}={value}" for one in columns if (value := _text(row.get(one)))] if len(columns) > 1 else _values(row.get(column))
    if wrong := unsafe_name(name):
        problem = f"file name {wrong}"
    elif missing:
        problem = f"there is no column {show(missing[0])}, only {', '.join(map(show, list(row)[:20]))}"
    elif found is None:
        problem = f"labels must be a list of texts, or one text, not {show(row.get(column))}"
    elif len(set(found)) < len(found):
        problem = "a label is listed twice; a label set says what is present, not how often"
    else:
        return name, tuple(found), ""
    return name, (), f"image {show(name)}: {problem}"


def _values(value: Any) -> list[str] | None:
    """Return the labels of a cell: none, one, or those of a list; None if it is something else."""
    if isinstance(value, str) and value.lstrip().startswith("["):  # a list in a cell of a CSV file
        try:
            value = json.loads(value)
        except ValueError:
            return None
    if isinstance(value, list):
        return list(map(str.strip, value)) if all(isinstance(one, str) and one.strip() for one in value) else None
    if isinstance(value, dict | float):
        return None
    return [text] if (text := _text(value)) else []


def _text(value: Any) -> str:
    """Return a value as the text of a label; empty for none."""
    return "" if value is None else str(value).strip()
