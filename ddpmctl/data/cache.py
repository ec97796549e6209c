"""The cache of decoded images: one array on disk, so that only the first start decodes or renders.

An entry is ``KEY.npy`` (uint8, (N, 3, H, W)) and ``KEY.json`` (key, shape, sha256 of the array's bytes). The key is a hash of
the source, so an entry never becomes stale. The checksum is verified at each start (about 0.2 s for the lab's 221 MB), and a damaged
entry is rebuilt.

Images are mapped into memory, not read: a set may be larger than the memory. An entry is never changed, only replaced. While it is built, the images
that are done lie in a temporary file with a journal beside it, so that a killed process's work is not lost.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import mmap
import os
import re
import secrets
import stat
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from ddpmctl.data.folders import Problem, raise_first, read_json
from ddpmctl.data.images import FoundImage, decode_image, each_image
from ddpmctl.data.source import FITS
from ddpmctl.errors import DataError, DdpmctlError, UsageError
from ddpmctl.files import need_room, write_text
from ddpmctl.iclevr import ICLEVR
from ddpmctl.progress import Notice, Progress

UNUSED_DAYS = 30
PATTERNS = ("*.npy", "*.json", "results/*.npz", "devices/*.json", "crashes/*.txt", ".*.tmp", "results/.*.tmp")
ENTRY = r"[0-9a-f]{64}\.(npy|json|npz)"
OURS = re.compile(rf"{ENTRY}|\.{ENTRY}\..+\.tmp|crash-[0-9-]+\.txt")  # DDPMCTL_CACHE_DIR may name a folder with other files
DECODED_TOGETHER = 100  # images between two progress events
READ_BYTES = 16 * 2**20  # that are read at once
BLOCK_BYTES = 2**26  # between two lines of the journal
SLOW_BYTES = 500_000_000  # of an entry whose check shows progress
MOST_JOURNAL = 16 * 2**20
DECODER = 1  # increase it when decoding or rendering changes the pixels, so that old entries are not used


@dataclass(frozen=True)
class CachedImages:
    """The decoded images and the sha256 of their bytes."""

    images: np.ndarray  # uint8, (N, 3, H, W), read-only
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


Build = Callable[[int], Iterator[Progress | np.ndarray]]
"""(image to begin with) -> progress, and the images from there on, in order: uint8 (B, 3, H, W)."""


def folder_key(digest: str, found: Sequence[FoundImage], size: int = ICLEVR.size, fit: str = FITS[0]) -> str:
    """Return the key of a folder's entry: the hash of its labels, how images are fitted, and name, size and modification time of every image."""
    rows = [[image.name, image.size, image.mtime_ns] for image in found]
    fitted = [] if fit == FITS[0] else [fit]
    return hashlib.sha256(json.dumps(["folder", DECODER, size, digest, rows, *fitted]).encode()).hexdigest()


def benchmark_key(fingerprint: str, size: int = ICLEVR.size) -> str:
    """Return the key of a rendered benchmark's entry, from the benchmark's own fingerprint."""
    return hashlib.sha256(json.dumps(["benchmark", DECODER, size, fingerprint]).encode()).hexdigest()


def cached_images(key: str, count: int, build: Build, size: int = ICLEVR.size) -> Generator[Progress | Notice, None, CachedImages]:
    """Return the entry's images, (count, 3, size, size), from the cache, or from ``build``, whose images are then cached.

    They are read-only. Two processes may build the same entry at once; one of them goes on where a killed process ended.
    """
    shape = (count, 3, size, size)
    entry: Path | None = None
    try:
        entry = cache_folder() / f"{key}.npy"
        if (kept := (yield from _read(entry, key, shape))) is not None:
            return kept
    except DdpmctlError as error:
        yield Notice(f"decoded images are not taken from the cache: {error}")
    if entry is not None:
        try:
            return (yield from _built(entry, key, shape, build))
        except (OSError, UsageError) as error:
            yield Notice(f"decoded images are not cached, so the next start decodes again: {error}; set DDPMCTL_CACHE_DIR to another folder")
    images, done = np.empty(shape, dtype=np.uint8), 0
    for item in build(0):
        if isinstance(item, Progress):
            yield item
        else:
            images[done : done + len(item)] = item
            done += len(item)
    return CachedImages(images, hashlib.sha256(images.data).hexdigest())


def decoded(folder: Path, found: Sequence[FoundImage], size: int, fit: str, start: int = 0) -> Iterator[Progress | np.ndarray]:
    """Yield progress, and the images of a folder from number ``start`` on, decoded by all cores: uint8 (B, 3, size, size).

    Raises:
        DataError: images cannot be decoded; raised after the last one, names the first and counts the others.
    """
    problems = []
    images = np.zeros((DECODED_TOGETHER, 3, size, size), dtype=np.uint8)
    yield Progress("decoding", start, len(found))
    results = each_image((image.path for image in found[start:]), lambda path: decode_image(path, size=size, fit=fit))
    for index, result in enumerate(results, start=start):
        place = (index - start) % DECODED_TOGETHER
        if isinstance(result, DataError):
            path = str(found[index].path)
            problems.append(Problem(path, str(result).removeprefix(f"{path}: ")))
        else:
            images[place] = result
        if place + 1 == DECODED_TOGETHER or index + 1 == len(found):
            if not problems:  # what follows a problem is only checked
                yield images[: place + 1]
            yield Progress("decoding", index + 1, len(found))
    if problems:
        raise_first(problems, folder)


