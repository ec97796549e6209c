"""Files that are whole or absent: atomic, verified writing, room on the disk, and content hashes (standard library only)."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ddpmctl.errors import DataError, UsageError

# What a full or read-only disk answers in the middle of a write: the person's to mend, unlike any other OSError of the body.
DISK_ERRORS = frozenset({errno.ENOSPC, errno.EROFS, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)})


SPARE_BYTES = 2**20  # left free beside every write: for logs, and for a file system's own needs


def cannot_write(folder: Path, error: OSError) -> UsageError:
    """Return the error that tells a person that ``folder`` cannot be written to, and why."""
    return UsageError(f"{folder}: cannot write here ({error.strerror or error}); choose another folder or make room")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its place, fsync'd, when the body ends without an error.

    A reader sees the old file or the new one, never a part. After an error or Ctrl-C ``path`` is untouched and the temporary
    file is gone. The temporary name ends in ``.tmp``, so that no pattern such as ``*.pth`` finds it.

    Raises:
        UsageError: the folder is missing, read-only or full; the message names it.
    """
    temporary = path.with_name(f".{path.name[:80]}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        open(temporary, "xb").close()
    except OSError as error:
        raise cannot_write(path.parent, error) from error
    try:
        yield temporary
        try:
            with open(temporary, "r+b") as file:  # a handle that may write: Windows flushes no other
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


def write_verified(path: Path, data: bytes | memoryview) -> str:
    """Write bytes to a file that appears whole or not at all, after they were read back from the disk; return their SHA-256 in hex.

    Raises:
        UsageError: the folder cannot be written to, or has no room.
        DataError: the disk gives back other bytes than it was given; the earlier file is untouched.
    """
    need_room(path.parent, len(data))
    digest = hashlib.sha256(data).hexdigest()
    with atomic_write(path) as temporary:
        with open(temporary, "r+b") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):  # else the bytes would be read back from memory and not from the disk
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if temporary.stat().st_size != len(data) or sha256_file(temporary) != digest:
            raise DataError(f"{path}: the disk gave back other bytes than were written; the earlier file is untouched, but do not trust this disk")
    return digest


def prepare_folder(folder: Path, flag: str) -> None:
    """Make a folder if it is missing, and check that files can be written to it.

    Raises:
        UsageError: they cannot; the message begins with ``flag``.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".ddpmctl-probe.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"{flag}: {cannot_write(folder, error)}") from None


def need_room(folder: Path, size: int, purpose: str = "") -> None:
    """Refuse to begin what would not fit.

    Args:
        folder: an existing folder on the disk in question.
        size: bytes that are going to be written.
        purpose: what they are for, as the beginning of the message.

    Raises:
        UsageError: fewer bytes are free.
    """
    free = shutil.disk_usage(folder).free
    if free < size + SPARE_BYTES:
        what = f"{purpose}: " if purpose else ""
        raise UsageError(f"{folder}: {what}{in_bytes(size)} are needed and {in_bytes(free)} are free; make room, or choose another folder")


def in_bytes(size: int) -> str:
    """Return a number of bytes in words."""
    value = float(size)
    for unit in ("bytes", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def remove_temporary_files(folder: Path) -> None:
    """Remove the temporary files that killed writers of ``folder`` left; the caller sees to it that nobody is writing there."""
    for left in folder.glob(".*.tmp"):
        with suppress(OSError):
            left.unlink()


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut; Windows and some network file systems have no such call, and go without."""
    if os.name != "posix":
        return
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hex, read in pieces.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
