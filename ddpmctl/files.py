"""Files that are whole or absent: atomic writing and content hashes (standard library only)."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ddpmctl.errors import UsageError

# What a full or read-only disk answers in the middle of a write: the person's to mend, unlike any other OSError of the body.
DISK_ERRORS = frozenset({errno.ENOSPC, errno.EROFS, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)})


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
