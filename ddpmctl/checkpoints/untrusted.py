"""Safe loading of untrusted tensor files: no code execution, and no more memory than the file's size.

``torch.load(weights_only=True)`` runs no code, but it unpacks compressed parts, allocates memory before shapes can be checked, and
does not verify checksums. So the archive is checked first: the size of its directory, no compression, no overlapping parts, the CRC32
of every part. ``contents.py`` then reads shapes and sizes without creating tensors, and compares them with the parts.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np

from ddpmctl.checkpoints.contents import MAX_PICKLE_BYTES, Declared, NotACheckpointError, read_contents
from ddpmctl.errors import DataError, UsageError, limit_reached, out_of_memory

if TYPE_CHECKING:
    from torch import nn

MAX_PARTS = 100_000
MAX_DIRECTORY_BYTES = 80 * MAX_PARTS  # an entry of torch has about 65 bytes; zipfile needs about ten times as much memory
END = struct.Struct("<4s4H2LH")  # zip end record: signature, disks, entries, size and offset of the directory, length of the comment
END64 = struct.Struct("<4sQ2H2L4Q")  # its zip64 record: signature, own size, versions, disks, entries, size and offset of the directory
LOCATOR = struct.Struct("<4sLQL")  # between the two: signature, disk, offset of the zip64 record, disks
FLOATING = ("DoubleStorage", "FloatStorage", "HalfStorage", "BFloat16Storage")
NUMPY_TYPES = {"DoubleStorage": "<f8", "FloatStorage": "<f4"}


def mismatches(net: nn.Module, declared: Any) -> list[str]:
    """Return the names of weights with another shape or kind of dtype than the network's, and of missing and additional ones.

    Raises:
        ValueError: not all declared weights are tensors.
    """
    if not isinstance(declared, dict) or not all(isinstance(value, Declared) for value in declared.values()):
        raise ValueError("the weights are not all tensors")
    expected = {name: (tuple(value.shape), value.is_floating_point()) for name, value in net.state_dict().items()}
    found = {name: (value.shape, value.kind in FLOATING) for name, value in declared.items()}
    return [name for name, value in expected.items() if found.get(name) != value] + [name for name in found if name not in expected]


@dataclass(frozen=True)
class TensorFile:
    """A checked, open file.

    Attributes:
        sha256: hash of the file in hex.
        outline: the content, with a ``Declared`` for each tensor.
    """

    name: str
    sha256: str
    outline: Any
    _file: BinaryIO

    def vector(self, tensor: Declared) -> np.ndarray | None:
        """Return a tensor of one dimension as float64, read without torch; None if it has another form or precision."""
        dtype = NUMPY_TYPES.get(tensor.kind)
        if dtype is None or len(tensor.shape) != 1 or tensor.stride != (1,):
            return None
        with zipfile.ZipFile(self._file) as archive:
            items = np.frombuffer(archive.read(tensor.part), dtype)
        values: np.ndarray = items[tensor.offset : tensor.offset + tensor.shape[0]].astype(np.float64)
        return values

    def load(self) -> Any:
        """Return the content with its tensors on the CPU, in plain containers.

        Raises:
            DataError: torch cannot read the file.
        """
        import torch

        self._file.seek(0)
        try:
            return _plain(torch.load(self._file, map_location="cpu", weights_only=True))
        except Exception as error:  # a damaged file can raise any error
            if out_of_memory(error):
                raise
            raise DataError(f"{self.name}: is not a checkpoint, or is damaged ({type(error).__name__})") from None


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Open and check a file of tensors.

    Raises:
        UsageError: there is no such file.
        DataError: it cannot be read, is damaged, or is not a file of tensors.
    """
    with open_regular(path) as file:
        yield checked(file, str(path))


