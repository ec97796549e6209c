"""Fixtures of the tests of failures."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddpmctl.data.dataset import Dataset, load_dataset

from .tools import result_of


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return result_of(load_dataset(None, scenes=5))  # 15 images: in batches of 4 the last of each epoch is smaller


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be damaged."""
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A mounted disk of eight megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small disk can be mounted by root on Linux only")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)
