"""A small folder in the lab's layout, a separate cache for each test, and functions to load it."""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddpmctl.data.dataset import Dataset, load_dataset
from ddpmctl.errors import DataError
from ddpmctl.iclevr import INDEX

TRAIN = {"CLEVR_train_000000_0.png": ["red cube"], "CLEVR_train_000000_1.png": ["red cube", "blue sphere"], "CLEVR_train_000001_0.png": ["cyan cylinder"]}

SWAPPED = {**INDEX, "red cube": 2, "blue cube": 1}

posix = pytest.mark.skipif(os.name != "posix", reason="Windows makes no pipes, and links only for administrators")


def finish(events: Generator[Any, None, Any]) -> tuple[list[Any], Any]:
    seen = []
    while True:
        try:
            seen.append(next(events))
        except StopIteration as stop:
            return seen, stop.value


def load(folder: Path | None, **settings: Any) -> Dataset:
    """Return the data with the images in memory: a test may damage the file that they are mapped from."""
    data = finish(load_dataset(folder, **settings))[1]
    return replace(data, images=np.array(data.images))


def make_image(index: int, size: tuple[int, int] = (80, 60)) -> Image.Image:
    pixels = np.random.default_rng(index).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def make_folder(folder: Path, *, place: str = "iclevr") -> Path:
    (folder / place).mkdir(parents=True, exist_ok=True)
    write_json(folder / "objects.json", INDEX)
    write_json(folder / "train.json", TRAIN)
    write_json(folder / "test.json", [["red cube"], ["gray cube", "red cube"]])
    write_json(folder / "new_test.json", [["blue sphere", "red cube"]])
    for index, name in enumerate(TRAIN):
        make_image(index).save(folder / place / name)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DDPMCTL_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "lab")


def problem_of(folder: Path) -> str:
    """Return the one-line error for an invalid folder, from both load functions if images do not matter."""
    with pytest.raises(DataError) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def entry(cache: Path) -> Path:
    (path,) = cache.glob("*.npy")
    return path


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
