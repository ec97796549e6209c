"""Fuzzing the readers of untrusted files: label files and checkpoints.

    python -m tests.benchmarks.fuzz manifest|checkpoint [--minutes 10] [--seed 0]

Hypothesis draws mutations of valid files: of single bits and byte ranges, of the values in a JSON file, and of a checkpoint's pickle, repacked
with correct checksums so that the pickle reader is reached. Each file must load or be refused with a readable error within five seconds.
Failing examples are shrunk and printed.
"""

# ruff: noqa: PT017 - the messages of all errors are checked in the same way
from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
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


def main() -> int:
    """Fuzz until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", choices=("manifest", "checkpoint"))
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    given_ = parser.parse_args()
    start, examples, number = time.perf_counter(), 0, given_.seed
    with tempfile.TemporaryDirectory() as folder:
        test, drawn = {"manifest": manifest_fuzz, "checkpoint": checkpoint_fuzz}[given_.reader](Path(folder))
        around = settings(max_examples=EXAMPLES, deadline=5000, database=None, suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink))
        while time.perf_counter() - start < 60 * given_.minutes:
            seed(number)(around(given(*drawn)(test)))()
            examples, number = examples + EXAMPLES, number + 1
    minutes = (time.perf_counter() - start) / 60
    print(f"{given_.reader}: {examples:,} files in {minutes:.1f} minutes, seeds {given_.seed} to {number - 1}: each loaded or was refused")
    return 0


if __name__ == "__main__":
    sys.exit(main())
