"""``ddpmctl data convert``: write a data set in another form, with its images byte for byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator
from pathlib import Path

from ddpmctl.data.archives import ZipMember
from ddpmctl.data.declared import Declared, found_images
from ddpmctl.data.folders import unsafe_name
from ddpmctl.data.images import MOST_FILE_BYTES, ImageFile
from ddpmctl.errors import DataError, UsageError, show
from ddpmctl.files import cannot_write, write_text
from ddpmctl.progress import Progress

TARGETS = ("metadata", "classes")


def convert(declared: Declared, out: Path, target: str) -> Generator[Progress, None, None]:
    """Copy the images to ``out`` and write their labels in the form ``target``; metadata.jsonl is written last, so that an incomplete folder is not valid.

    Raises:
        UsageError: ``out`` is not a new or empty folder, or cannot be written.
        DataError: an image is missing, or the labels do not fit the form.
    """
    if target not in TARGETS:
        raise UsageError(f"--format: {target!r} is none of {', '.join(TARGETS)}, the forms that can be written")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: is not an empty folder; name a new one (nothing was written)")
    names = _names(declared, target)
    found = found_images(declared)
    try:
        yield Progress("copying", 0, len(found))
        for done, image in enumerate(found, start=1):
            place = out / names[image.name]
            place.parent.mkdir(parents=True, exist_ok=True)
            _copy(image.path, place)
            yield Progress("copying", done, len(found))
        if target == "metadata":
            lines = [json.dumps({"file_name": name, "labels": labels}, ensure_ascii=False) for name, labels in declared.labels.items()]
            write_text(out / "metadata.jsonl", "".join(f"{line}\n" for line in lines))
    except OSError as error:
        raise cannot_write(out, error) from error


def _names(declared: Declared, target: str) -> dict[str, str]:
    """Return the new name of each image; in folders of classes it begins with the class."""
    if target == "metadata":
        return {name: name for name in declared.labels}
    names = {}
    for name, labels in declared.labels.items():
        if len(labels) != 1:
            raise DataError(f"{declared.root}: {show(name)} has {len(labels)} labels; folders of classes need exactly one, so give --format metadata")
        if unsafe_name(f"{labels[0]}/x") or "/" in labels[0]:
            raise DataError(f"{declared.root}: the label {show(labels[0])} cannot be the name of a folder; give --format metadata")
        names[name] = f"{labels[0]}/{name.removeprefix(labels[0] + '/').replace('/', '-')}"
    if len(set(names.values())) < len(names):
        raise DataError(f"{declared.root}: two images would have the same name in folders of classes; give --format metadata")
    return names


def _copy(source: ImageFile, place: Path) -> None:
    if isinstance(source, ZipMember):
        place.write_bytes(source.read(MOST_FILE_BYTES))
    else:
        shutil.copyfile(source, place)
