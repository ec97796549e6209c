"""Fuzzing the readers of untrusted files (label files, checkpoints, entries of the cache), and the names of files on their way to tables and pages.

    python -m tests.benchmarks.fuzz manifest|checkpoint|cache|names [--minutes 10] [--seed 0]

Hypothesis draws mutations of valid files: of single bits and byte ranges, of the values in a JSON file, and of a checkpoint's pickle, repacked
with correct checksums so that the pickle reader is reached. Each file must load or be refused with a readable error within five seconds.
An entry of the cache must give what was cached, or be made anew. Names must leave the command line and pages without control characters, one row for
each. Failing examples are shrunk and printed.
"""

# ruff: noqa: PT017 - the messages of all errors are checked in the same way
from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from ddpmctl.checkpoints.format import load_checkpoint, save_checkpoint
from ddpmctl.cli.app import app
from ddpmctl.config import Config
from ddpmctl.data.cache import cached_images
from ddpmctl.data.folders import read_lab, scan_lab
from ddpmctl.errors import DdpmctlError, visible
from ddpmctl.evaluation.result_cache import load_results, save_results
from ddpmctl.evaluation.results import FileResults
from ddpmctl.labels import INDEX
from ddpmctl.progress import Notice, Progress
from ddpmctl.training.trainer import make_network

Fuzz = tuple[Callable[..., None], tuple[st.SearchStrategy[object], ...]]
EXAMPLES = {"manifest": 300, "checkpoint": 300, "cache": 300, "names": 10}  # between two checks of the time

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


