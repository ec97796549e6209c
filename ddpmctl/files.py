"""Atomic and verified file writing, JSON, free disk space, and file hashes (standard library only)."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ddpmctl.errors import DataError, UsageError, limit_reached

# A full or read-only disk. The user can fix these; any other OSError is a bug.
DISK_ERRORS = frozenset({errno.ENOSPC, errno.EROFS, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)})
SPARE_BYTES = 2**20  # free space kept for logs and for the file system
_made: list[Path] = []  # by prepare_folder, in the order in which they were made


def cannot_write(folder: Path, error: OSError) -> UsageError:
    """Return the error for a folder that cannot be written to."""
    reason = "no space left on the disk, or no inodes: too many files" if error.errno == errno.ENOSPC else error.strerror or error
    return limit_reached(error) or UsageError(f"{folder}: cannot write here ({reason}); choose another folder or make room")


def named_after(name: str, ending: str, beginning: str = "") -> str:
    """Return ``beginning`` + ``name`` + ``ending`` as a file name; if it has over 255 bytes, ``name`` is cut and a hash is appended."""
    long, room = os.fsencode(name), 255 - len(os.fsencode(beginning + ending))
    if len(long) > room:
        name = f"{long[: room - 9].decode(errors='ignore')}-{hashlib.sha256(long).hexdigest()[:8]}"
    return beginning + name + ending


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success, fsync it and rename it to ``path``.

    A reader sees the old file or the new file, never a part. After an error or Ctrl-C ``path`` is unchanged and the temporary
    file is removed. The temporary name ends in ``.tmp``, so patterns such as ``*.pth`` do not match it.

    Raises:
        UsageError: the folder is missing, read-only or full; the message names it.
    """
    start = path.name.encode(errors="ignore")[:80].decode(errors="ignore")  # a name may have 255 bytes
    temporary = path.with_name(f".{start}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        open(temporary, "xb").close()
    except OSError as error:
        raise cannot_write(path.parent, error) from error
    try:
        yield temporary
        try:
            with open(temporary, "r+b") as file:  # Windows can only flush a writable handle
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            raise cannot_write(path.parent, error) from error
        _sync_folder(path.parent)
    except OSError as error:
        if error.errno in DISK_ERRORS:
            raise cannot_write(path.parent, error) from error
        raise
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def json_text(value: Any) -> str:
    """Return a value as indented JSON, which has no NaN and no infinity: they become null."""

    def finite(part: Any) -> Any:
        if isinstance(part, Mapping):
            return {key: finite(inner) for key, inner in part.items()}
        if isinstance(part, list | tuple):
            return [finite(inner) for inner in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(finite(value), indent=2)


def write_text(path: Path, text: str) -> Path:
    """Write a text file atomically; return its path."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def write_verified(path: Path, data: bytes | memoryview) -> str:
    """Write bytes atomically, after reading them back from the disk; return their SHA-256 in hex.

    Raises:
        UsageError: the folder cannot be written to, or the disk is full.
        DataError: the bytes read back differ; the old file is unchanged.
    """
    need_room(path.parent, len(data))
    digest = hashlib.sha256(data).hexdigest()
    with atomic_write(path) as temporary:
        with open(temporary, "r+b") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):  # drop the page cache, so that the bytes are read from the disk
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if temporary.stat().st_size != len(data) or sha256_file(temporary) != digest:
            raise DataError(f"{path}: the bytes read back from the disk differ from the bytes written; the old file is unchanged, the disk may be defective")
    return digest


def prepare_folder(folder: Path, flag: str) -> None:
    """Make a folder if it is missing, and check that files can be written to it; ``remove_empty_folders`` removes it if it stays empty.

    Raises:
        UsageError: they cannot; the message begins with ``flag``.
    """
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _made.extend(reversed(missing))
        probe = folder / f".ddpmctl-{secrets.token_hex(8)}.tmp"
        open(probe, "xb").close()  # a link of this name is not followed
        probe.unlink()
    except OSError as error:
        raise UsageError(f"{flag}: {cannot_write(folder, error)}") from None


def require_new_folder(folder: Path, flag: str) -> None:
    """Check that a path does not exist, or is an empty folder.

    Raises:
        UsageError: it is something else; the message begins with ``flag``.
    """
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise UsageError(f"{flag}: {folder} exists already; name a new folder")


def prepare_file(path: Path, flag: str) -> None:
    """Check that a file can be written, before any work is done for it; ``prepare_folder`` makes its folder.

    Raises:
        UsageError: it cannot, or is something other than a file; the message begins with ``flag``.
    """
    prepare_folder(path.parent, flag)
    try:
        if not stat.S_ISREG(path.stat().st_mode) or path.absolute().is_relative_to("/dev"):  # a pipe, a device or /dev/stdout would be replaced by a file
            raise UsageError(f"{flag}: {path} is not a regular file; name another one")
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"{flag}: {path} cannot be written ({error.strerror or error}); name another file") from None


def remove_empty_folders() -> None:
    """Remove the folders that ``prepare_folder`` made and nothing was written to, as where a command was refused after all."""
    while _made:
        with suppress(OSError):  # it is not empty
            _made.pop().rmdir()


def need_room(folder: Path, size: int, purpose: str = "") -> None:
    """Check that ``size`` bytes fit on the disk of ``folder``; ``purpose`` is put in front of the error message.

    Raises:
        UsageError: fewer bytes are free.
    """
    free = shutil.disk_usage(folder).free
    if free < size + SPARE_BYTES:
        what = f"{purpose}: " if purpose else ""
        raise UsageError(f"{folder}: {what}{in_bytes(size)} are needed and {in_bytes(free)} are free; make room, or choose another folder")


def in_bytes(size: int) -> str:
    """Return a number of bytes as text, with its unit."""
    value = float(size)
    for unit in ("bytes", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def remove_temporary_files(folder: Path) -> None:
    """Remove temporary files of killed processes; the caller ensures that no process is writing to ``folder``."""
    for left in folder.glob(".*.tmp"):
        with suppress(OSError):
            left.unlink()


def not_plain(path: Path, kind: Callable[[int], bool] = stat.S_ISREG) -> str | None:
    """Return why a path is not a file of its folder (with ``stat.S_ISDIR``: not a folder in it), or None; also None where there is nothing.

    A link may lead anywhere, and opening a pipe blocks. Paths in folders from unknown sources are checked before they are opened.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        return f"cannot be read ({getattr(error, 'strerror', None) or error})"
    if stat.S_ISLNK(mode):
        return "is a symbolic link"
    return None if kind(mode) else "is not a folder" if kind is stat.S_ISDIR else "is not a regular file"


def read_plain(path: Path, limit: int) -> bytes:
    """Return the content of a regular file of at most ``limit`` bytes; links are not followed.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: it is a link, not a regular file, larger, or cannot be read.
    """
    if problem := not_plain(path):
        raise DataError(f"{path}: {problem}")
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        with open(path, "rb", opener=lambda name, _: os.open(name, flags)) as file:
            content = file.read(limit + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    if len(content) > limit:
        raise DataError(f"{path}: is too large (over {in_bytes(limit)})")
    return content


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power failure; Windows and some network file systems do not support this."""
    if os.name != "posix":
        return
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
