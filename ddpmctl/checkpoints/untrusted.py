"""Safe loading of untrusted tensor files: no code execution, and no more memory than the file's size.

``torch.load(weights_only=True)`` runs no code, but it unpacks compressed parts, allocates memory before shapes can be checked, and
does not verify checksums. So the archive is checked first: the size of its directory, no compression, no overlapping parts, the CRC32
of every part. A restricted unpickler then reads shapes and sizes without creating tensors, and compares them with the parts.
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

from ddpmctl.errors import DataError, UsageError, limit_reached, out_of_memory

if TYPE_CHECKING:
    from torch import nn

MAX_PARTS = 100_000
MAX_DIRECTORY_BYTES = 80 * MAX_PARTS  # an entry of torch has about 65 bytes; zipfile needs about ten times as much memory
MAX_PICKLE_BYTES = 8 * 2**20  # 25,000 tensors need about 4 MiB
MAX_STEPS = 1_000_000  # opcodes of a pickle; a tensor needs about 35, and one opcode makes up to 100 bytes, here and again in torch
MAX_PLAIN_VALUES = 1_000_000
MAX_DEPTH = 50  # of containers in each other
MAX_DIMENSIONS = 64  # as in torch
LARGEST_KEY = 2**31  # of a dict; larger numbers can be chosen so that all have the same hash, which takes hours
END = struct.Struct("<4s4H2LH")  # zip end record: signature, disks, entries, size and offset of the directory, length of the comment
END64 = struct.Struct("<4sQ2H2L4Q")  # its zip64 record: signature, own size, versions, disks, entries, size and offset of the directory
LOCATOR = struct.Struct("<4sLQL")  # between the two: signature, disk, offset of the zip64 record, disks
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
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would block
            raise DataError(f"{path}: is not a regular file")
        file = open(path, "rb")  # noqa: SIM115 - closed below
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such file") from None
    except OSError as error:
        raise limit_reached(error) or DataError(f"{path}: cannot be read ({error.strerror})") from None
    with file:
        yield checked(file, str(path))


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
                raise _NoCheckpoint(TWO_DIRECTORIES)
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
        if out_of_memory(error):
            raise
        raise DataError(f"{name}: is not a checkpoint, or is damaged ({type(error).__name__})") from None


TWO_DIRECTORIES = "it has two zip directories"


def _directory(file: BinaryIO, size: int) -> tuple[int, int]:
    """Return the number of parts and the offset of the zip directory, which must be followed by its end records and the end of the file."""
    if size < END.size:
        raise _NoCheckpoint("it is empty" if size == 0 else "it is too short")
    at = size - END.size
    signature, _, _, *values, comment = _read(file, END, at)
    if signature != b"PK\5\6" or comment:
        raise _NoCheckpoint("its end is missing, or torch before 1.6 wrote it: save it again with a newer torch")
    if at >= LOCATOR.size + END64.size and (locator := _read(file, LOCATOR, at - LOCATOR.size))[0] == b"PK\6\7":
        at -= LOCATOR.size + END64.size
        found, _, _, _, _, _, *long = _read(file, END64, at)
        short = zip(values, long, (0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF), strict=True)
        if found != b"PK\6\6" or locator[2] != at or any(value not in (other, maximum) for value, other, maximum in short):
            raise _NoCheckpoint(TWO_DIRECTORIES)
        values = long
    here, entries, length, start = values
    if here != entries or start + length != at:
        raise _NoCheckpoint(TWO_DIRECTORIES)
    if entries > MAX_PARTS or length > MAX_DIRECTORY_BYTES:
        raise _NoCheckpoint(f"it has over {MAX_PARTS} parts")
    return entries, start


def _read(file: BinaryIO, record: struct.Struct, place: int) -> tuple[Any, ...]:
    file.seek(place)
    return record.unpack(file.read(record.size))


def _parts(archive: zipfile.ZipFile, size: int) -> dict[str, int]:
    """Return the sizes of the parts in bytes; refuse compressed or overlapping parts."""
    entries = archive.infolist()
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
    "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS",
)  # fmt: skip


def _counted(load: Callable[[_Outline], None]) -> Callable[[_Outline], None]:
    """Return an opcode's function that also counts it: in lists and dicts, a few megabytes of opcodes would need gigabytes."""

    def step(outline: _Outline) -> None:
        outline.steps += 1
        if outline.steps > MAX_STEPS:
            raise _NoCheckpoint(f"its table of contents has over {MAX_STEPS} steps")
        load(outline)

    return step


