"""Images in a zip file, read without unpacking it."""

from __future__ import annotations

import functools
import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from ddpmctl.errors import DataError
from ddpmctl.files import in_bytes

MOST_MEMBERS = 10_000_000
ENCRYPTED = 0x1  # flag bit of a member


@dataclass(frozen=True)
class ZipMember:
    """A file in a zip file; its text is the path of the zip file with the member's name."""

    archive: Path
    name: str

    def __str__(self) -> str:
        """Return where it is, for messages."""
        return f"{self.archive}/{self.name}"

    def read(self, most: int) -> bytes:
        """Return its content.

        Raises:
            DataError: it is missing, encrypted or damaged, or has more than ``most`` bytes, whatever the zip file says of its size.
        """
        try:
            opened = open_zip(self.archive)
            with opened.open(self.name) as file:
                content = file.read(most + 1)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, KeyError, ValueError, OSError) as error:
            raise DataError(f"cannot be read from the zip file ({error})") from error
        if len(content) > most:
            raise DataError(f"has over {in_bytes(most)}; make it smaller")
        return content


def open_zip(path: Path) -> zipfile.ZipFile:
    """Return a zip file, opened once; threads may read its members at the same time.

    Raises:
        DataError: it is damaged, or has too many members.
    """
    try:
        about = os.stat(path)
        return _opened(path, about.st_mtime_ns, about.st_size)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise DataError(f"{path}: cannot be read as a zip file ({error})") from error


@functools.lru_cache(maxsize=4)
def _opened(path: Path, mtime_ns: int, size: int) -> zipfile.ZipFile:
    opened = zipfile.ZipFile(path)
    if len(opened.infolist()) > MOST_MEMBERS:
        raise zipfile.BadZipFile(f"it has {len(opened.infolist()):,} members")
    return opened
