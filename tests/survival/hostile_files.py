"""Checkpoints that are damaged or made to do harm."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable

import torch


def archive_of(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {entry.filename: archive.read(entry) for entry in archive.infolist()}


def packed(parts: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", how) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return out.getvalue()


def with_pickle(sound: bytes, content: bytes) -> bytes:
    parts = archive_of(sound)
    return packed({name: content if name.endswith("data.pkl") else data for name, data in parts.items()})


class Exploit:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.system, ("touch executed",)


def lists_of_lists(depth: int) -> bytes:
    """Ten references to ten references to ...: a few hundred bytes that would print as 10 ** depth."""
    value: list[object] = ["x"] * 10
    for _ in range(depth):
        value = [value] * 10
    return pickle.dumps({"format": "ddpmctl checkpoint 1", "config": {"model": {"width": value}}, "known": {}, "weights": {}}, protocol=2)


def declaring_more_values(sound: bytes) -> bytes:
    """A tensor that declares more values than the file has: torch would read beyond its memory."""
    pickled = archive_of(sound)["archive/data.pkl"]
    # The first storage's count and the tensor's shape are stored as integers; the bias of 8 values becomes one of 200.
    at = pickled.index(b"K\x08tq")
    return with_pickle(sound, pickled[:at] + b"K\xc8tq" + pickled[at + 4 :])


def with_directory_beyond_the_end(sound: bytes) -> bytes:
    end = bytearray(sound[-22:])
    struct.pack_into("<2H2L", end, 8, 65535, 65535, 0xFFFFFFF0, 0xFFFFFFF0)
    return sound[:-22] + bytes(end)


def of_another_width(sound: bytes) -> bytes:
    content = torch.load(io.BytesIO(sound), weights_only=True)
    content["config"]["model"]["width"] = 1024
    return saved(content)


def saved(content: object) -> bytes:
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()


def changed(sound: bytes, **changes: object) -> bytes:
    return saved({**torch.load(io.BytesIO(sound), weights_only=True), **changes})


def weights_of(sound: bytes) -> dict[str, torch.Tensor]:
    return torch.load(io.BytesIO(sound), weights_only=True)["weights"]  # type: ignore[no-any-return]


def whole_number(value: int) -> bytes:
    """A whole number of up to 255 bytes as a pickle opcode."""
    digits = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(digits)]) + digits


def colliding_keys(count: int) -> bytes:
    """A dict of numbers that all have the same hash."""
    return b"\x80\x02}(" + b"".join(whole_number(key * (2**61 - 1)) + b"N" for key in range(1, count)) + b"u."


def shape_of_large_numbers(count: int) -> bytes:
    """A tensor with many dimensions of 254 bytes each, whose product takes hours."""
    storage = b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\xd8tQK\x00"
    shape = b"(" + whole_number(2**2030) + b"q\x00" + b"h\x00" * count + b"t(" + b"K\x01" * (count + 1) + b"t"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n" + storage + shape + b"\x89NtR."


def zip_directory(entries: int) -> bytes:
    """An archive of empty parts whose directory has the right sizes and names; all entries are the same part."""
    name = b"archive/data.pkl"
    part = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 0, 0, 0, 0, len(name), 0) + name
    entry = struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, 0, 0, len(name), 0, 0, 0, 0, 0, 0) + name
    place, length = len(part), entries * len(entry)
    long = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, entries, entries, length, place) + struct.pack("<4sLQL", b"PK\6\7", 0, place + length, 1)
    return part + entry * entries + long + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)


class WithAttributes:
    """Pickled as an ``OrderedDict`` with attributes, which torch sets when it loads the file."""

    def __init__(self, weights: dict[str, torch.Tensor], attributes: dict[str, object]) -> None:
        self.weights, self.attributes = weights, attributes

    def __reduce__(self) -> tuple[object, ...]:
        return OrderedDict, (), self.attributes, None, iter(self.weights.items())


def with_score(accuracy: object) -> Callable[[bytes], bytes]:
    return lambda sound: changed(sound, known={"epoch": 2, "loss": 0.5, "scores": {"test": {"accuracy": accuracy}}})


def scaled(sound: bytes, factor: float, dtype: torch.dtype) -> bytes:
    return changed(sound, weights={name: value.to(dtype) * factor if value.is_floating_point() else value for name, value in weights_of(sound).items()})


def of_negative_variance(sound: bytes) -> bytes:
    return changed(sound, weights={name: -value if name.endswith("running_var") else value for name, value in weights_of(sound).items()})