# The Python unpickler: the C one allocates memory for any memo index in the file.
class _Outline(pickle._Unpickler):
    """An unpickler that creates no tensors and calls only the functions listed in ``_known``."""

    dispatch: ClassVar[dict[int, Any]] = {code: pickle._Unpickler.dispatch[code] for code in (getattr(pickle, name)[0] for name in OPCODES)}
    stack: list[Any]
    steps = 0

    def __init__(self, data: bytes, parts: dict[str, int]) -> None:
        super().__init__(BytesIO(data))
        self._parts, self._data_folder = parts, f"{_root(parts)}/data/"
        self._known: dict[tuple[str, str], Callable[..., Any] | _Storage] = {
            ("collections", "OrderedDict"): _state_dict,
            ("torch", "Size"): _size,
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
        """Ignore attributes of a state dict, such as its version numbers; ``_plain`` removes those that torch sets."""
        self.stack.pop()
        if not isinstance(self.stack[-1], OrderedDict):
            raise _NoCheckpoint("it sets attributes of an object that is not a state dict")

    def load_setitem(self) -> None:
        """Set an item of a dict, after a check of its key."""
        _check_keys(self.stack[-2:-1])
        pickle._Unpickler.load_setitem(self)  # type: ignore[attr-defined]

    def load_setitems(self) -> None:
        """Set items of a dict, keys and values in turn, after a check of the keys."""
        _check_keys(self.stack[::2])
        pickle._Unpickler.load_setitems(self)  # type: ignore[attr-defined]

    dispatch |= {pickle.PROTO[0]: load_proto, pickle.BUILD[0]: load_build, pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems}
    dispatch = {code: _counted(load) for code, load in dispatch.items()}


def _check_keys(keys: list[Any]) -> None:
    """Accept only keys whose hash is found in a moment: of a tuple in a million tuples, Python's stack overflows."""
    if not all(key is None or isinstance(key, str) or (isinstance(key, int) and abs(key) < LARGEST_KEY) for key in keys):
        raise _NoCheckpoint("it has a key that is neither text nor a small number")


def _state_dict() -> OrderedDict[Any, Any]:
    """Return an empty state dict; torch adds the items afterwards, so that ``_check_keys`` sees their keys."""
    return OrderedDict()


def _size(sizes: Any) -> tuple[int, ...]:
    if not isinstance(sizes, (tuple, list)) or len(sizes) > MAX_DIMENSIONS:
        raise _NoCheckpoint("the shape of a tensor is invalid")
    return tuple(sizes)


def _declared(storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any = False, hooks: Any = None, *more: Any) -> Declared:  # noqa: FBT002
    if hooks or more:
        raise _NoCheckpoint("it sets attributes of a tensor")
    sizes = (offset, *_size(shape), *_size(stride))
    if not isinstance(storage, _Storage) or len(shape) != len(stride) or any(type(size) is not int or not 0 <= size < 2**63 for size in sizes):
        raise _NoCheckpoint("the shape of a tensor is invalid")
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if math.prod(shape) > storage.count or (math.prod(shape) and last >= storage.count):
        raise _NoCheckpoint("the declared shape of a tensor is larger than its data")
    return Declared(storage.kind, tuple(shape))


def _count(outline: Any) -> None:
    """Limit the number of values and their depth: a few bytes can describe a list of itself, or many nested lists."""
    level, seen = [outline], 1
    for _ in range(MAX_DEPTH):
        level, containers = [], level
        for value in containers:
            inner = _inner(value)
            seen += len(inner)
            if seen > MAX_PLAIN_VALUES or (isinstance(value, (str, bytes)) and len(value) > MAX_PLAIN_VALUES):
                raise _NoCheckpoint(f"it holds more than {MAX_PLAIN_VALUES} values")
            level += inner
        if not level:
            return
    raise _NoCheckpoint(f"its values are nested more than {MAX_DEPTH} deep")


def _inner(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return list(value) if isinstance(value, (list, tuple)) else []


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
