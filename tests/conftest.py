"""Shared fixtures: a separate cache, and one small trained run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner, Result

from ddpmctl.checkpoints.untrusted import open_tensors
from ddpmctl.cli.app import app

from .browser import CHROMIUM

settings.register_profile("no deadline", deadline=None)  # by default, an example of more than 0.2 s fails
settings.load_profile("no deadline")

# The report's network and recipe at a size that trains in a second.
TINY = ["--width", "8", "--timesteps", "3", "--batch-size", "8", "--precision", "fp32", "--threads", "1", "--save-every", "1"]


@pytest.fixture(scope="session", autouse=True)
def _clean_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Isolate the tests from the user's cache and settings."""
    kept = {name: value for name, value in os.environ.items() if (name.startswith("DDPMCTL_") and name != "DDPMCTL_ICLEVR") or name == "COLUMNS"}
    for name in kept:
        del os.environ[name]
    os.environ["DDPMCTL_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["DDPMCTL_CACHE_DIR"]
    os.environ.update(kept)


def ddpmctl(*arguments: object) -> Result:
    """Run the command line in this process; stdout and stderr are separate."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def train(runs: Path, *arguments: object, scenes: int = 4) -> Path:
    """Train a tiny run through the command line and return its folder."""
    before = set(runs.glob("*"))
    result = ddpmctl("train", *TINY, "--scenes", scenes, "--runs-dir", runs, *arguments)
    assert result.exit_code == 0, result.output
    (made,) = set(runs.glob("*")) - before
    return made


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two epochs; tests must not change it."""
    return train(tmp_path_factory.mktemp("shared"), "--epochs", 2)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium without a window; see ``tests/browser.py``."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser test needs the package playwright (see .ci/run)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def load_tensors(path: Path) -> tuple[Any, str]:
    """Return a file's content and its sha256."""
    with open_tensors(path) as file:
        return file.load(), file.sha256


def size(path: Path) -> tuple[int, int]:
    """Return an image's width and height in pixels."""
    with Image.open(path) as image:
        return image.size


def batch(count: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return images, multi-hot labels and times in (0, 1) for a network."""
    rng = torch.Generator().manual_seed(seed)
    labels = (torch.rand((count, 24), generator=rng) < 0.3).float()
    return torch.randn((count, 3, 64, 64), generator=rng), labels, torch.linspace(0.2, 0.9, count)
