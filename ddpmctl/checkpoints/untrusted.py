"""Safe loading of untrusted tensor files: no code execution, and no more memory than the file's size.

``torch.load(weights_only=True)`` runs no code, but it unpacks compressed parts, allocates memory before shapes can be checked, and
does not verify checksums. So the archive is checked first: no compression, no overlapping parts, the CRC32 of every part. A
restricted unpickler then reads shapes and sizes without creating tensors, and compares them with the parts.
"""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import stat
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, cast

from ddpmctl.errors import DataError, UsageError

if TYPE_CHECKING:
    from torch import nn

MAX_PARTS = 100_000
MAX_PICKLE_BYTES = 8 * 2**20  # 25,000 tensors need about 4 MiB
MAX_PLAIN_VALUES = 1_000_000
END = struct.Struct("<4s4H2LH")  # zip end record: signature, disks, entries, size and offset of the directory, length of the comment
ITEM_BYTES = {
    "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2,
    "LongStorage": 8, "IntStorage": 4, "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1,
}  # fmt: skip


class _NoCheckpoint(Exception):
    """The file is not a valid checkpoint; the message says why."""


@dataclass(frozen=True)
class Declared:
    """The declared storage type, e.g. "FloatStorage", and shape of a tensor in a file."""

    kind: str
    shape: tuple[int, ...]


FLOATING = ("DoubleStorage", "FloatStorage", "HalfStorage", "BFloat16Storage")


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
class _Storage:
    kind: str
    count: int = 0


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

    def load(self) -> Any:
        """Return the content with its tensors on the CPU.

        Raises:
            DataError: torch cannot read the file.
        """
        import torch

        self._file.seek(0)
        try:
            return torch.load(self._file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file can raise any error
            raise DataError(f"{self.name}: is not a checkpoint, or is damaged ({type(error).__name__})") from None


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Open and check a file of tensors.

    Raises:
        UsageError: there is no such file.
        DataError: it cannot be read, is damaged, or is not a file of tensors.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would block
            raise DataError(f"{path}: is not a regular file")
        file = open(path, "rb")  # noqa: SIM115 - closed below
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    with file:
        yield checked(file, str(path))


def checked(file: BinaryIO, name: str) -> TensorFile:
    """Check an open file of tensors; ``name`` is used in messages.

    Raises:
        DataError: it is damaged, or is not a file of tensors.
    """
    try:
        size = file.seek(0, os.SEEK_END)
        end = _end(file, size)
        with zipfile.ZipFile(file) as archive:
            # torch has its own zip reader, which must see the same directory; the maximum values mean a zip64 record.
            if end[0] not in (len(archive.infolist()), 0xFFFF) or end[1] not in (archive.start_dir, 0xFFFFFFFF):
                raise _NoCheckpoint("it has two zip directories")
            parts = _parts(archive, size)
            if (damaged := archive.testzip()) is not None:
                raise _NoCheckpoint(f"the checksum of its part {damaged[:80]!r} is wrong")
            outline = _Outline(archive.read("/".join((_root(parts), "data.pkl"))), parts).load()
        _count(outline)
        file.seek(0)
        return TensorFile(name, hashlib.file_digest(cast("Any", file), "sha256").hexdigest(), outline, file)
    except _NoCheckpoint as error:
        raise DataError(f"{name}: is not a checkpoint, or is damaged ({error})") from None
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror})") from None
    except Exception as error:  # a damaged file can raise any error, in zipfile as in the unpickler
        raise DataError(f"{name}: is not a checkpoint, or is damaged ({type(error).__name__})") from None


def _end(file: BinaryIO, size: int) -> tuple[int, int]:
    """Return the number of parts and the directory's offset from the zip end record, which must be at the end of the file."""
    if size < END.size:
        raise _NoCheckpoint("it is empty" if size == 0 else "it is too short")
    file.seek(size - END.size)
    signature, _, _, _, entries, _, place, comment = END.unpack(file.read(END.size))
    if signature != b"PK\5\6" or comment:
        raise _NoCheckpoint("its end is missing, or torch before 1.6 wrote it: save it again with a newer torch")
    return entries, place


