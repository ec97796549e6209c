"""Full and read-only disks."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from ddpmctl.checkpoints.format import load_checkpoint
from ddpmctl.errors import UsageError

from ..conftest import TINY, ddpmctl, load_tensors
from ..test_cli_errors import refused
from .tools import posix, training


def test_a_run_that_does_not_fit_on_the_disk_is_refused_before_it_starts(small_disk: Path) -> None:
    line = refused(2, "train", *TINY, "--epochs", 500, "--scenes", 4, "--runs-dir", small_disk / "runs")
    assert "500 checkpoints" in line
    assert "--keep" in line
    assert "free" in line
    assert not (small_disk / "runs").exists()


@pytest.mark.slow
@posix
def test_a_full_disk_loses_nothing_and_the_run_resumes_after_space_is_freed(small_disk: Path) -> None:
    command = [*TINY, "--minutes", 10, "--scenes", 4, "--keep", 0, "--runs-dir", small_disk, "--name", "r"]
    with training(*command, until="epoch 2 ") as (process, stderr):
        with (small_disk / "ballast").open("wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(4096)):
                pass
        rest = stderr.read()
        assert process.wait(60) == 2
    assert "make room" in rest
    assert "Traceback" not in rest
    step = load_tensors(small_disk / "r" / "state.pt")[0]["counters"]["step"]
    assert step > 0
    for file in (small_disk / "r" / "checkpoints").iterdir():
        load_checkpoint(file)
    (small_disk / "ballast").unlink()
    with training("--resume", small_disk / "r", until="epoch ") as (process, stderr):
        process.send_signal(signal.SIGTERM)
        stderr.read()
        assert process.wait(60) == 143
    assert load_tensors(small_disk / "r" / "state.pt")[0]["counters"]["step"] > step
    epochs = [m["epoch"] for m in map(json.loads, (small_disk / "r" / "metrics.jsonl").read_text().splitlines()) if m["event"] == "epoch"]
    assert epochs == list(range(1, len(epochs) + 1))


@pytest.mark.parametrize("inodes", [3, 9, 11, 14, 17])
def test_a_disk_on_which_no_more_files_fit_loses_nothing(inodes: int, small_disk: Path, run: Path) -> None:
    """Files are made in this order: the run's folder, the state, the log, the checkpoint, the grids, the pointers."""
    subprocess.run(["mount", "-o", f"remount,nr_inodes={inodes}", str(small_disk)], check=True)
    command = ("train", *TINY, "--epochs", 2, "--scenes", 4, "--runs-dir", small_disk / "runs", "--name", "r")
    assert "no inodes" in refused(2, *command)
    subprocess.run(["mount", "-o", "remount,nr_inodes=1000", str(small_disk)], check=True)
    assert not list(small_disk.rglob("*.tmp"))
    result = ddpmctl(*command, "--exist-ok", "resume")
    assert result.exit_code == 0, result.output
    folder = small_disk / "runs" / "r"
    assert (folder / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {path.name for path in (run / "checkpoints").iterdir()}
    assert len((folder / "results.csv").read_text().splitlines()) == 3


def test_a_write_to_a_full_disk_keeps_the_old_file(small_disk: Path) -> None:
    from ddpmctl.files import write_verified

    write_verified(small_disk / "x", b"old")
    with pytest.raises(UsageError, match="make room"):
        write_verified(small_disk / "x", bytes(9_000_000))
    (small_disk / "ballast").write_bytes(bytes(max(0, shutil.disk_usage(small_disk).free - 8192)))
    with pytest.raises(UsageError, match="make room"):
        write_verified(small_disk / "x", bytes(10_000))
    assert (small_disk / "x").read_bytes() == b"old"
    assert sorted(path.name for path in small_disk.iterdir()) == ["ballast", "x"]


def test_a_read_only_disk_is_refused(small_disk: Path, run: Path) -> None:
    shutil.copytree(run, small_disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert "run" in refused(2, "train", "--resume", small_disk / "run")
    assert "--runs-dir" in refused(2, "train", *TINY, "--epochs", 1, "--scenes", 1, "--runs-dir", small_disk)
    assert "--out" in refused(2, "sample", small_disk / "run", "--labels", "red cube", "-o", small_disk / "out")
