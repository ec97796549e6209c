"""Damaged, foreign and edited states and logs are refused, or repaired where nothing is lost."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest
import torch

from ..conftest import ddpmctl, load_tensors, train
from ..test_cli_errors import refused
from .tools import edited


def not_finite(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value * float("nan") if value.is_floating_point() else value for name, value in weights.items()}


def of_negative_variance(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: -value if name.endswith("running_var") else value for name, value in weights.items()}


STATES = {
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:-100]),
    "empty": lambda file: file.write_bytes(b""),
    "a flipped byte": lambda file: file.write_bytes(file.read_bytes()[:50_000] + bytes([file.read_bytes()[50_000] ^ 4]) + file.read_bytes()[50_001:]),
    "gone": lambda file: file.unlink(),
    "a checkpoint": lambda file: shutil.copy(next((file.parent / "checkpoints").glob("*.pth")), file),
    "an older format": lambda file: edited(file, format="ddpmctl training state 1"),
    "other data": lambda file: edited(file, data="0" * 64),
    "another network": lambda file: edited(file, net={"weight": torch.zeros(3)}),
    "no optimizers": lambda file: edited(file, optimizers=[]),
    "counters of text": lambda file: edited(file, counters={**load_tensors(file)[0]["counters"], "step": "9"}),
    "counters of 400 digits": lambda file: edited(file, counters={**load_tensors(file)[0]["counters"], "step": 10**400}),
    "counters below zero": lambda file: edited(file, counters={**load_tensors(file)[0]["counters"], "epoch": -1}),
    "missing counters": lambda file: edited(file, counters={"step": 1}),
    "no log": lambda file: edited(file, log=None),
    "weights that are not finite": lambda file: edited(file, net=not_finite(load_tensors(file)[0]["net"])),
    "variances below zero": lambda file: edited(file, net=of_negative_variance(load_tensors(file)[0]["net"])),
    "moments of another shape": lambda file: edited(file, optimizers=[moments(load_tensors(file)[0]["optimizers"][0])]),
}


def moments(state: dict[str, dict[int, dict[str, torch.Tensor]]]) -> dict[str, dict[int, dict[str, torch.Tensor]]]:
    state["state"][0]["exp_avg"] = torch.zeros(7, 7)
    return state


@pytest.mark.parametrize("damage", STATES)
def test_a_damaged_or_foreign_state_is_an_error_and_never_a_new_start(damage: str, copy: Path) -> None:
    STATES[damage](copy / "state.pt")
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file() and path.name != ".lock"}
    code = 2 if damage == "gone" else 3
    line = refused(code, "train", "--resume", copy, "--epochs", 3, "--override", "epochs")
    assert "state.pt" in line
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file() and path.name != ".lock"} == before


def test_the_state_of_another_run_with_the_same_settings_and_data_is_refused(copy: Path, tmp_path: Path) -> None:
    """With a budget in minutes, such runs differ; here the state is of a run that was as long, but had another loss."""
    counters = load_tensors(copy / "state.pt")[0]["counters"]
    edited(copy / "state.pt", counters={**counters, "last_loss": counters["last_loss"] + 0.1})
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file() and path.name != ".lock"}
    assert "state.pt: does not match metrics.jsonl in epoch" in refused(3, "train", "--resume", copy, "--epochs", 3, "--override", "epochs")
    log = load_tensors(copy / "state.pt")[0]["log"]
    edited(copy / "state.pt", counters=counters, log={**log, "metrics.jsonl": log["metrics.jsonl"] - 3})
    assert "state.pt: does not match metrics.jsonl in epoch" in refused(3, "train", "--resume", copy, "--epochs", 3, "--override", "epochs")
    after = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file() and path.name not in (".lock", "state.pt")}
    assert after == {path: content for path, content in before.items() if path.name != "state.pt"}


def test_a_state_whose_optimizer_updates_other_weights_names_a_way_to_go_on(copy: Path) -> None:
    """As where a later version of Muon takes kernels that AdamW took."""
    state = load_tensors(copy / "state.pt")[0]["optimizers"][0]
    last = state["param_groups"][0]["params"].pop()
    del state["state"][last]
    edited(copy / "state.pt", optimizers=[state])
    line = refused(3, "train", "--resume", copy, "--epochs", 3, "--override", "epochs")
    assert "the optimizers update other weights; start a new run with --weights CHECKPOINT" in line


def test_edited_settings_of_a_run_are_reported(copy: Path) -> None:
    file = copy / "config.toml"
    file.write_text(file.read_text().replace("lr = 0.0001", "lr = 0.5"))
    line = refused(3, "train", "--resume", copy)
    assert "lr: 0.0001 in the state, 0.5 in config.toml" in line


def test_log_rows_after_the_state_and_incomplete_rows_are_removed(copy: Path) -> None:
    before = {name: (copy / name).read_bytes() for name in ("metrics.jsonl", "results.csv", "timing.jsonl")}
    for name in before:
        with (copy / name).open("ab") as file:
            file.write(b'{"event": "step", "step": 99}\n{"eve')
    assert ddpmctl("train", "--resume", copy).exit_code == 0
    assert {name: (copy / name).read_bytes() for name in before} == before


def test_a_truncated_log_is_reported_and_its_incomplete_row_is_removed(copy: Path) -> None:
    file = copy / "results.csv"
    file.write_bytes(file.read_bytes()[:-5])
    result = ddpmctl("train", "--resume", copy, "--epochs", 3, "--override", "epochs")
    assert result.exit_code == 0, result.output
    assert "results.csv lost rows" in result.stderr
    with file.open(newline="") as handle:
        assert [row["epoch"] for row in csv.DictReader(handle)] == ["1", "3"]


def test_a_run_killed_before_its_first_step_starts_at_it(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", "--epochs", 1)
    shutil.copytree(whole, tmp_path / "r")
    for name in ("state.pt", "metrics.jsonl", "timing.jsonl", "results.csv", "best.json", "latest.json"):
        (tmp_path / "r" / name).unlink()
    for file in (tmp_path / "r").rglob("epoch*"):
        file.unlink()
    result = ddpmctl("train", "--resume", tmp_path / "r")
    assert result.exit_code == 0, result.output
    assert "nothing was trained here yet" in result.stderr
    assert (tmp_path / "r" / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
