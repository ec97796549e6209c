"""The number of threads, and other settings on which the last bits of a resumed run depend."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ddpmctl.runs.folder import Run

from ..conftest import TINY, ddpmctl, load_tensors, train
from .kills import _flat


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Set the number of threads that torch decides on, as on a machine with so many cores."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def one_core() -> Iterator[Callable[[], None]]:
    """Let this thread use one core, until the test ends."""
    before = os.sched_getaffinity(0)
    yield lambda: os.sched_setaffinity(0, {min(before)})
    os.sched_setaffinity(0, before)


several_cores = pytest.mark.skipif(not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two cores, on Linux")


OPEN = ["--threads", "none", "--device", "cpu"]


@several_cores
@pytest.mark.parametrize("again", [["--resume"], ["--exist-ok", "resume"]])
def test_a_run_keeps_the_number_of_threads_with_which_it_began(again: list[str], threads: Callable[[int], None], tmp_path: Path) -> None:
    threads(2)
    command = [*TINY, *OPEN, "--scenes", 4, "--epochs", 1, "--runs-dir", tmp_path, "--name", "r"]
    assert "cpu (2 threads)" in ddpmctl("train", *command).stderr
    assert Run(tmp_path / "r").config().device.threads == 2
    threads(1)
    result = ddpmctl("train", "--resume", tmp_path / "r") if again == ["--resume"] else ddpmctl("train", *command, *again)
    assert result.exit_code == 0, result.output
    assert "cpu (2 threads)" in result.stderr
    assert "last bits" not in result.stderr


@several_cores
def test_a_run_that_goes_on_where_torch_would_take_other_threads_ends_with_the_same_bytes(threads: Callable[[int], None], tmp_path: Path) -> None:
    threads(2)
    whole = train(tmp_path / "whole", *OPEN, "--epochs", 2)
    begun = train(tmp_path / "begun", *OPEN, "--epochs", 1)
    threads(1)
    assert ddpmctl("train", "--resume", begun, "--epochs", 2, "--override", "epochs").exit_code == 0
    states = [_flat({name: load_tensors(run / "state.pt")[0][name] for name in ("net", "optimizers")}) for run in (whole, begun)]
    assert states[0] == states[1]


@several_cores
def test_fewer_cores_than_the_run_has_threads_are_named(threads: Callable[[int], None], one_core: Callable[[], None], tmp_path: Path) -> None:
    run = train(tmp_path, "--threads", 2, "--device", "cpu", "--epochs", 1)
    one_core()
    threads(1)
    resume = ["train", "--resume", run, "--epochs", 2, "--override", "epochs"]
    result = ddpmctl(*resume)
    assert "cpu (1 thread)" in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if "last bits" in line]
    assert "threads 1 instead of threads 2 (this machine has cores for 1 in each process)" in line
    assert Run(run).config().device.threads == 2  # for a machine with more cores
    assert "cpu (2 threads)" in ddpmctl(*resume[:3], "--threads", 2).stderr


@pytest.mark.parametrize(
    ("given", "words"), [(["--micro-batch", 3], "micro-batch 3 instead of micro-batch none"), (["--threads", 2], "threads 2 instead of threads 1")]
)
def test_settings_that_change_the_last_bits_of_a_resumed_run_are_named(given: list[str], words: str, copy: Path, threads: Callable[[int], None]) -> None:
    result = ddpmctl("train", "--resume", copy, "--epochs", 3, "--override", "epochs", *given)
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.stderr.splitlines() if "last bits" in line]
    assert words in line
    assert "last bits" not in ddpmctl("train", "--resume", copy, "--epochs", 4, "--override", "epochs").stderr


def test_a_run_that_recorded_no_threads_goes_on_with_those_of_torch(copy: Path, threads: Callable[[int], None]) -> None:
    """As the runs of earlier versions."""
    file = copy / "config.toml"
    file.write_text(file.read_text().replace("threads = 1", 'threads = "none"'))
    threads(2)
    result = ddpmctl("train", "--resume", copy, "--epochs", 3, "--override", "epochs", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "cpu (2 threads)" in result.stderr
    assert "last bits" not in result.stderr
    assert Run(copy).config().device.threads is None
