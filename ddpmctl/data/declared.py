"""What a data set declares, in whatever format, before its images are decoded."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from ddpmctl.data.archives import ENCRYPTED, open_zip
from ddpmctl.data.conditions import HELD_OUT, TEST, conditions_of
from ddpmctl.data.folders import LAYOUT, REQUIRED, Problem, raise_first, unsafe_name
from ddpmctl.data.images import FoundImage, FoundMember, find_images, find_in
from ddpmctl.data.source import DataSource
from ddpmctl.errors import DataError, UsageError
from ddpmctl.iclevr import ICLEVR
from ddpmctl.registry import FORMATS
from ddpmctl.task import LabelSet, Task, class_problem

ORDER = ("lab", "edm", "metadata", "clevr", "classes", "plain")  # in which a format is looked for


@dataclass(frozen=True)
class Declared:
    """The contents of a data set's files of labels.

    Attributes:
        format: its name in ``FORMATS``.
        root: the folder, or the zip file.
        labels: {image: its labels}, in the order in which images are decoded.
        classes: in the order of their numbers.
        digest: hash of the files of labels; of the names of the images where there is no such file.
        conditions: those that the data themselves bring.
        notes: what the user should know, in sentences.
        aspects: what the words of each class say; see ``Task``.
    """

    format: str
    root: Path
    labels: dict[str, LabelSet]
    classes: tuple[str, ...]
    digest: str
    conditions: Mapping[str, list[LabelSet]]
    notes: tuple[str, ...] = ()
    aspects: tuple[str, ...] = ()

    def task(self, size: int, conditions: Collection[str] = (TEST,)) -> Task:
        """Return the task of these labels, scored on ``conditions``; in the lab's layout, it is i-CLEVR's at that size."""
        return replace(ICLEVR, size=size) if self.format == "lab" else Task(self.classes, size, tuple(conditions), self.aspects)

    def find(self) -> tuple[list[FoundImage], list[Problem]]:
        """Return the images that exist, and a problem for each that is missing or must not be opened."""
        if self.root.is_file():
            return _in_zip(self.root, list(self.labels))
        if self.format == "lab":
            return find_images(self.root, list(self.labels))
        return find_in(self.root, self.root, list(self.labels))

    def for_training(self, hold_out: int | None) -> tuple[Declared, dict[str, list[LabelSet]]]:
        """Return what is trained, without the label sets that are held out, and the conditions."""
        if self.conditions:
            return self, dict(self.conditions)
        index = {name: number for number, name in enumerate(self.classes)}
        labels = {name: tuple(sorted(one, key=index.__getitem__)) for name, one in self.labels.items()}
        conditions = conditions_of(list(labels.values()), hold_out)
        conditions = {name: [tuple(sorted(one, key=index.__getitem__)) for one in sets] for name, sets in conditions.items()}
        apart = {frozenset(one) for one in conditions.get(HELD_OUT, [])}
        return replace(self, labels={name: one for name, one in labels.items() if frozenset(one) not in apart}), conditions


class Format(Protocol):
    """A way in which data sets are laid out."""

    @staticmethod
    def recognises(root: Path) -> bool:
        """Return whether a folder or zip file looks like this format."""

    @staticmethod
    def scan(source: DataSource) -> tuple[Declared, list[Problem]]:
        """Return what a folder or zip file declares, and all problems of its files of labels."""


def scan_declared(source: DataSource) -> tuple[Declared, list[Problem]]:
    """Return what a data set declares, and all problems of its files of labels.

    Raises:
        UsageError: there is no such folder or zip file, or its format is not known.
        DataError: the file of labels cannot be read at all.
    """
    assert source.path is not None
    if not (source.path.is_dir() or zipfile.is_zipfile(source.path)):
        raise UsageError(f"--data {source.path}: there is no such folder; without --data, the embedded benchmark is used; {LAYOUT}")
    name = source.format or _recognised(source.path)
    found, problems = FORMATS.get(name).scan(source)
    if problem := class_problem(found.classes):
        problems.append(Problem(str(source.path), problem))
    if not found.labels and not problems:
        problems.append(Problem(str(source.path), "has no PNG or JPEG image"))
    return found, problems


def read_declared(source: DataSource) -> Declared:
    """Return what a data set declares.

    Raises:
        UsageError: as ``scan_declared``.
        DataError: there is a problem; names the first and counts the others.
    """
    assert source.path is not None
    found, problems = scan_declared(source)
    missing = [name for name in REQUIRED if not os.path.lexists(source.path / name)] if found.format == "lab" else []
    if missing:
        raise DataError(f"{source.path}: {', '.join(missing)} missing; {LAYOUT}")
    if problems:
        raise_first(problems, source.path)
    return found


def found_images(declared: Declared) -> list[FoundImage]:
    """Return the images of a data set.

    Raises:
        DataError: one is missing or must not be opened; names the first and counts the others.
    """
    found, problems = declared.find()
    if problems:
        raise_first(problems, declared.root)
    return found


def _recognised(root: Path) -> str:
    for name in ORDER:
        if FORMATS.get(name).recognises(root):
            return name
    raise DataError(
        f"{root}: is in no known format; looked for objects.json and train.json (lab), dataset.json or a zip file (edm), metadata.jsonl or metadata.csv "
        "(metadata), scenes/*.json (clevr), folders of images (classes) and images (plain)"
    )


def _in_zip(archive: Path, names: list[str]) -> tuple[list[FoundImage], list[Problem]]:
    members = {member.filename: member for member in open_zip(archive).infolist()}
    found: list[FoundImage] = []
    problems = []
    for name in names:
        if (member := members.get(name)) is None:
            problems.append(Problem(f"{archive}/{name}", "missing"))
        elif member.flag_bits & ENCRYPTED or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            problems.append(Problem(f"{archive}/{name}", "is encrypted or compressed in an unusual way; write the zip file anew"))
        else:
            found.append(FoundMember(name, archive, member.file_size, member.CRC))
    return found, problems


def listing(root: Path, names: list[str]) -> tuple[list[Problem], str]:
    """Return a problem for each unsafe name of an image, and a hash of all names: of data sets without a file of labels."""
    problems = [Problem(f"{root}/{name}", f"the file name {wrong}") for name in names if (wrong := unsafe_name(name))]
    return problems, hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()


def images_below(root: Path) -> list[str]:
    """Return the names of the PNG and JPEG files below a folder, sorted, with / between their parts; hidden ones and links to folders are left out."""
    names = []
    for place, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = Path(place).relative_to(root).as_posix()
        names += [name if inside == "." else f"{inside}/{name}" for name in files if is_image(name)]
    return sorted(names)


def is_image(name: str) -> bool:
    """Return whether a file's name is that of a PNG or JPEG image."""
    base = name.rpartition("/")[2]
    return not base.startswith(".") and base.lower().endswith((".png", ".jpg", ".jpeg"))
