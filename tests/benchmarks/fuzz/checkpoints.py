"""Checkpoints: of each, it must load or be refused with a readable error, within five seconds of processor time and 1 GiB of memory."""

# ruff: noqa: PT017 - the messages of all errors are checked in the same way
from __future__ import annotations

import io
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from ddpmctl.checkpoints.format import load_checkpoint, save_checkpoint
from ddpmctl.config import Config
from ddpmctl.device import make_compute_device
from ddpmctl.errors import DdpmctlError
from ddpmctl.evaluation.evaluate import pipeline_for
from ddpmctl.sampling.pipeline import sample_batch
from ddpmctl.sampling.requests import Batch, requests_for
from ddpmctl.training.trainer import make_network
from tests.benchmarks.data import finish

from .limits import in_time
from .mutations import MUTATIONS, VALUES, Fuzz, mutated, repacked

# Changes of a checkpoint's content: attributes of its containers, the precision and scale of its weights, and what training recorded.
NUMBERS = st.floats() | st.integers() | st.sampled_from((10**400, -(10**400), 2**63, 1e300, float("nan"), float("inf")))
CONTENTS = st.fixed_dictionaries(
    {},
    optional={
        "attributes": st.dictionaries(
            st.sampled_from(("items", "keys", "values", "copy", "get", "pop", "_metadata", "__class__", "__len__")) | st.text(max_size=8),
            VALUES | st.just({"": {"assign_to_params_buffers": True}}),
            max_size=3,
        ),
        "of": st.sampled_from(("weights", "config", "known", "whole")),
        "dtype": st.sampled_from((torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int32)),
        "factor": st.sampled_from((1.0, -1.0, 0.0, 3e37, 1e300, float("nan"), float("inf"))),
        "one": st.floats(0, 1, exclude_max=True),  # only this weight, as a share of all
        "known": st.dictionaries(
            st.sampled_from(("epoch", "loss", "scores", "step")),
            NUMBERS | VALUES | st.dictionaries(st.text(max_size=5), st.fixed_dictionaries({"accuracy": NUMBERS})),
            max_size=3,
        ),
        "config": st.dictionaries(st.sampled_from(sorted(Config().flat())), NUMBERS | VALUES, max_size=2),
    },
)  # fmt: skip
# Opcodes that make, copy, nest, name and call, each repeated up to some millions of times.
PIECES = (
    b"]", b"}", b")", b"(", b"N", b"K\x01", b"\x85", b"\x86", b"q\x00", b"h\x00", b"a", b"e", b"t", b"s", b"u", b"b", b"R", b"Q", b"}q\x00",
    b"]q\x00(", b"h\x00h\x00", b"ccollections\nOrderedDict\n", b"ctorch\nSize\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n",
    b"X\x07\x00\x00\x00storage", b"X\x01\x00\x00\x000",
    b"\x8a\x09\xff\xff\xff\xff\xff\xff\xff\x7f\x00", b"\x8a\xfe" + b"\x7f" * 254, b"\x8a\xfe" + b"\x7f" * 254 + b"q\x00", b"\x89", b"0",
)  # fmt: skip
OPCODES = st.lists(st.tuples(st.sampled_from(PIECES), st.sampled_from((1, 1, 1, 1, 2, 30, 1000, 100_000, 2_000_000))), min_size=1, max_size=20)
# Entries of a zip directory with right checksums: (part, name, shift of its place), how often each, and changes of the end records.
DIRECTORIES = st.tuples(
    st.lists(st.tuples(st.integers(0, 200), st.booleans(), st.sampled_from((0, 0, 0, 1, 30, -30)), st.sampled_from((1, 1, 1, 2, 1000, 300_000)))),
    st.dictionaries(st.integers(0, 97), st.integers(0, 255), max_size=3),
)


class WithAttributes:
    """Pickled as an ``OrderedDict`` with attributes."""

    def __init__(self, content: dict[Any, Any], attributes: dict[str, object]) -> None:
        self.content, self.attributes = content, attributes

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), self.attributes, None, iter(self.content.items())


