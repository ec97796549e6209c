"""Retention of checkpoints, run folders that disappear, and two processes that train in the same one."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from ddpmctl.config import Config
from ddpmctl.data.source import DataSource
from ddpmctl.errors import UsageError
from ddpmctl.runs.folder import Run

from ..conftest import TINY, ddpmctl, load_tensors, train
from ..test_cli_errors import refused
from .tools import files_of, posix, training


@pytest.mark.slow
def test_keep_never_deletes_the_best_and_the_last(tmp_path: Path) -> None:
    folder = train(tmp_path, "--epochs", 6, "--keep", 1)
    left = {path.name for path in (folder / "checkpoints").iterdir()}
    run = Run(folder)
    best, latest = run.pointer("best"), run.pointer("latest")
    assert best is not None
    assert latest is not None
    assert {best.name, latest.name} <= left
    assert len(left) == len({best.name, latest.name}) + 1
    assert latest.name.startswith("epoch6_")


def test_what_keep_does_not_keep_is_deleted_on_resume_too(run: Path, tmp_path: Path) -> None:
    """As where the run was stopped between its last score and the deletion."""
    shutil.copytree(run, tmp_path / "r")
    stopped = Run(tmp_path / "r")
    spared = {stopped.pointer("best"), stopped.pointer("latest")}
    assert len(spared) < len(list(stopped.checkpoints.iterdir()))
    assert ddpmctl("train", "--resume", stopped.folder, "--keep", 0).exit_code == 0
    assert set(stopped.checkpoints.iterdir()) == spared


def test_checkpoints_after_the_state_are_not_counted_among_those_that_are_kept(run: Path, tmp_path: Path) -> None:
    """Their epochs are trained again, so that the end is the same as without a stop."""
    shutil.copytree(run, tmp_path / "r")
    copied = Run(tmp_path / "r")
    for file in copied.checkpoints.iterdir():
        file.unlink()
    for epoch in range(1, 6):
        (copied.checkpoints / f"epoch{epoch}_0.5_0.5.pth").touch()
    copied.point("best", copied.checkpoints / "epoch1_0.5_0.5.pth")
    copied.point("latest", copied.checkpoints / "epoch4_0.5_0.5.pth")
    copied.retain(1, until=4)
    assert sorted(int(file.name[5]) for file in copied.checkpoints.iterdir()) == [1, 3, 4, 5]


@pytest.mark.slow
@posix
@pytest.mark.parametrize("what", ["deleted", "moved", "replaced"])
def test_a_run_whose_folder_is_gone_ends_in_one_line_and_makes_no_other(what: str, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "r"
    with training(*TINY, "--epochs", 100_000, "--save-every", 100_000, "--scenes", 16, "--runs-dir", tmp_path, "--name", "r") as (process, stderr):
        folder.rename(tmp_path / "other")
        if what == "replaced":
            shutil.copytree(run, folder)
            (folder / ".lock").touch()
        elif what == "deleted":
            shutil.rmtree(tmp_path / "other")
        before = files_of(folder) if folder.exists() else None
        rest = stderr.read()
        assert process.wait(60) == 2, rest
    (line,) = [line for line in rest.splitlines() if line.startswith("error:")]
    assert line.startswith(f"error: {folder}: the run's folder was deleted, moved or replaced during training")
    assert (files_of(folder) if folder.exists() else None) == before
    assert folder.exists() == (what == "replaced")


@pytest.mark.parametrize("still_trains", [True, False])
def test_of_two_that_begin_a_run_with_exist_ok_one_trains_and_the_other_says_so_or_goes_on_with_it(tmp_path: Path, still_trains: bool) -> None:
    from ddpmctl.training.session import TrainingRequest, run_training

    config = Config().replace(width=8, timesteps=3, batch_size=8, epochs=1, precision="fp32", device="cpu", threads=1)
    request = TrainingRequest(config, source=DataSource(scenes=7 + still_trains), runs_dir=tmp_path, exist_ok=True)  # not in the cache yet
    late, early = run_training(request), run_training(request)
    assert type(next(late)).__name__ == "Progress"  # of rendering: it has found no run of this name
    assert not list(tmp_path.iterdir())
    for event in early:
        if still_trains and type(event).__name__ == "Prepared":
            break
    if still_trains:
        with pytest.raises(UsageError, match=f"process {os.getpid()} .* is training this run"):
            list(late)
    else:
        assert "exists already; resuming it" in " ".join(getattr(event, "text", "") for event in late)
    early.close()
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
@posix
def test_a_halted_trainer_keeps_its_lock_and_its_half_written_file(tmp_path: Path) -> None:
    """As by Ctrl-Z or a suspended machine, in the middle of a save."""
    folder = tmp_path / "r"
    often = [*TINY, "--minutes", 60, "--save-every", 100_000, "--checkpoint-minutes", 0.0001, "--scenes", 16]
    with training(*often, "--runs-dir", tmp_path, "--name", "r", until="epoch 2 ") as (process, stderr):
        for _ in range(200):
            while not (halted := list(folder.glob(".state.pt.*.tmp"))):
                time.sleep(0.0001)
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.05)
            if halted := list(folder.glob(".state.pt.*.tmp")):
                break
            process.send_signal(signal.SIGCONT)
        try:
            assert halted
            before = load_tensors(folder / "state.pt")[0]["counters"]["step"]
            assert f"process {process.pid}" in refused(2, "train", "--resume", folder)
            assert "running" in ddpmctl("show", folder, "-o", tmp_path / "s.png").stdout
            assert list(folder.glob(".state.pt.*.tmp")) == halted
        finally:
            process.send_signal(signal.SIGCONT)
            process.send_signal(signal.SIGTERM)
        rest = stderr.read()
        assert process.wait(60) == 143, rest
    assert load_tensors(folder / "state.pt")[0]["counters"]["step"] > before
    assert not list(folder.glob(".*.tmp"))


@pytest.mark.slow
@posix
def test_a_second_training_process_is_refused_and_the_lock_of_a_killed_one_is_released(tmp_path: Path) -> None:
    with training(*TINY, "--epochs", 100_000, "--save-every", 100_000, "--scenes", 16, "--runs-dir", tmp_path, "--name", "r") as (process, stderr):
        message = refused(2, "train", "--resume", tmp_path / "r")
        assert f"process {process.pid}" in message
        assert "is training this run" in message
        process.kill()
    (tmp_path / "r" / "checkpoints" / ".epoch1.pth.1-abc.tmp").write_bytes(b"half")
    for path in (tmp_path / "r").rglob("*"):  # modification times in the future
        os.utime(path, (time.time() + 10**7,) * 2)
    before = load_tensors(tmp_path / "r" / "state.pt")[0]["counters"]["step"]
    with training("--resume", tmp_path / "r", until="epoch ") as (process, stderr):
        process.send_signal(signal.SIGTERM)
        rest = stderr.read()
        assert process.wait(60) == 143
    assert "--resume" in rest
    assert not list((tmp_path / "r").rglob(".*.tmp"))
    assert load_tensors(tmp_path / "r" / "state.pt")[0]["counters"]["step"] > before
