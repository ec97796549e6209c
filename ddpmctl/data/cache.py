"""The cache of decoded images: one array on disk, so that only the first start decodes or renders.

An entry is ``KEY.npy`` (uint8, (N, 3, 64, 64)) and ``KEY.json`` (key, shape, sha256 of the array's bytes). The key is a hash of
the source, so an entry never becomes stale. The checksum is verified at each start (about 0.2 s for the lab's 221 MB), and a damaged
entry is rebuilt.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import stat
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ddpmctl.data.folders import Problem, raise_first, read_json
from ddpmctl.data.images import SIZE, FoundImage, decode_image, each_image
from ddpmctl.errors import DataError, DdpmctlError, UsageError
from ddpmctl.files import atomic_write, write_text
from ddpmctl.progress import Notice, Progress

UNUSED_DAYS = 30
PATTERNS = ("*.npy", "*.json", "results/*.npz", "devices/*.json", "crashes/*.txt", ".*.tmp", "results/.*.tmp")
ENTRY = r"[0-9a-f]{64}\.(npy|json|npz)"
OURS = re.compile(rf"{ENTRY}|\.{ENTRY}\..+\.tmp|crash-[0-9-]+\.txt")  # DDPMCTL_CACHE_DIR may name a folder with other files
DECODER = 1  # increase it when decoding or rendering changes the pixels, so that old entries are not used


@dataclass(frozen=True)
class CachedImages:
    """The decoded images and the sha256 of their bytes."""

    images: np.ndarray  # uint8, (N, 3, 64, 64)
    digest: str


def cache_folder() -> Path:
    """Return the cache folder: ``DDPMCTL_CACHE_DIR``, else the system's cache folder (it need not exist).

    Raises:
        UsageError: the user's home folder is unknown.
    """
    if chosen := os.environ.get("DDPMCTL_CACHE_DIR"):
        return Path(chosen)
    from platformdirs import user_cache_path

    try:
        return user_cache_path("ddpmctl", appauthor=False)
    except RuntimeError as error:
        raise UsageError("no home folder is known; set DDPMCTL_CACHE_DIR") from error


@contextmanager
def any_error_is_damage() -> Iterator[None]:
    """The body reads a cache entry: every exception ends it in silence, and its warnings are not shown.

    A damaged file can lead a parser to any exception: numpy's reader of headers alone raises SyntaxError, tokenize.TokenError, AttributeError, MemoryError
    and RecursionError. What the body was to find is then not found, so that the entry is made anew.
    """
    with warnings.catch_warnings(), suppress(Exception):
        warnings.simplefilter("ignore")
        yield


@dataclass(frozen=True)
class CacheFile:
    """A file in the cache: its size in bytes, and the days since it was last used."""

    path: Path
    size: int
    days: float


def cache_files() -> list[CacheFile]:
    """Return the files in the cache: decoded images, evaluations and the devices they used, tracebacks of crashes, and what killed processes left of them."""
    folder, found = cache_folder(), []
    for file in sorted(file for pattern in PATTERNS for file in folder.glob(pattern) if OURS.fullmatch(file.name)):
        with suppress(OSError):  # another process may have removed it
            about = file.stat()
            if stat.S_ISREG(about.st_mode):
                found.append(CacheFile(file, about.st_size, (time.time() - about.st_mtime) / 86400))
    return found


def mark_used(*files: Path) -> None:
    """Set the time of last use of cache files to now; once a day, remove files that were not used for ``UNUSED_DAYS``."""
    stamp = cache_folder() / ".last-removal"
    with suppress(OSError):
        for file in files:
            os.utime(file)
        if not stamp.exists() or time.time() - stamp.stat().st_mtime >= 86400:
            stamp.touch()
            remove_unused()


def remove_unused(days: float = UNUSED_DAYS) -> list[CacheFile]:
    """Remove the files of the cache that were not used for ``days``, and temporary files older than a day; return them."""
    removed = []
    for file in cache_files():
        if file.days >= (max(days, 1) if file.path.suffix == ".tmp" else days):  # a temporary file may be one that is being written
            with suppress(OSError):  # another process may have removed it
                file.path.unlink()
                removed.append(file)
    return removed


def folder_key(train_digest: str, found: list[FoundImage]) -> str:
    """Return the key of a lab folder's entry: train.json's content, and name, size and modification time of every image."""
    rows = [[image.name, image.size, image.mtime_ns] for image in found]
    return hashlib.sha256(json.dumps(["folder", DECODER, SIZE, train_digest, rows]).encode()).hexdigest()


def benchmark_key(fingerprint: str) -> str:
    """Return the key of a rendered benchmark's entry, from the benchmark's own fingerprint."""
    return hashlib.sha256(json.dumps(["benchmark", DECODER, SIZE, fingerprint]).encode()).hexdigest()


def cached_images(key: str, count: int, build: Callable[[], Generator[Progress, None, np.ndarray]]) -> Generator[Progress | Notice, None, CachedImages]:
    """Return the entry's images, (count, 3, 64, 64), from the cache, or from ``build()``, whose result is then cached.

    Two processes may build the same entry at once: each writes its own temporary files and renames them.
    """
    entry: Path | None = None
    try:
        entry = cache_folder() / f"{key}.npy"
        if (kept := _read(entry, key, count)) is not None:
            mark_used(entry, entry.with_suffix(".json"))
            return kept
    except DdpmctlError as error:
        yield Notice(f"decoded images are not taken from the cache: {error}")
    images = yield from build()
    digest = _sha256(images)
    if entry is not None:
        try:
            _write(entry, key, images, digest)
        except (OSError, UsageError) as error:
            yield Notice(f"decoded images are not cached, so the next start decodes again: {error}; set DDPMCTL_CACHE_DIR to another folder")
    return CachedImages(images, digest)


def decode_folder(folder: Path, found: list[FoundImage]) -> Generator[Progress, None, np.ndarray]:
    """Decode all images of a folder into one array, uint8 (N, 3, 64, 64).

    Raises:
        DataError: images cannot be decoded; raised after the last one, names the first and counts the others.
    """
    images = np.empty((len(found), 3, SIZE, SIZE), dtype=np.uint8)
    problems = []
    yield Progress("decoding", 0, len(found))
    for index, result in enumerate(each_image([image.path for image in found], decode_image)):
        if isinstance(result, DataError):
            path = str(found[index].path)
            problems.append(Problem(path, str(result).removeprefix(f"{path}: ")))
        else:
            images[index] = result
        if (index + 1) % 100 == 0 or index + 1 == len(found):
            yield Progress("decoding", index + 1, len(found))
    if problems:
        raise_first(problems, folder)
    return images


def _read(entry: Path, key: str, count: int) -> CachedImages | None:
    """Return a valid entry, or None if there is none.

    Raises:
        DataError: the entry is damaged.
    """
    about_path = entry.with_suffix(".json")
    if not os.path.lexists(about_path):  # written last: without it the entry is missing or incomplete
        return None
    about: object = None
    images: np.ndarray | None = None
    shape = (count, 3, SIZE, SIZE)
    with any_error_is_damage():
        about = read_json(about_path)
    if not isinstance(about, dict) or about.get("key") != key or about.get("shape") != list(shape):
        raise DataError(f"{about_path}: damaged; it is rebuilt")
    with any_error_is_damage():
        images = _read_array(entry, shape)
    if images is None or _sha256(images) != about.get("sha256"):
        raise DataError(f"{entry}: {'damaged' if os.path.lexists(entry) else 'removed'}; it is rebuilt")
    return CachedImages(images, str(about["sha256"]))


def _read_array(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """Return the uint8 array of an .npy file if it has this shape; the file's header is only compared, and is never parsed."""
    expected = io.BytesIO()
    np.lib.format.write_array_header_1_0(expected, {"descr": "|u1", "fortran_order": False, "shape": shape})
    with open(path, "rb") as file:
        if file.read(len(expected.getvalue())) != expected.getvalue():
            return None
        images = np.empty(shape, dtype=np.uint8)
        whole = file.readinto(images.reshape(-1).data) == images.nbytes and not file.read(1)
        return images if whole else None


def _write(entry: Path, key: str, images: np.ndarray, digest: str) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(entry) as temporary, open(temporary, "wb") as file:
        np.lib.format.write_array(file, images, version=(1, 0), allow_pickle=False)
    about = {"key": key, "shape": list(images.shape), "sha256": digest}
    write_text(entry.with_suffix(".json"), json.dumps(about, indent=1) + "\n")
    mark_used(entry)


def _sha256(images: np.ndarray) -> str:
    return hashlib.sha256(images.data).hexdigest()
