"""Fuzzing the readers of untrusted files: label files, checkpoints, and run folders.

    python -m tests.benchmarks.fuzz manifest|checkpoint|run [--minutes 10] [--seed 0]

Hypothesis draws mutations of valid files: of single bits and byte ranges, of the values in a JSON file, and of a checkpoint's pickle, repacked
with correct checksums so that the pickle reader is reached. It also draws checkpoints with other content (attributes of containers, precision
and scale of weights, recorded numbers), other opcodes, and other zip directories. Each file must load or be refused with a readable error,
within five seconds of processor time and 1 GiB of memory.
In a run folder, files and folders are replaced by links, pipes, devices, huge, deep and damaged files; each command must work or be refused
in one line, within five seconds (training: a minute) more than on a sound run, and leave what lies outside of the folder as it is.
Failing examples are shrunk and printed.
"""

# ruff: noqa: PT017 - the messages of all errors are checked in the same way
from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import signal
import socket
import stat
import struct
import sys
import tempfile
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from ddpmctl.checkpoints.format import load_checkpoint, save_checkpoint
from ddpmctl.config import Config
from ddpmctl.data.folders import read_lab, scan_lab
from ddpmctl.device import make_compute_device
from ddpmctl.errors import DdpmctlError
from ddpmctl.evaluation.evaluate import pipeline_for
from ddpmctl.labels import INDEX
from ddpmctl.sampling.pipeline import Batch, requests_for, sample_batch
from ddpmctl.training.trainer import make_network

from .data import finish

Fuzz = tuple[Callable[..., None], tuple[st.SearchStrategy[object], ...]]
EXAMPLES = 300  # between two checks of the time
SECONDS = 5  # of processor time for one file, so that other work on the machine does not matter

# One mutation: where (a share of the length), what, and how long.
MUTATIONS = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from(("flip", "set", "cut", "insert", "copy", "end")), st.binary(min_size=1, max_size=12)),
    min_size=1,
    max_size=6,
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12) | st.sampled_from(sorted(INDEX)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | st.sampled_from(sorted(INDEX)), inner, max_size=4),
    max_leaves=12,
)


def mutated(data: bytes, mutations: list[tuple[float, str, bytes]]) -> bytes:
    """Return the bytes after some mutations."""
    for place, kind, with_ in mutations:
        at = int(place * len(data))
        match kind:
            case "flip":
                data = data[:at] + bytes([data[at] ^ 1 << with_[0] % 8] if data else []) + data[at + 1 :]
            case "set":
                data = data[:at] + with_ + data[at + len(with_) :]
            case "cut":
                data = data[:at] + data[at + 1 + with_[0] :]
            case "insert":
                data = data[:at] + with_ + data[at:]
            case "copy":
                data = data[:at] + data[at : at + 50 * with_[0]] + data[at:]
            case "end":
                data = data[:at]
    return data


def repacked(data: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """Return an archive with a changed pickle and correct checksums."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            new.writestr(entry.filename, change(content) if entry.filename.endswith("data.pkl") else content)
    return out.getvalue()


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


@contextmanager
def in_time() -> Iterator[None]:
    """Check that the body takes less than ``SECONDS`` of processor time."""
    start = time.process_time()
    yield
    assert time.process_time() - start < SECONDS


def limit_memory(more: int) -> None:
    """Limit this process's address space to ``more`` bytes than it has now, where the system can; beyond it, a reader fails with a MemoryError."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        import resource

        size = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + more, size + more))


def manifest_fuzz(folder: Path) -> Fuzz:
    """Return the test of the reader of label files, and what to draw for it."""
    sound: dict[str, object] = {
        "objects.json": INDEX,
        "train.json": {f"CLEVR_train_00000{i}_0.png": ["red cube", "blue sphere"] for i in range(5)},
        "test.json": [["red cube"], ["gray cylinder", "blue sphere"]],
        "new_test.json": [["red cube"]],
        "heldout.json": [["cyan cube"]],
    }

    def test(name: str, mutations: list[tuple[float, str, bytes]], value: object) -> None:
        for each, content in sound.items():
            (folder / each).write_text(json.dumps(content), encoding="utf-8")
        (folder / name).write_bytes(mutated(json.dumps(sound[name]).encode(), mutations) if value is None else json.dumps(value).encode())
        with in_time():
            _, problems = scan_lab(folder)
        try:
            read_lab(folder)
            assert not problems
        except DdpmctlError as error:
            assert problems
            assert "\n" not in str(error)
            assert str(error).isprintable()

    return test, (st.sampled_from(sorted(sound)), MUTATIONS, st.none() | VALUES)


