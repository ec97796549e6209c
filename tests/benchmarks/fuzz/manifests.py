"""Label files: each must be read, or refused with a readable error."""

# ruff: noqa: PT017 - the messages of all errors are checked in the same way
from __future__ import annotations

import json
from pathlib import Path

from hypothesis import strategies as st

from ddpmctl.data.folders import read_lab, scan_lab
from ddpmctl.errors import DdpmctlError
from ddpmctl.iclevr import INDEX

from .limits import in_time
from .mutations import MUTATIONS, VALUES, Fuzz, mutated


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