def with_content(sound: bytes, how: dict[str, Any]) -> bytes:
    """Return a checkpoint with changed content; see ``CONTENTS``."""
    content = torch.load(io.BytesIO(sound), weights_only=True)
    names = [name for name, value in content["weights"].items() if value.is_floating_point()]
    for name in names if "one" not in how else names[int(how["one"] * len(names)) :][:1]:
        content["weights"][name] = (content["weights"][name].double() * how.get("factor", 1.0)).to(how.get("dtype", torch.float32))
    content["known"] |= how.get("known", {})
    content["config"]["model"] |= how.get("config", {})
    if attributes := how.get("attributes"):
        part = how.get("of", "weights")
        content = WithAttributes(content, attributes) if part == "whole" else {**content, part: WithAttributes(content[part], attributes)}
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()


def with_directory(sound: bytes, entries: list[tuple[int, bool, int, int]], changes: dict[int, int]) -> bytes:
    """Return a checkpoint with further entries in its zip directory; see ``DIRECTORIES``."""
    with zipfile.ZipFile(io.BytesIO(sound)) as archive:
        parts, start = archive.infolist(), archive.start_dir
    directory = sound[start : start + sum(46 + len(part.filename) for part in parts)]
    for index, renamed, shift, count in entries:
        part = parts[index % len(parts)]
        name = part.filename.encode() + b"x" * renamed
        place = max(0, part.header_offset + shift)
        fixed = (part.create_version, 20, 0, 0, 0, 0, part.CRC, part.file_size, part.file_size, len(name), 0, 0, 0, 0, 0, place)
        directory += (struct.pack("<4s6H3L5H2L", b"PK\1\2", *fixed) + name) * count
    number, end = len(parts) + sum(entry[3] for entry in entries), start + len(directory)
    ends = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, number, number, len(directory), start) + struct.pack("<4sLQL", b"PK\6\7", 0, end, 1)
    ends += struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, min(number, 0xFFFF), min(number, 0xFFFF), len(directory), start, 0)
    return sound[:start] + directory + bytes(changes.get(at, byte) for at, byte in enumerate(ends))


def checkpoint_fuzz(folder: Path) -> Fuzz:
    """Return the test of the checkpoint reader, and what to draw for it.

    A file that loads is also sampled from, and the images must be finite or refused.
    """
    config = Config().replace(width=8, timesteps=3, precision="fp32", device="cpu", threads=1)
    save_checkpoint(folder / "sound.pth", config, make_network(config).state_dict(), epoch=3, loss=0.5, scores={})
    sound, file = (folder / "sound.pth").read_bytes(), folder / "epoch3_0.5_0.5.pth"
    compute = make_compute_device(config.device)

    def test(what: tuple[str, Any]) -> None:
        kind, how = what
        match kind:
            case "bytes":
                file.write_bytes(mutated(sound, how))
            case "pickle":
                file.write_bytes(repacked(sound, lambda pickled: mutated(pickled, how)))
            case "opcodes":
                file.write_bytes(repacked(sound, lambda _: b"\x80\x02" + opcodes(how) + b"."))
            case "content":
                file.write_bytes(with_content(sound, how))
            case "directory":
                file.write_bytes(with_directory(sound, *how))
        try:
            with in_time():
                pipeline = pipeline_for(load_checkpoint(file), {}, compute)
            if kind == "content":
                assert torch.isfinite(finish(sample_batch(pipeline, Batch(requests_for("x", [("red cube",)], seed=0), 0, 1)))[0]).all()
        except DdpmctlError as error:
            assert str(error).startswith((str(file), "--"))  # a setting of the file that does not fit its network is named by its flag
            assert "\n" not in str(error)
            assert len(str(error)) < 2000

    drawn = (("bytes", MUTATIONS), ("pickle", MUTATIONS), ("opcodes", OPCODES), ("content", CONTENTS), ("directory", DIRECTORIES))
    return test, (st.one_of([st.tuples(st.just(kind), how) for kind, how in drawn]),)


def opcodes(pieces: list[tuple[bytes, int]]) -> bytes:
    """Return repeated opcodes, together as many as a checkpoint may have."""
    return b"".join(piece * min(count, 8_000_000 // len(piece)) for piece, count in pieces)[:8_000_000]
