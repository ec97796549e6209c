"""A killed and resumed run equals an uninterrupted one (with more kills: ``tests/benchmarks/survival.py``)."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest

from .kills import differences, killed, whole

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX")]
EPOCHS = 15


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole(tmp_path_factory.mktemp("whole"), EPOCHS)


@pytest.mark.parametrize(("number", "kills"), [(signal.SIGKILL, 3), (signal.SIGTERM, 1)])
def test_a_repeatedly_killed_run_equals_an_uninterrupted_one(number: signal.Signals, kills: int, uninterrupted: Path, tmp_path: Path) -> None:
    run, tally = killed(tmp_path, EPOCHS, kills, number, random.Random(7))
    assert tally.kills == kills
    assert differences(uninterrupted, run) == []


def test_a_changed_file_is_a_difference(uninterrupted: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(uninterrupted, tmp_path / "r")
    assert differences(uninterrupted, tmp_path / "r") == []
    with (tmp_path / "r" / "metrics.jsonl").open("a") as file:
        file.write("{}\n")
    assert differences(uninterrupted, tmp_path / "r") == ["metrics.jsonl"]
