"""Run folders from unknown sources: links, pipes and strange pointers are refused in one line, and nothing outside of the folder is touched."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ..conftest import ddpmctl
from ..test_cli_errors import refused
from .tools import edited

pytestmark = pytest.mark.skipif(os.name != "posix", reason="links and pipes are POSIX")
SMALL = ("config.toml", "data.json", "best.json", "latest.json", ".holder")
LOGS = ("metrics.jsonl", "timing.jsonl", "results.csv")
FILES = (*SMALL, *LOGS, "state.pt", "curves.png", "diagnosis.json", ".lock")
FOLDERS = ("checkpoints", "checkpoints/abandoned", "samples", "tensorboard")
LONGER = ("--epochs", 3, "--override", "epochs")


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fail where the body takes longer, also where it waits for a pipe."""

    def late(number: int, frame: object) -> None:
        raise AssertionError(f"it took more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.fixture
def hostile(run: Path, tmp_path: Path) -> Path:
    """A run whose log is empty, as its state says."""
    shutil.copytree(run, tmp_path / "runs" / "r")
    edited(tmp_path / "runs" / "r" / "state.pt", log=dict.fromkeys(LOGS, 0))
    return tmp_path / "runs" / "r"


@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
def test_a_run_with_a_link_is_refused_and_what_the_link_points_to_stays(name: str, hostile: Path, tmp_path: Path) -> None:
    place, outside = hostile / name, tmp_path / "outside"
    outside.mkdir()
    target = outside / "target"
    if place.exists():
        place.rename(target)
    elif name in FOLDERS:
        target.mkdir()
    else:
        target.write_text("precious")
    if name in FOLDERS:
        (target / ".precious.tmp").write_text("precious")
    place.symlink_to(target)
    before, inside = tree(outside), tree(hostile)
    assert f"{place}: is a symbolic link" in refused(3, "train", "--resume", hostile, *LONGER)
    assert f"{place}: is a symbolic link" in refused(3, "show", hostile, "-o", tmp_path / "s.png")
    assert tree(outside) == before
    assert tree(hostile) == inside


@pytest.mark.parametrize("name", FILES)
def test_a_run_with_a_pipe_is_refused_and_does_not_block(name: str, hostile: Path, tmp_path: Path) -> None:
    (hostile / name).unlink(missing_ok=True)
    os.mkfifo(hostile / name)
    with within(20):
        for command in (("train", "--resume", hostile), ("show", hostile, "-o", tmp_path / "s.png")):
            assert f"{hostile / name}: is not a regular file" in refused(3, *command)
        assert "broken: r: " in ddpmctl("runs", "--runs-dir", hostile.parent).stdout


def test_logs_with_other_names_are_not_changed(hostile: Path, tmp_path: Path) -> None:
    """A copy made of hard links, as by ``cp -al``, shares its files with the run."""
    other = tmp_path / "metrics.jsonl"
    os.link(hostile / "metrics.jsonl", other)
    before = other.read_bytes()
    assert f"{hostile / 'metrics.jsonl'}: is a hard link" in refused(3, "train", "--resume", hostile, *LONGER)
    assert other.read_bytes() == before


def test_a_small_file_that_is_huge_is_refused(hostile: Path, tmp_path: Path) -> None:
    for name in (*SMALL, *LOGS):
        kept = hostile.with_name("kept")
        shutil.copytree(hostile, kept)
        (kept / name).touch()
        os.truncate(kept / name, 2**40)  # without blocks on the disk
        with within(20):
            assert f"{kept / name}: is too large (1099.5 GB)" in refused(3, "show", kept, "-o", tmp_path / "s.png")
        shutil.rmtree(kept)


def test_a_hostile_run_can_be_removed_and_its_targets_stay(hostile: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / ".precious.tmp").write_text("precious")
    (outside / "file").write_text("precious")
    shutil.rmtree(hostile / "samples")
    (hostile / "samples").symlink_to(outside)
    (hostile / ".holder").symlink_to(outside / "file")
    before = tree(outside)
    result = ddpmctl("runs", "rm", "--yes", hostile)
    assert result.exit_code == 0, result.output
    assert not hostile.exists()
    assert tree(outside) == before


@pytest.mark.parametrize("where", ["the run", "the folder of runs"])
def test_a_run_that_is_reached_through_a_link_is_used_as_any_other(where: str, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "disk" / "runs" / "r")
    if where == "the run":
        (tmp_path / "runs").mkdir()
        (tmp_path / "runs" / "r").symlink_to(tmp_path / "disk" / "runs" / "r")
    else:
        (tmp_path / "runs").symlink_to(tmp_path / "disk" / "runs")
    result = ddpmctl("train", "--resume", tmp_path / "runs" / "r", *LONGER)
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "disk" / "runs" / "r" / "checkpoints").glob("*.pth"))) == 3
    assert ddpmctl("show", "r", "--runs-dir", tmp_path / "runs", "-o", tmp_path / "s.png").exit_code == 0


