"""The model that comes with the package: used where there is no run, and by name."""

from __future__ import annotations

from pathlib import Path

import pytest

import ddpmctl as package
from ddpmctl.checkpoints.exported import open_checkpoint
from ddpmctl.checkpoints.format import load_checkpoint
from ddpmctl.checkpoints.names import PRETRAINED, WEIGHTS
from ddpmctl.iclevr import ICLEVR

from .conftest import TINY, ddpmctl, train

FEW = ("--sampler", "ddim", "--steps", 2, "--particles", 1)


def test_it_is_small_and_says_what_it_is() -> None:
    assert (PRETRAINED / WEIGHTS).stat().st_size <= 8e6
    checkpoint = load_checkpoint(PRETRAINED / WEIGHTS)
    assert checkpoint.task == ICLEVR
    assert checkpoint.config.sampling.particles > 1
    card = (PRETRAINED / "README.md").read_text(encoding="utf-8")
    with open_checkpoint(PRETRAINED / WEIGHTS) as file:
        assert file.sha256 in card, "the card is that of these weights"
    assert "accuracy on new_test" in card


def test_sample_takes_it_before_any_training_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    first = ddpmctl("sample", "--labels", "red cube", *FEW, "--runs-dir", tmp_path / "runs", "--out", tmp_path / "a")
    assert first.exit_code == 0, first.stderr
    assert f"checkpoint: pretrained (it comes with ddpmctl; {tmp_path / 'runs'}/ has no run with a checkpoint)" in first.stderr
    train(tmp_path / "runs", "--epochs", 1)
    second = ddpmctl("sample", "--labels", "red cube", *FEW[:-2], "--runs-dir", tmp_path / "runs", "--out", tmp_path / "b")
    assert second.exit_code == 0, second.stderr
    assert "the newest run's" in second.stderr
    assert "comes with ddpmctl" not in second.stderr


def test_a_folder_of_runs_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for command in (("sample", "-l", "red cube"), ("evaluate",), ("export",)):
        refused = ddpmctl(*command, "--runs-dir", tmp_path / "rusn")
        assert refused.exit_code == 2
        assert f"--runs-dir: there is no folder {tmp_path / 'rusn'}; train first" in refused.stderr


def test_tables_call_it_pretrained(tmp_path: Path) -> None:
    done = ddpmctl("evaluate", *FEW, "--conditions", "test", "--runs-dir", tmp_path)
    assert done.exit_code == 0, done.stderr
    assert "pretrained" in done.stdout
    assert str(PRETRAINED) not in done.stdout


@pytest.mark.parametrize("command", [("denoise-grid", "-l", "red cube", "--columns", 2, "--out"), ("sample", "-l", "red cube", "--out")])
def test_its_name_is_pretrained(command: tuple[object, ...], tmp_path: Path) -> None:
    name, *arguments = command
    done = ddpmctl(name, "pretrained", *FEW, *arguments, tmp_path / ("a.png" if name == "denoise-grid" else "a"))
    assert done.exit_code == 0, done.stderr
    assert package.load("pretrained").checkpoint.path == PRETRAINED / WEIGHTS


def test_a_run_of_its_name_comes_first(tmp_path: Path) -> None:
    done = ddpmctl("train", *TINY, "--scenes", 4, "--epochs", 1, "--runs-dir", tmp_path, "--name", "pretrained")
    assert done.exit_code == 0, done.stderr
    assert package.load("pretrained", runs_dir=tmp_path).checkpoint.path.parent.parent == tmp_path / "pretrained"


@pytest.mark.slow
def test_its_images_show_what_is_asked_for(tmp_path: Path) -> None:
    (scores,) = package.evaluate("pretrained", conditions="test", repeats=1).to_dict()["checkpoints"]
    assert scores["scores"]["test"]["accuracy"] > 0.85
