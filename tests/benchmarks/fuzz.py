"""Fuzzing the readers of untrusted files: label files, checkpoints, and run folders.

    python -m tests.benchmarks.fuzz manifest|checkpoint|run [--minutes 10] [--seed 0]

Hypothesis draws mutations of valid files: of single bits and byte ranges, of the values in a JSON file, and of a checkpoint's pickle, repacked
with correct checksums so that the pickle reader is reached. Each file must load or be refused with a readable error within five seconds.
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
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from ddpmctl.checkpoints.format import load_checkpoint, save_checkpoint
from ddpmctl.config import Config
from ddpmctl.data.folders import read_lab, scan_lab
from ddpmctl.errors import DdpmctlError
from ddpmctl.labels import INDEX
from ddpmctl.training.trainer import make_network

Fuzz = tuple[Callable[..., None], tuple[st.SearchStrategy[object], ...]]
EXAMPLES = 300  # between two checks of the time

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


def checkpoint_fuzz(folder: Path) -> Fuzz:
    """Return the test of the checkpoint reader, and what to draw for it."""
    config = Config().replace(width=8, timesteps=6)
    save_checkpoint(folder / "sound.pth", config, make_network(config).state_dict(), epoch=3, loss=0.5, scores={})
    sound, file = (folder / "sound.pth").read_bytes(), folder / "epoch3_0.5_0.5.pth"

    def test(mutations: list[tuple[float, str, bytes]], inside: bool) -> None:
        file.write_bytes(repacked(sound, lambda pickled: mutated(pickled, mutations)) if inside else mutated(sound, mutations))
        try:
            load_checkpoint(file).network()
        except DdpmctlError as error:
            assert str(error).startswith(str(file))
            assert "\n" not in str(error)

    return test, (MUTATIONS, st.booleans())


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
        around = settings(
            max_examples=EXAMPLES,
            deadline=5000 if given_.reader != "run" else None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
        )
        while time.perf_counter() - start < 60 * given_.minutes:
            seed(number)(around(given(*drawn)(test)))()
            examples, number = examples + EXAMPLES, number + 1
    minutes = (time.perf_counter() - start) / 60
    print(f"{given_.reader}: {examples:,} examples in {minutes:.1f} minutes, seeds {given_.seed} to {number - 1}: each loaded or was refused")
    return 0


if __name__ == "__main__":
    sys.exit(main())