POINTERS = {
    "nested": "[" * 100_000,
    "no object": "[1]",
    "a number": '{"checkpoint": 1}',
    "a long name": json.dumps({"checkpoint": f"checkpoints/{'x' * 5000}.pth"}),
    "a name with a zero byte": json.dumps({"checkpoint": "checkpoints/a\0.pth"}),
    "half a character": '{"checkpoint": "checkpoints/\\ud800.pth"}',
    "outside": '{"checkpoint": "../other.pth"}',
    "outside, through checkpoints": '{"checkpoint": "checkpoints/../../other.pth"}',
    "a link in checkpoints": '{"checkpoint": "checkpoints/link.pth"}',
    "huge": json.dumps({"checkpoint": "checkpoints/x.pth", "more": "x" * 2**21}),
}


@pytest.mark.parametrize("kind", [*POINTERS, "a pipe", "absolute"])
def test_a_pointer_leads_to_a_checkpoint_of_its_run_or_nowhere(kind: str, hostile: Path, tmp_path: Path) -> None:
    (best,) = (hostile / json.loads((hostile / "best.json").read_text())["checkpoint"],)
    other = hostile.parent / "other.pth"
    shutil.copy(best, other)
    (hostile / "checkpoints" / "link.pth").symlink_to(other)
    (hostile / "best.json").unlink()
    if kind == "a pipe":
        os.mkfifo(hostile / "best.json")
    else:
        (hostile / "best.json").write_text(POINTERS.get(kind) or json.dumps({"checkpoint": str(other)}))
    sample = ("sample", hostile, "--labels", "red cube", "-o", tmp_path / "out")
    with within(30):
        result = ddpmctl(*sample)
        assert result.exit_code == 0, result.output
        assert "(the run's latest)" in result.stderr
        (hostile / "latest.json").unlink()
        assert f"{hostile}: is not a run with a checkpoint" in refused(2, *sample)


@pytest.mark.parametrize("command", [("show",), ("evaluate",), ("sample", "-l", "red cube"), ("train", "--resume")])
def test_a_name_that_no_file_can_have_is_refused(command: tuple[str, ...], tmp_path: Path) -> None:
    assert "there is no such file or folder" in refused(2, *command, "x" * 5000, "--runs-dir", tmp_path)


def test_a_score_names_no_file_outside_of_the_run(hostile: Path, tmp_path: Path) -> None:
    rows = (hostile / "results.csv").read_text().splitlines()
    (hostile.parent / "other.pth").write_bytes(b"")
    for name in ("../../other.pth", str(hostile.parent / "other.pth"), "x" * 5000 + ".pth"):
        (hostile / "results.csv").write_text("\n".join([rows[0], *(row.rpartition(",")[0] + f",{name}" for row in rows[1:])]) + "\n")
        result = ddpmctl("show", hostile, "-o", tmp_path / "s.png")
        assert result.exit_code == 0, result.output
        assert "checkpoint: " not in result.stdout


def test_a_sample_grid_that_is_no_image_is_left_out(hostile: Path, tmp_path: Path) -> None:
    for file in (hostile / "samples").iterdir():
        file.write_bytes(b"no image")
    result = ddpmctl("show", hostile, "-o", tmp_path / "s.png", "--html", tmp_path / "s.html")
    assert result.exit_code == 0, result.output
