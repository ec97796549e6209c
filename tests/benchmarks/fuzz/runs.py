"""Run folders, in which files and folders are replaced by links, pipes, devices, huge, deep and damaged files.

Each command must work or be refused in one line, within five seconds of processor time (training: a minute) more than on a sound run, must
not wait for ever, and must leave what lies outside of the folder as it is.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hypothesis import strategies as st

from .mutations import MUTATIONS, VALUES, Fuzz, mutated

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
EXTRA_SECONDS = {"resume": 60, "train": 60}  # of processor time, beside the usual; 5 for other commands. Changed settings may name a larger network


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
        start = time.process_time()
        assert ddpmctl(*arguments).exit_code == 0
        usual[name] = time.process_time() - start

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
        limit, start = usual[name] + EXTRA_SECONDS.get(name, 5), time.process_time()
        with within(10 * limit):  # by the clock, for a command that waits
            result = ddpmctl(*commands[name])
        assert time.process_time() - start < limit
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
def within(seconds: float) -> Iterator[None]:
    """Raise where the body takes longer, also where it waits for a pipe."""

    def late(number: int, frame: object) -> None:
        raise TimeoutError(f"it took more than {seconds:.0f} seconds")

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
