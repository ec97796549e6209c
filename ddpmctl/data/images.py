"""Image files on disk: finding them inside the lab's folder, and decoding them to 64x64 RGB."""

from __future__ import annotations

import os
import stat
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from ddpmctl.data.folders import Problem
from ddpmctl.errors import DataError, show

SIZE = 64  # pixels on a side of every training image
PLACES = ("iclevr", "images", ".")  # the usual one first: if it has all images, the others are not searched
FORMATS = ("PNG", "JPEG")
PNG_END = b"IEND\xaeB`\x82"
TRAILER = 65536  # bytes that may follow the end of a PNG
CHUNK = 256  # images between two progress events
T = TypeVar("T")
_opening = threading.Lock()


@dataclass(frozen=True)
class FoundImage:
    """One declared image: its name in train.json, the folder that the name is relative to, its size in bytes and its modification time."""

    name: str
    place: Path
    size: int
    mtime_ns: int

    @property
    def path(self) -> Path:
        """The file's path (computed on demand: a cached start does not need the 18,009 paths)."""
        return self.place / self.name


def find_images(folder: Path, names: Sequence[str]) -> tuple[list[FoundImage], list[Problem]]:
    """Return the declared images that exist, and a problem for each that is missing or must not be opened.

    The images all lie in one place: the folder itself, ``iclevr/`` or ``images/``, whichever holds most of them. That place may be
    a link to another disk, but no file in it may be a link that leads out of it.
    """
    best: tuple[list[FoundImage], list[Problem]] | None = None
    for place in (folder / place for place in PLACES):
        if not os.path.isdir(place):
            continue
        found, problems = find_in(place, folder, names)
        if best is None or len(found) > len(best[0]):
            best = found, problems
        if not problems:
            break
    return best or ([], [Problem(str(folder), "cannot be read")])


def decode_image(path: Path, *, resize: bool = True) -> np.ndarray:
    """Return an image file as uint8 RGB, (3, 64, 64); without ``resize``, an image of another size is refused.

    The lab's own steps: ``convert("RGB")``, then Pillow's antialiased bilinear resize. 16-bit gray is scaled to 8 bits, where Pillow
    would clip it.

    Raises:
        DataError: missing, neither PNG nor JPEG, damaged, cut short, too large to be safe, or of another size.
    """
    try:
        with _open(path) as image:
            if not resize and image.size != (SIZE, SIZE):
                raise DataError(f"is {image.width}x{image.height} pixels; images to score must be {SIZE}x{SIZE}")
            rgb = _to_rgb(image)
        pixels = np.asarray(rgb.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error ... on bad bytes
        raise DataError(f"{path}: {_reason(error)}") from error
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def check_image(path: Path) -> None:
    """Decode an image fully, and compare the PNG checksums, which decoding alone does not.

    Raises:
        DataError: as ``decode_image``.
    """
    try:
        with _open(path) as image:
            image.verify()
    except Exception as error:
        raise DataError(f"{path}: {_reason(error)}") from error
    decode_image(path)


def each_image(paths: Iterable[Path], work: Callable[[Path], T]) -> Generator[T | DataError, None, None]:
    """Yield ``work(path)``, or the DataError that it raised, for each path in order; in threads, since Pillow releases the GIL."""

    def tried(path: Path) -> T | DataError:
        try:
            return work(path)
        except DataError as error:
            return error

    remaining = iter(paths)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        while chunk := list(islice(remaining, CHUNK)):
            yield from pool.map(tried, chunk)


def find_in(place: Path, folder: Path, names: Sequence[str]) -> tuple[list[FoundImage], list[Problem]]:
    """Return the named files that exist in a place, and a problem for each that is missing or must not be opened."""
    inside = (Path(os.path.realpath(place)), Path(os.path.realpath(folder)))
    parents: dict[str, bool] = {"": True}  # sub-folder -> whether it is inside; checked once per folder, not per image
    found, problems = [], []
    prefix = os.path.join(place, "")
    for name in names:
        path = prefix + name  # strings: creating 18,009 Path objects takes longer than the rest of a cached start
        parent = name.rpartition("/")[0]
        if parent not in parents:
            parents[parent] = _within(place / parent, inside)
        try:
            about = os.lstat(path)
            stays = parents[parent]
            if stat.S_ISLNK(about.st_mode):
                stays = stays and _within(path, inside)
                about = os.stat(path)
        except OSError as error:
            missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
            problems.append(Problem(os.fspath(place / name), "missing" if missing else f"cannot be read ({error.strerror or error})"))
            continue
        if not stays:
            problems.append(Problem(os.fspath(place / name), "is a link that leads out of the data folder; put the file itself there"))
        elif not stat.S_ISREG(about.st_mode):
            problems.append(Problem(os.fspath(place / name), "is not a regular file"))
        else:
            found.append(FoundImage(name, place, about.st_size, about.st_mtime_ns))
    return found, problems


def _within(path: str | Path, roots: tuple[Path, ...]) -> bool:
    real = Path(os.path.realpath(path))
    return any(real.is_relative_to(root) for root in roots)


def _open(path: Path) -> Image.Image:
    # Pillow only warns of an image between one and two times its limit. The warnings filter is global to the process, hence the lock.
    with _opening, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(path, formats=FORMATS)
    if image.format == "PNG" and image.fp is not None:  # Pillow decodes a PNG without its last bytes; of a JPEG it reads all
        place = image.fp.tell()
        image.fp.seek(max(0, image.fp.seek(0, os.SEEK_END) - TRAILER))
        end = image.fp.read()
        image.fp.seek(place)
        if PNG_END not in end:
            image.close()
            raise OSError("truncated: the last bytes are missing")
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode == "I" or image.mode.startswith("I;16"):
        wide = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        image = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    image.info.pop("transparency", None)  # convert("RGB") drops it in any case, and would warn
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, DataError):
        return str(error)
    if isinstance(error, FileNotFoundError):
        return "missing"
    if isinstance(error, UnidentifiedImageError):
        return "is neither a PNG nor a JPEG image"
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"has more than {Image.MAX_IMAGE_PIXELS} pixels; it is not a training image"
    return f"cannot be decoded ({show(str(error))[1:-1] or type(error).__name__})"