def _parts(archive: zipfile.ZipFile, size: int) -> dict[str, int]:
    """Return the sizes of the parts in bytes; refuse compressed or overlapping parts."""
    entries = archive.infolist()
    if len(entries) > MAX_PARTS:
        raise _NoCheckpoint(f"it has over {MAX_PARTS} parts")
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.compress_size != entry.file_size for entry in entries):
        raise _NoCheckpoint("its parts are compressed or encrypted, which torch does not do")
    parts = {entry.filename: entry.file_size for entry in entries}
    if len(parts) < len(entries) or sum(parts.values()) > size:
        raise _NoCheckpoint("its parts overlap")
    return parts


def _root(parts: dict[str, int]) -> str:
    roots = [name.removesuffix("/data.pkl") for name in parts if name.endswith("/data.pkl")]
    if len(roots) != 1 or "/" in roots[0] or not all(name.startswith(roots[0] + "/") for name in parts):
        raise _NoCheckpoint("it is another kind of archive")
    if parts[f"{roots[0]}/data.pkl"] > MAX_PICKLE_BYTES:
        raise _NoCheckpoint(f"its table of contents is over {MAX_PICKLE_BYTES // 2**20} MiB")
    return roots[0]


# The opcodes that torch uses. Opcodes that allocate much memory from a few bytes (BYTEARRAY8, LONG4) are excluded.
OPCODES = (
    "PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BUILD", "BINPERSID", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET",
    "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING",
    "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_SET",
)  # fmt: skip


# The Python unpickler: the C one allocates memory for any memo index in the file.
class _Outline(pickle._Unpickler):
    """An unpickler that creates no tensors and calls only the functions listed in ``_known``."""

    dispatch: ClassVar[dict[int, Any]] = {code: pickle._Unpickler.dispatch[code] for code in (getattr(pickle, name)[0] for name in OPCODES)}
    stack: list[Any]

    def __init__(self, data: bytes, parts: dict[str, int]) -> None:
        super().__init__(BytesIO(data))
        self._parts, self._data_folder = parts, f"{_root(parts)}/data/"
        self._known: dict[tuple[str, str], Callable[..., Any] | _Storage] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch", "Size"): tuple,
            ("torch._utils", "_rebuild_tensor_v2"): _declared,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
            **{("torch", kind): _Storage(kind) for kind in ITEM_BYTES},
        }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._known[module, name]
        except KeyError:
            raise _NoCheckpoint(f"it contains {f'{module}.{name}'[:80]!r}, which is neither a tensor nor a plain value") from None

    def persistent_load(self, pid: Any) -> _Storage:
        word, storage, key, _, count = pid
        part = self._parts.get(f"{self._data_folder}{key}") if isinstance(key, str) else None
        if word != "storage" or not isinstance(storage, _Storage) or type(count) is not int or part is None:
            raise _NoCheckpoint("the data of a tensor is missing")
        if part != count * ITEM_BYTES[storage.kind]:
            raise _NoCheckpoint("the data of a tensor has another size than declared")
        return _Storage(storage.kind, count)

    def load_proto(self) -> None:
        """Accept only protocol 2, which torch writes; torch warns about others."""
        if self.read(1) != b"\2":  # type: ignore[attr-defined]
            raise _NoCheckpoint("it uses another pickle protocol than torch")

    def load_build(self) -> None:
        """Ignore attributes of a state dict, such as its version numbers."""
        self.stack.pop()
        if not isinstance(self.stack[-1], OrderedDict):
            raise _NoCheckpoint("it sets attributes of an object that is not a state dict")

    dispatch |= {pickle.PROTO[0]: load_proto, pickle.BUILD[0]: load_build}


def _declared(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> Declared:
    sizes = (offset, *shape, *stride)
    if not isinstance(storage, _Storage) or len(shape) != len(stride) or any(type(size) is not int or size < 0 for size in sizes):
        raise _NoCheckpoint("the shape of a tensor is invalid")
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if math.prod(shape) > storage.count or (math.prod(shape) and last >= storage.count):
        raise _NoCheckpoint("the declared shape of a tensor is larger than its data")
    return Declared(storage.kind, tuple(shape))


def _count(outline: Any) -> None:
    """Limit the number of values: a few bytes can describe a list of itself, or many nested lists."""
    waiting, seen = [outline], 0
    while waiting:
        value = waiting.pop()
        seen += 1
        if seen > MAX_PLAIN_VALUES or (isinstance(value, (str, bytes)) and len(value) > MAX_PLAIN_VALUES):
            raise _NoCheckpoint(f"it holds more than {MAX_PLAIN_VALUES} values")
        if isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            waiting += value
