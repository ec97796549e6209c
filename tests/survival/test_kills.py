"""A killed run ends with what an undisturbed one ends with (the full count is a benchmark: ``tests/benchmarks/survival.py``)."""

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
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole(tmp_path_factory.mktemp("whole"), EPOCHS)


@pytest.mark.parametrize(("number", "kills"), [(signal.SIGKILL, 3), (signal.SIGTERM, 1)])
def test_a_run_killed_again_and_again_ends_as_one_that_was_left_alone(number: signal.Signals, kills: int, undisturbed: Path, tmp_path: Path) -> None:
    run, tally = killed(tmp_path, EPOCHS, kills, number, random.Random(7))
    assert tally.kills == kills
    assert differences(undisturbed, run) == []


def test_what_counts_as_a_difference(undisturbed: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(undisturbed, tmp_path / "r")
    assert differences(undisturbed, tmp_path / "r") == []
    with (tmp_path / "r" / "metrics.jsonl").open("a") as file:
        file.write("{}\n")
    assert differences(undisturbed, tmp_path / "r") == ["metrics.jsonl"]