def open_regular(path: Path) -> BinaryIO:
    """Open a file, also by a link, for reading.

    Raises:
        UsageError: there is no such file.
        DataError: it is not a regular file, or cannot be read.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would block
            raise DataError(f"{path}: is not a regular file")
        return open(path, "rb")
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such file") from None
    except OSError as error:
        raise limit_reached(error) or DataError(f"{path}: cannot be read ({error.strerror})") from None


def checked(file: BinaryIO, name: str) -> TensorFile:
    """Check an open file of tensors; ``name`` is used in messages.

    Raises:
        DataError: it is damaged, or is not a file of tensors.
    """
    try:
        size = file.seek(0, os.SEEK_END)
        directory = _directory(file, size)
        with zipfile.ZipFile(file) as archive:
            if directory != (len(archive.infolist()), archive.start_dir):  # torch has its own zip reader, which must see the same
                raise NotACheckpointError(TWO_DIRECTORIES)
            parts = _parts(archive, size)
            if (damaged := archive.testzip()) is not None:
                raise NotACheckpointError(f"the checksum of its part {damaged[:80]!r} is wrong")
            root = _root(parts)
            outline = read_contents(archive.read(f"{root}/data.pkl"), parts, f"{root}/data/")
        file.seek(0)
        return TensorFile(name, hashlib.file_digest(cast("Any", file), "sha256").hexdigest(), outline, file)
    except NotACheckpointError as error:
        raise DataError(f"{name}: is not a checkpoint, or is damaged ({error})") from None
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror})") from None
    except Exception as error:  # a damaged file can raise any error, in zipfile as in the unpickler
        if out_of_memory(error):
            raise
        raise DataError(f"{name}: is not a checkpoint, or is damaged ({type(error).__name__})") from None


TWO_DIRECTORIES = "it has two zip directories"


def _directory(file: BinaryIO, size: int) -> tuple[int, int]:
    """Return the number of parts and the offset of the zip directory, which must be followed by its end records and the end of the file."""
    if size < END.size:
        raise NotACheckpointError("it is empty" if size == 0 else "it is too short")
    at = size - END.size
    signature, _, _, *values, comment = _read(file, END, at)
    if signature != b"PK\5\6" or comment:
        raise NotACheckpointError("its end is missing, or torch before 1.6 wrote it: save it again with a newer torch")
    if at >= LOCATOR.size + END64.size and (locator := _read(file, LOCATOR, at - LOCATOR.size))[0] == b"PK\6\7":
        at -= LOCATOR.size + END64.size
        found, _, _, _, _, _, *long = _read(file, END64, at)
        short = zip(values, long, (0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF), strict=True)
        if found != b"PK\6\6" or locator[2] != at or any(value not in (other, maximum) for value, other, maximum in short):
            raise NotACheckpointError(TWO_DIRECTORIES)
        values = long
    here, entries, length, start = values
    if here != entries or start + length != at:
        raise NotACheckpointError(TWO_DIRECTORIES)
    if entries > MAX_PARTS or length > MAX_DIRECTORY_BYTES:
        raise NotACheckpointError(f"it has over {MAX_PARTS} parts")
    return entries, start


def _read(file: BinaryIO, record: struct.Struct, place: int) -> tuple[Any, ...]:
    file.seek(place)
    return record.unpack(file.read(record.size))


def _parts(archive: zipfile.ZipFile, size: int) -> dict[str, int]:
    """Return the sizes of the parts in bytes; refuse compressed or overlapping parts."""
    entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.compress_size != entry.file_size for entry in entries):
        raise NotACheckpointError("its parts are compressed or encrypted, which torch does not do")
    parts = {entry.filename: entry.file_size for entry in entries}
    if len(parts) < len(entries) or sum(parts.values()) > size:
        raise NotACheckpointError("its parts overlap")
    return parts


def _root(parts: dict[str, int]) -> str:
    roots = [name.removesuffix("/data.pkl") for name in parts if name.endswith("/data.pkl")]
    if len(roots) != 1 or "/" in roots[0] or not all(name.startswith(roots[0] + "/") for name in parts):
        raise NotACheckpointError("it is another kind of archive")
    if parts[f"{roots[0]}/data.pkl"] > MAX_PICKLE_BYTES:
        raise NotACheckpointError(f"its table of contents is over {MAX_PICKLE_BYTES // 2**20} MiB")
    return roots[0]


def _plain(value: Any) -> Any:
    """Return loaded values in plain dicts, and tensors without gradients.

    A file can set attributes of an ``OrderedDict``, which ``load_state_dict`` and the code of every caller would use: a list as ``items``,
    or ``_metadata`` by which a network's parameters are replaced.
    """
    from torch import Tensor

    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in dict.items(value)}  # not value.items, which may be such an attribute
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    return value.detach() if isinstance(value, Tensor) else value
