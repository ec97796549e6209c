"""NaN and inf in training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from ddpmctl.config import Config
from ddpmctl.device import make_compute_device
from ddpmctl.training.state import training_state
from ddpmctl.training.trainer import Trainer

from ..conftest import ddpmctl, load_tensors, train
from .tools import edited, files_of


@pytest.fixture
def overflowing(run: Path, tmp_path: Path) -> Path:
    """A run whose next step overflows: its last bias is so large that the square of an error is not finite."""
    shutil.copytree(run, tmp_path / "r")
    state = load_tensors(tmp_path / "r" / "state.pt")[0]
    edited(tmp_path / "r" / "state.pt", net={**state["net"], next(reversed(state["net"])): torch.full((3,), 1e30)})
    return tmp_path / "r"


def test_a_loss_that_is_not_finite_stops_before_the_optimizer_step(overflowing: Path) -> None:
    before = {name: content for name, content in files_of(overflowing).items() if name.startswith(("checkpoints", "results"))}
    result = ddpmctl("train", "--resume", overflowing, "--epochs", 3, "--override", "epochs")
    assert result.exit_code == 4, result.output
    assert "the loss is not finite at step 5 (epoch 3, learning rate 0.0001)" in result.stderr
    assert "--on-nan rollback" in result.stderr
    known = json.loads((overflowing / "diagnosis.json").read_text())
    assert (known["step"], known["lr"], known["loss"], len(known["batch_indices"]), known["state"]) == (5, 1e-4, "inf", 8, "state.pt")
    assert known["last_checkpoint"].startswith("epoch2_")
    assert load_tensors(overflowing / "state.pt")[0]["counters"]["step"] == 4
    assert {name: content for name, content in files_of(overflowing).items() if name.startswith(("checkpoints", "results"))} == before


def test_sampled_images_that_are_not_finite_stop_the_run_and_write_no_checkpoint(tmp_path: Path) -> None:
    folder = train(tmp_path, "--epochs", 1, "--ema", 0.9)
    average = {name: value * 3e37 if value.is_floating_point() else value for name, value in load_tensors(folder / "state.pt")[0]["average"].items()}
    edited(folder / "state.pt", average=average)
    before = files_of(folder / "checkpoints")
    result = ddpmctl("train", "--resume", folder, "--epochs", 2, "--override", "epochs")
    assert result.exit_code == 4, result.output
    assert "the sampled images are not finite after step 4" in result.stderr
    assert json.loads((folder / "diagnosis.json").read_text())["step"] == 4
    assert files_of(folder / "checkpoints") == before


def test_rollback_halves_the_learning_rate_three_times_and_is_logged(overflowing: Path) -> None:
    result = ddpmctl("train", "--resume", overflowing, "--epochs", 3, "--override", "epochs", "--on-nan", "rollback")
    assert result.exit_code == 4, result.output
    assert "rolled back 3 times already" in result.stderr
    rollbacks = [m for m in map(json.loads, (overflowing / "metrics.jsonl").read_text().splitlines()) if m["event"] == "rollback"]
    assert [(m["step"], m["lr_scale"], m["count"]) for m in rollbacks] == [(4, 0.5, 1), (4, 0.25, 2), (4, 0.125, 3)]
    assert load_tensors(overflowing / "state.pt")[0]["counters"]["rollbacks"] == 3


def test_after_a_rollback_the_learning_rate_is_lower(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "r")
    counters = load_tensors(tmp_path / "r" / "state.pt")[0]["counters"]
    edited(tmp_path / "r" / "state.pt", counters={**counters, "lr_scale": 0.25, "rollbacks": 2})
    assert ddpmctl("train", "--resume", tmp_path / "r", "--epochs", 3, "--override", "epochs").exit_code == 0
    epochs = [m for m in map(json.loads, (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()) if m["event"] == "epoch"]
    assert [m["lr"] for m in epochs] == [1e-4, 1e-4, 0.25e-4]


def test_a_step_that_is_not_finite_changes_no_weights(dataset: object, tmp_path: Path) -> None:
    from ddpmctl.errors import DivergedError

    config = Config().replace(width=8, timesteps=6, batch_size=4, epochs=1, ema=0.9, precision="fp32", device="cpu")
    trainer = Trainer(config, make_compute_device(config.device), dataset)  # type: ignore[arg-type]
    trainer.step()
    before = {name: p.detach().clone() for name, p in trainer.net.named_parameters()}
    trainer.loss.signal.fill_(float("inf"))
    with pytest.raises(DivergedError, match="loss is not finite at step 2"):
        trainer.step()
    assert all(torch.equal(p, before[name]) for name, p in trainer.net.named_parameters())
    assert trainer.counters.step == 1
    with torch.no_grad():
        next(trainer.net.parameters()).fill_(float("nan"))
    with pytest.raises(DivergedError, match=r"weights .* are not finite"):
        training_state(trainer)