def cache_fuzz(folder: Path) -> Fuzz:
    """Return the test of both caches, and what to draw for it: mutations anywhere, or in the headers and the directory, where most of them matter."""
    os.environ["DDPMCTL_CACHE_DIR"] = str(folder)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 3, 64, 64), dtype=np.uint8)
    conditions = (("red cube",), ("blue sphere", "red cube"))
    results = FileResults(conditions, rng.random((2, 3, 24), dtype=np.float32), images[:, None])

    def build() -> Generator[Progress, None, np.ndarray]:
        yield Progress("decoding", 0, 1)
        return images

    for _ in cached_images("k", 2, build):
        pass
    save_results("k", results)
    sound = {name: (folder / name).read_bytes() for name in ("k.npy", "k.json", "results/k.npz")}

    def test(name: str, mutations: list[tuple[float, str, bytes]], part: str) -> None:
        for each, content in sound.items():
            (folder / each).write_bytes(content)
        whole = sound[name]
        first, last = {"all": (0, len(whole)), "start": (0, 400), "second array": (len(whole) // 70, len(whole) // 70 + 400), "end": (-300, len(whole))}[part]
        first, last = first % len(whole), min(last, len(whole))
        (folder / name).write_bytes(whole[:first] + mutated(whole[first:last], mutations) + whole[last:])
        kept = load_results("k", conditions)
        assert kept is None or (np.array_equal(kept.images, results.images) and np.array_equal(kept.probabilities, results.probabilities))
        events, found = finished(cached_images("k", 2, build))
        assert np.array_equal(found.images, images)
        notices = [event.text for event in events if isinstance(event, Notice)]
        assert all("is rebuilt" in text and text.isprintable() for text in notices)
        assert bool(notices) == any(isinstance(event, Progress) for event in events)

    return test, (st.sampled_from(sorted(sound)), MUTATIONS, st.sampled_from(("all", "start", "second array", "end")))


def finished(events: Generator[Any, None, Any]) -> tuple[list[Any], Any]:
    """Return what a task yielded, and its result."""
    seen = []
    while True:
        try:
            seen.append(next(events))
        except StopIteration as stop:
            return seen, stop.value


PIECES = (
    b"\x1b[31m", b"\x1b]0;title\x07", b"\n", b"\r", b"\t", b"\x7f", b"\xe9", b"\xff", b"\xc2\x9b31m", b"\xc2\x85", "\u202e".encode(), "\u200f".encode(),
    "\u2028".encode(), "\u200b".encode(), "\ufeff".encode(), "日本".encode(), "e\u0301".encode(), "مرحبا".encode(), "😀".encode(), b"$x^$", b"$", b"\\",
    b"[bold]", b"[", b"{{ 7 }}", b"<b>", b"&", b"%", b"#", b"'", b'"', b" ", b"-", b"~", b"*", b"?", b"=", b",", b"a" * 100, b"epoch5_0.5_0.5",
)  # fmt: skip
NAMES = st.lists(st.sampled_from(PIECES) | st.binary(min_size=1, max_size=4), min_size=1, max_size=5).map(
    lambda parts: b"".join(parts).replace(b"/", b"|").replace(b"\0", b"0")[:250].strip(b".") or b"x"
)


def names_fuzz(folder: Path) -> Fuzz:
    """Return the test of names of checkpoints, runs and images in tables, errors and pages, and what to draw for it."""
    os.environ["DDPMCTL_CACHE_DIR"] = str(folder / "cache")
    runner, place = CliRunner(), os.fsencode(folder)
    (folder / "mine.json").write_text('[["red cube"]]')
    tiny = ["--width", 8, "--timesteps", 2, "--batch-size", 8, "--save-every", 1, "--epochs", 1, "--threads", 1]
    made = runner.invoke(app, list(map(str, ["train", *tiny, "--scenes", 2, "--runs-dir", folder / "runs", "--name", "plain"])))
    assert made.exit_code == 0, made.output
    (checkpoint,) = (folder / "runs" / "plain" / "checkpoints").glob("*.pth")

    def call(code: int, *arguments: object) -> str:
        result = runner.invoke(app, list(map(str, arguments)))
        assert result.exit_code == code, result.output
        for line in result.output.splitlines():
            assert line.isprintable(), line
        return str(result.stdout)

    def test(names: list[bytes]) -> None:
        for each in (b"odd", b"odd-runs", b"images"):
            shutil.rmtree(place + b"/" + each, ignore_errors=True)
            os.mkdir(place + b"/" + each)
        for name in names:
            shutil.copy(checkpoint, place + b"/odd/" + name + b".pth")
            shutil.copytree(folder / "runs" / "plain", os.fsdecode(place + b"/odd-runs/" + name))
            with open(place + b"/images/" + name + b".png", "wb") as file:
                file.write(b"no image")
        page = folder / "page.html"
        call(0, "evaluate", folder / "odd", "--conditions", folder / "mine.json", "--html", page, "--csv", folder / "x.csv", "--latex", folder / "x.tex")
        for file in (page, folder / "x.tex"):
            assert all(line.isprintable() for line in file.read_text(encoding="utf-8").split("\n"))
        table = call(0, "runs", "--runs-dir", folder / "odd-runs").split("\n")
        for name in names:
            shown = visible(os.fsdecode(name))
            assert sum(line.startswith(f"{shown} ") for line in table) >= 1, shown
        call(0, "show", os.fsdecode(place + b"/odd-runs/" + names[0]), "--html", page, "-o", folder / "x.png")
        assert all(line.isprintable() for line in page.read_text(encoding="utf-8").split("\n"))
        call(0, "compare", "--recorded", *(os.fsdecode(place + b"/odd-runs/" + name) for name in names), folder / "runs" / "plain", "-o", folder / "x.png")
        call(3, "evaluate", "--images", folder / "images", "--conditions", folder / "mine.json")

    return test, (st.lists(NAMES, min_size=1, max_size=10, unique=True),)


def main() -> int:
    """Fuzz until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", choices=tuple(EXAMPLES))
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    given_ = parser.parse_args()
    start, examples, number, many = time.perf_counter(), 0, given_.seed, EXAMPLES[given_.reader]
    with tempfile.TemporaryDirectory() as folder:
        readers = {"manifest": manifest_fuzz, "checkpoint": checkpoint_fuzz, "cache": cache_fuzz, "names": names_fuzz}
        test, drawn = readers[given_.reader](Path(folder))
        deadline = None if given_.reader == "names" else 5000  # of one example in milliseconds; names go through five commands
        around = settings(max_examples=many, deadline=deadline, database=None, suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink))
        while time.perf_counter() - start < 60 * given_.minutes:
            seed(number)(around(given(*drawn)(test)))()
            examples, number = examples + many, number + 1
    minutes = (time.perf_counter() - start) / 60
    print(f"{given_.reader}: {examples:,} examples in {minutes:.1f} minutes, seeds {given_.seed} to {number - 1}: each as promised")
    return 0


if __name__ == "__main__":
    sys.exit(main())