def _read(entry: Path, key: str, shape: tuple[int, ...]) -> Generator[Progress, None, CachedImages | None]:
    """Return a valid entry and mark it as used, or return None if there is none.

    Raises:
        DataError: the entry is damaged.
    """
    about_path = entry.with_suffix(".json")
    if not os.path.lexists(about_path):  # written last: without it the entry is missing or incomplete
        return None
    about: object = None
    with any_error_is_damage():
        about = read_json(about_path)
    if not isinstance(about, dict) or about.get("key") != key or about.get("shape") != list(shape):
        raise DataError(f"{about_path}: damaged; it is rebuilt")
    header, images, digest = _header(shape), None, hashlib.sha256()
    with any_error_is_damage(), open(entry, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if file.read(len(header)) == header and size == len(header) + math.prod(shape):
            done = 0
            while part := file.read(READ_BYTES):
                digest.update(part)
                done += len(part)
                if size > SLOW_BYTES:
                    yield Progress("checking the cache", done, size)
            images = _mapped(file, shape)
    if images is None or digest.hexdigest() != about.get("sha256"):
        raise DataError(f"{entry}: {'damaged' if os.path.lexists(entry) else 'removed'}; it is rebuilt")
    mark_used(entry, about_path)
    return CachedImages(images, digest.hexdigest())


def _mapped(file: BinaryIO, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Return the array of an entry, mapped into memory.

    Training reads it in random order. Without this advice Linux reads 128 KiB around each image of 12, and where the memory is smaller than the
    set, throws away what was needed: 36 images per second in 1 GiB instead of 53.
    """
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):  # not on Windows
        mapped.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapped, dtype=np.uint8, offset=len(_header(shape)), count=math.prod(shape)).reshape(shape)


def _header(shape: tuple[int, ...]) -> bytes:
    """Return the header of the .npy file of a uint8 array; that of an entry is only compared with it, and is never parsed."""
    expected = io.BytesIO()
    np.lib.format.write_array_header_1_0(expected, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return expected.getvalue()


def _built(entry: Path, key: str, shape: tuple[int, ...], build: Build) -> Generator[Progress, None, CachedImages]:
    """Build an entry and return it.

    Raises:
        OSError, UsageError: the cache cannot be written.
    """
    entry.parent.mkdir(parents=True, exist_ok=True)
    lock, alone = FileLock(entry.with_name(".building.lock"), timeout=0), True
    try:
        lock.acquire()
    except Timeout:  # another process builds an entry; it may be halted, so this one does not wait
        alone = False
    mark = "" if alone else f".{os.getpid()}-{secrets.token_hex(4)}"
    partial, journal = (entry.with_name(f".{entry.stem}{suffix}{mark}.partial.tmp") for suffix in (".npy", ".json"))
    try:
        digest = yield from _written(partial, journal, shape, build)
        os.replace(partial, entry)
        journal.unlink(missing_ok=True)
        about = {"key": key, "shape": list(shape), "sha256": digest}
        write_text(entry.with_suffix(".json"), json.dumps(about, indent=1) + "\n")
        mark_used(entry)
        with open(entry, "rb") as written:
            return CachedImages(_mapped(written, shape), digest)
    finally:
        if alone:
            lock.release()
        else:
            for file in (partial, journal):
                file.unlink(missing_ok=True)


def _written(partial: Path, journal: Path, shape: tuple[int, ...], build: Build) -> Generator[Progress, None, str]:
    """Write the array of an entry, after the images that a killed process has left; return the sha256 of its bytes."""
    header = _header(shape)
    need_room(partial.parent, math.prod(shape), "for the decoded images")
    with open(partial, "r+b" if partial.exists() else "w+b") as file, open(journal, "a+b") as log:
        done, digest = _left_behind(file, log, header, shape)
        file.truncate(file.tell())
        if not done:
            file.write(header)
        saved = file.tell()
        for item in build(done):
            if isinstance(item, Progress):
                yield item
                continue
            file.write(item.data)
            digest.update(item.data)
            done += len(item)
            if file.tell() - saved >= BLOCK_BYTES or done == shape[0]:
                file.flush()
                os.fsync(file.fileno())
                log.write(json.dumps({"images": done, "sha256": digest.hexdigest()}).encode() + b"\n")
                log.flush()
                saved = file.tell()
    return digest.hexdigest()


def _left_behind(file: BinaryIO, log: BinaryIO, header: bytes, shape: tuple[int, ...]) -> tuple[int, hashlib._Hash]:
    """Return how many images of a partial file are as its journal says, and the hash of their bytes.

    The file then stands behind them, and the journal holds only their lines.
    """
    done, digest, good = 0, hashlib.sha256(), 0
    image = math.prod(shape[1:])
    log.seek(0)
    lines = log.read(MOST_JOURNAL).splitlines(keepends=True)
    whole = file.read(len(header)) == header
    with any_error_is_damage():
        for line in lines if whole else []:
            row, further = json.loads(line), digest.copy()
            if type(row["images"]) is not int or not done < row["images"] <= shape[0]:
                break
            left = (row["images"] - done) * image
            while left and (part := file.read(min(left, READ_BYTES))):
                further.update(part)
                left -= len(part)
            if left or further.hexdigest() != row["sha256"]:
                break
            done, digest, good = row["images"], further, good + len(line)
    file.seek(len(header) + done * image if done else 0)
    log.truncate(good)
    return done, digest