# What takes the place of a file or folder of a run.
STRANGE = st.one_of(
    st.sampled_from(
        ("link", "dangling", "link to a folder", "loop", "pipe", "socket", "device", "folder", "full folder", "nothing", "empty", "huge", "closed")
    ),
    st.tuples(st.just("deep"), st.integers(1, 200_000), st.sampled_from("[{(")),
    st.tuples(st.just("json"), VALUES),
    st.tuples(st.just("lines"), st.lists(VALUES, max_size=4)),
    st.tuples(st.just("text"), st.text(max_size=60)),
    st.tuples(st.just("mutated"), MUTATIONS),
    st.tuples(st.just("pointer"), st.text(max_size=20) | st.sampled_from(("../x.pth", "/etc/passwd", "a" * 5000, "a\0b", "..", "", "\x1b[2J"))),
)
RUN_FILES = (
    "config.toml", "data.json", "metrics.jsonl", "timing.jsonl", "results.csv", "curves.png", "state.pt", "diagnosis.json", ".lock", ".holder", "best.json",
    "latest.json", "checkpoints", "checkpoints/abandoned", "samples", "tensorboard", "CHECKPOINT", "GRID", "checkpoints/x.pth", ".x.tmp", "checkpoints/.x.tmp",
    "samples/.x.tmp",
)  # fmt: skip
ODD_NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1, max_size=40).filter(lambda name: name not in (".", ".."))
EXTRA_SECONDS = {"resume": 60, "train": 60}  # beside the usual time; 5 for other commands. Changed settings may name a larger network


def run_fuzz(folder: Path) -> Fuzz:
    """Return the test of commands on a run whose files are replaced, and what to draw for it."""
    from tests.conftest import TINY, ddpmctl

    made = ddpmctl("train", *TINY, "--epochs", 1, "--scenes", 4, "--runs-dir", folder / "sound", "--name", "r")
    assert made.exit_code == 0, made.output
    sound, run, outside, out = folder / "sound" / "r", folder / "runs" / "r", folder / "outside", folder / "out"
    places = {
        "CHECKPOINT": next((sound / "checkpoints").glob("*.pth")).relative_to(sound),
        "GRID": next((sound / "samples").glob("*_test.png")).relative_to(sound),
    }
    longer = ("--override", "epochs", "--epochs", 2)
    commands: dict[str, tuple[object, ...]] = {
        "show": ("show", run, "-o", out / "show.png"),
        "runs": ("runs", "--runs-dir", folder / "runs"),
        "sample": ("sample", run, "--labels", "red cube", "-o", out),
        "evaluate": ("evaluate", run),
        "resume": ("train", "--resume", run),
        "train": ("train", "--resume", run, *longer),
        "rm": ("runs", "rm", "--yes", run),
    }
    usual = {}
    for name, arguments in commands.items():
        shutil.rmtree(run.parent, ignore_errors=True)
        shutil.copytree(sound, run)
        start = time.perf_counter()
        assert ddpmctl(*arguments).exit_code == 0
        usual[name] = time.perf_counter() - start

    def test(name: str, changes: list[tuple[str, object]], odd: list[str]) -> None:
        for place in (run.parent, outside, out):
            shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(sound, run)
        (outside / "folder").mkdir(parents=True)
        for file in (outside / "file", outside / "folder" / ".x.tmp", outside / "folder" / "epoch9_0.5_0.5.pth"):
            file.write_bytes(b"precious")
        for place, strange in changes:
            _replace(run / places.get(place, place), strange, outside)
        for each in odd:
            with suppress(OSError):
                (run / "checkpoints" / f"{each}.pth").write_bytes(b"x")
        before = _tree(outside)
        with _within(usual[name] + EXTRA_SECONDS.get(name, 5)):
            result = ddpmctl(*commands[name])
        lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
        assert result.exit_code in (0, 2, 3), (result.exit_code, result.output)
        assert len(lines) == (result.exit_code != 0), result.output
        assert all("unexpected" not in line for line in lines), lines
        assert _tree(outside) == before
        assert {path.name for path in folder.iterdir()} <= {"sound", "runs", "outside", "out"}
        assert {path.name for path in run.parent.iterdir()} <= {"r"}

    return test, (
        st.sampled_from(sorted(commands)),
        st.lists(st.tuples(st.sampled_from(RUN_FILES), STRANGE), min_size=1, max_size=3),
        st.lists(ODD_NAMES, max_size=2),
    )


