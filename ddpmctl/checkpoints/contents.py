"""The table of contents of a tensor file, read by a restricted unpickler: shapes and plain values, no tensors and no code."""

from __future__ import annotations

import math
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any, ClassVar

MAX_PICKLE_BYTES = 8 * 2**20  # 25,000 tensors need about 4 MiB
MAX_STEPS = 1_000_000  # opcodes of a pickle; a tensor needs about 35, and one opcode makes up to 100 bytes, here and again in torch
MAX_PLAIN_VALUES = 1_000_000
MAX_DEPTH = 50  # of containers in each other
MAX_DIMENSIONS = 64  # as in torch
LARGEST_KEY = 2**31  # of a dict; larger numbers can be chosen so that all have the same hash, which takes hours
ITEM_BYTES = {
    "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2,
    "LongStorage": 8, "IntStorage": 4, "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1,
}  # fmt: skip


class NotACheckpointError(Exception):
    """The file is not a valid checkpoint; the message says why."""


@dataclass(frozen=True)
class Declared:
    """A tensor as a file describes it.

    Attributes:
        kind: the storage type, such as "FloatStorage".
        stride: as in torch, in items.
        part: the part of the archive that holds the items.
        offset: the place of the first item in it.
    """

    kind: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    part: str
    offset: int


@dataclass(frozen=True)
class _Storage:
    kind: str
    part: str = ""
    count: int = 0


def read_contents(pickled: bytes, parts: Mapping[str, int], data_folder: str) -> Any:
    """Return the content of a tensor file, with a ``Declared`` for each tensor.

    Args:
        pickled: the table of contents, at most ``MAX_PICKLE_BYTES``.
        parts: the sizes of the archive's parts, in bytes.
        data_folder: where in the archive the items of tensors are.

    Raises:
        NotACheckpointError: it is no table of contents, or is too large. Damaged bytes can raise any other exception too.
    """
    contents = _Unpickler(pickled, parts, data_folder).load()
    _count(contents)
    return contents


# The opcodes that torch uses. Opcodes that allocate much memory from a few bytes (BYTEARRAY8, LONG4) are excluded.
OPCODES = (
    "PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BUILD", "BINPERSID", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET",
    "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING",
    "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS",
)  # fmt: skip


def _counted(load: Callable[[_Unpickler], None]) -> Callable[[_Unpickler], None]:
    """Return an opcode's function that also counts it: in lists and dicts, a few megabytes of opcodes would need gigabytes."""

    def step(unpickler: _Unpickler) -> None:
        unpickler.steps += 1
        if unpickler.steps > MAX_STEPS:
            raise NotACheckpointError(f"its table of contents has over {MAX_STEPS} steps")
        load(unpickler)

    return step


# The Python unpickler: the C one allocates memory for any memo index in the file.
class _Unpickler(pickle._Unpickler):
    """An unpickler that creates no tensors and calls only the functions listed in ``_known``."""

    dispatch: ClassVar[dict[int, Any]] = {code: pickle._Unpickler.dispatch[code] for code in (getattr(pickle, name)[0] for name in OPCODES)}
    stack: list[Any]
    steps = 0

    def __init__(self, data: bytes, parts: Mapping[str, int], data_folder: str) -> None:
        super().__init__(BytesIO(data))
        self._parts, self._data_folder = parts, data_folder
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
            raise NotACheckpointError(f"it contains {f'{module}.{name}'[:80]!r}, which is neither a tensor nor a plain value") from None

    def persistent_load(self, pid: Any) -> _Storage:
        word, storage, key, _, count = pid
        part = f"{self._data_folder}{key}" if isinstance(key, str) else ""
        if word != "storage" or not isinstance(storage, _Storage) or type(count) is not int or part not in self._parts:
            raise NotACheckpointError("the data of a tensor is missing")
        if self._parts[part] != count * ITEM_BYTES[storage.kind]:
            raise NotACheckpointError("the data of a tensor has another size than declared")
        return _Storage(storage.kind, part, count)

    def load_proto(self) -> None:
        """Accept only protocol 2, which torch writes; torch warns about others."""
        if self.read(1) != b"\2":  # type: ignore[attr-defined]
            raise NotACheckpointError("it uses another pickle protocol than torch")

    def load_build(self) -> None:
        """Ignore attributes of a state dict, such as its version numbers; ``TensorFile.load`` removes those that torch sets."""
        self.stack.pop()
        if not isinstance(self.stack[-1], OrderedDict):
            raise NotACheckpointError("it sets attributes of an object that is not a state dict")

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
    """Refuse keys that take long to hash. Hashing a deeply nested tuple even overflows Python's stack."""
    if not all(key is None or isinstance(key, str) or (isinstance(key, int) and abs(key) < LARGEST_KEY) for key in keys):
        raise NotACheckpointError("it has a key that is neither text nor a small number")


def _state_dict() -> OrderedDict[Any, Any]:
    """Return an empty state dict; torch adds the items afterwards, so that ``_check_keys`` sees their keys."""
    return OrderedDict()


def _size(sizes: Any) -> tuple[int, ...]:
    if not isinstance(sizes, (tuple, list)) or len(sizes) > MAX_DIMENSIONS:
        raise NotACheckpointError("the shape of a tensor is invalid")
    return tuple(sizes)


def _declared(storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any = False, hooks: Any = None, *more: Any) -> Declared:  # noqa: FBT002
    if hooks or more:
        raise NotACheckpointError("it sets attributes of a tensor")
    sizes = (offset, *_size(shape), *_size(stride))
    if not isinstance(storage, _Storage) or len(shape) != len(stride) or any(type(size) is not int or not 0 <= size < 2**63 for size in sizes):
        raise NotACheckpointError("the shape of a tensor is invalid")
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if math.prod(shape) > storage.count or (math.prod(shape) and last >= storage.count):
        raise NotACheckpointError("the declared shape of a tensor is larger than its data")
    return Declared(storage.kind, tuple(shape), tuple(stride), storage.part, offset)


def _count(contents: Any) -> None:
    """Limit the number of values and their depth: a few bytes can describe a list of itself, or many nested lists."""
    level, seen = [contents], 1
    for _ in range(MAX_DEPTH):
        level, containers = [], level
        for value in containers:
            inner = _inner(value)
            seen += len(inner)
            if seen > MAX_PLAIN_VALUES or (isinstance(value, (str, bytes)) and len(value) > MAX_PLAIN_VALUES):
                raise NotACheckpointError(f"it holds more than {MAX_PLAIN_VALUES} values")
            level += inner
        if not level:
            return
    raise NotACheckpointError(f"its values are nested more than {MAX_DEPTH} deep")


def _inner(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return list(value) if isinstance(value, (list, tuple)) else []