def _replace(place: Path, strange: object, outside: Path) -> None:
    """Put something strange in the place of a file or folder."""
    kind, *values = strange if isinstance(strange, tuple) else (strange,)
    before = place.open("rb").read(2**22) if place.is_file() and not place.is_symlink() else b"x"
    with suppress(OSError):
        shutil.rmtree(place) if place.is_dir() and not place.is_symlink() else place.unlink()
    with suppress(OSError, UnicodeEncodeError):
        match kind:
            case "link" | "dangling":
                place.symlink_to(outside / ("file" if kind == "link" else "none"))
            case "link to a folder":
                place.symlink_to(outside / "folder")
            case "loop":
                place.symlink_to(place)
            case "pipe":
                os.mkfifo(place)
            case "socket":
                with socket.socket(socket.AF_UNIX) as one:
                    one.bind(str(place))
            case "device":
                os.mknod(place, 0o600 | stat.S_IFCHR, os.makedev(1, 5))  # /dev/zero
            case "folder" | "full folder":
                place.mkdir()
                if kind == "full folder":
                    (place / "x").write_bytes(b"x")
            case "empty" | "huge" | "closed":
                place.touch()
                if kind == "huge":
                    os.truncate(place, 2**42)
                if kind == "closed":
                    place.chmod(0)
            case "deep":
                place.write_text(values[1] * values[0])
            case "json":
                place.write_text(json.dumps(values[0]), encoding="utf-8")
            case "lines":
                rows = [{"event": "epoch", "epoch": 1, "step": 1, "loss": 1, **(value if isinstance(value, dict) else {"loss": value})} for value in values[0]]
                place.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
            case "text":
                place.write_text(values[0], encoding="utf-8")
            case "mutated":
                place.write_bytes(mutated(before, values[0]))
            case "pointer":
                place.write_text(json.dumps({"checkpoint": f"checkpoints/{values[0]}"}), encoding="utf-8")


def _tree(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(path): (path.read_bytes() if path.is_file() else b"", path.lstat().st_mtime_ns) for path in sorted(folder.rglob("*"))}


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Raise where the body takes longer, also where it waits for a pipe."""

    def late(number: int, frame: object) -> None:
        raise TimeoutError(f"it took more than {seconds:.0f} seconds")

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def main() -> int:
    """Fuzz until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", choices=("manifest", "checkpoint", "run"))
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    given_ = parser.parse_args()
    start, examples, number = time.perf_counter(), 0, given_.seed
    with tempfile.TemporaryDirectory() as folder:
        test, drawn = {"manifest": manifest_fuzz, "checkpoint": checkpoint_fuzz, "run": run_fuzz}[given_.reader](Path(folder))
        limit_memory(2**30)
        around = settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink))
        while time.perf_counter() - start < 60 * given_.minutes:
            seed(number)(around(given(*drawn)(test)))()
            examples, number = examples + EXAMPLES, number + 1
    minutes = (time.perf_counter() - start) / 60
    print(f"{given_.reader}: {examples:,} examples in {minutes:.1f} minutes, seeds {given_.seed} to {number - 1}: each loaded or was refused")
    return 0


if __name__ == "__main__":
    sys.exit(main())
