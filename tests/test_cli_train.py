"""``ddpmctl train`` through the real command line."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ddpmctl.checkpoints.format import load_checkpoint
from ddpmctl.config import Config
from ddpmctl.config_toml import load_toml

from .conftest import TINY, ddpmctl, load_tensors, size, train


def test_a_run_contains_settings_metrics_results_checkpoints_and_images(run: Path) -> None:
    assert Config.from_flat(load_toml(run / "config.toml")).model.width == 8
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in metrics if record["event"] == "epoch"] == [1, 2]
    assert [record["images_seen"] for record in metrics if record["event"] == "evaluation"] == [12, 24]
    with (run / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert sorted(row["checkpoint"] for row in rows) == names
    for row in rows:
        assert row["checkpoint"] == f"epoch{row['epoch']}_{row['test']}_{row['new_test']}.pth"
        assert float(row["test"]) * 72 == pytest.approx(round(float(row["test"]) * 72))  # pooled over the lab's 72 objects
    width, height = size(run / "samples" / "epoch2_new_test.png")
    assert width > 8 * 128
    assert height > 4 * 128


def test_checkpoints_contain_their_settings(run: Path) -> None:
    checkpoint = load_checkpoint(next((run / "checkpoints").glob("epoch2_*.pth")))
    assert checkpoint.config.flat() == Config.from_flat(load_toml(run / "config.toml")).flat()
    assert (checkpoint.epoch, checkpoint.foreign) == (2, False)
    assert set(checkpoint.recorded) == {"test", "new_test"}


def test_best_and_latest_point_into_the_run(run: Path) -> None:
    latest = json.loads((run / "latest.json").read_text())["checkpoint"]
    best = json.loads((run / "best.json").read_text())["checkpoint"]
    assert re.fullmatch(r"checkpoints/epoch2_.*\.pth", latest)
    assert (run / best).is_file()


def test_curves_are_drawn_at_each_score_and_a_failure_to_draw_does_not_stop_training(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError("no font")

    assert size(run / "curves.png")[0] > 600
    folder = tmp_path / "r"
    shutil.copytree(run, folder)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", broken)
    result = ddpmctl("train", "--resume", folder, "--override", "epochs", "--epochs", 4)
    assert result.exit_code == 0, result.output
    assert result.stderr.count("curves.png is not written from here on") == 1
    assert len(list((folder / "checkpoints").glob("*.pth"))) == 4


def test_tensorboard_gets_losses_and_scores_and_a_resumed_run_repeats_none(run: Path, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = train(tmp_path, "--epochs", 2, "--tensorboard")
    for name in ("metrics.jsonl", "data.json"):
        assert (folder / name).read_bytes() == (run / name).read_bytes()
    assert ddpmctl("train", "--resume", folder, "--override", "epochs", "--epochs", 3, "--tensorboard").exit_code == 0
    found = accumulator.EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name, column in {"accuracy/test": "test", "exact_match/new_test": "new_test_exact", "loss/epoch": "loss"}.items():
        assert [(point.step, point.value) for point in found.Scalars(name)] == [(int(row["step"]), pytest.approx(float(row[column]))) for row in rows]


def test_without_tensorboard_the_error_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    result = ddpmctl("train", *TINY, "--epochs", 1, "--scenes", 1, "--runs-dir", tmp_path / "runs", "--tensorboard")
    assert result.exit_code == 2
    assert "python -m pip install tensorboard" in result.stderr
    assert not (tmp_path / "runs").exists()


def test_equal_seeds_give_equal_weights_and_different_seeds_different_ones(run: Path, tmp_path: Path) -> None:
    weights = [load_checkpoint(next((train(tmp_path / str(s), "--epochs", 2, "--seed", s) / "checkpoints").glob("epoch2_*"))).weights for s in (0, 1)]
    reference = load_checkpoint(next((run / "checkpoints").glob("epoch2_*"))).weights
    assert all(torch.equal(weights[0][name], reference[name]) for name in reference)
    assert any(not torch.equal(weights[1][name], reference[name]) for name in reference)


def test_a_second_run_of_the_same_settings_gets_its_own_folder(tmp_path: Path) -> None:
    first, second = (train(tmp_path, "--epochs", 1, scenes=1) for _ in range(2))
    assert second.name == f"{first.name}-2"


def test_a_taken_name_is_refused_and_nothing_in_it_changes(run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    result = ddpmctl("train", *TINY, "--epochs", 1, "--scenes", 1, "--runs-dir", run.parent, "--name", run.name)
    assert result.exit_code == 2
    assert "exists already" in result.stderr
    assert "--resume" in result.stderr
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("act", ["gelu", "relu"])
def test_dry_run_prints_the_reports_recipe(act: str, tmp_path: Path) -> None:
    result = ddpmctl("train", "--act", act, "--epochs", 600, "--dry-run", "--runs-dir", tmp_path / "runs", "--device", "cpu")
    assert result.exit_code == 0, result.output
    for line in (
        'net = "context-unet"', f'act = "{act}"', "width = 128", 'schedule = "linear"', "timesteps = 400", "beta_1 = 0.0001", "beta_2 = 0.02",
        'objective = "eps"', "epochs = 600", 'optimizer = "adam"', "lr = 0.0001", 'lr_decay = "none"', 'sampler = "ddpm"', 'steps = "none"', "save_every = 5",
    ):  # fmt: skip
        assert re.search(rf"^{re.escape(line)}  #", result.stdout, re.M), line
    message = result.stderr
    assert "18,009 images" in message
    assert "parameters" in message
    assert "168,000 steps" not in message
    assert "600 epochs" in message
    assert re.search(r"this takes about \d+\.\d days here; --preset quick", message)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("options", [["--act", "gelu"], ["--act", "relu"], ["--schedule", "cosine-periodic", "--lr-decay", "linear"], ["--ema", "0.9"]])
def test_the_reports_variants_train(options: list[str], tmp_path: Path) -> None:
    folder = train(tmp_path, "--epochs", 2, *options, scenes=2)
    assert len(list((folder / "checkpoints").iterdir())) == 2


def test_linear_decay_is_the_reports(tmp_path: Path) -> None:
    folder = train(tmp_path, "--epochs", 4, "--lr-decay", "linear", "--lr", "0.001", scenes=1)
    rates = [record["lr"] for record in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if record["event"] == "epoch"]
    assert rates == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


def test_a_resumed_run_stays_in_its_folder_and_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    from ddpmctl.data.dataset import load_dataset
    from ddpmctl.device import make_compute_device
    from ddpmctl.evaluation.classifiers import load_classifier
    from ddpmctl.runs.folder import open_run
    from ddpmctl.training import events
    from ddpmctl.training.loop import training_events
    from ddpmctl.training.trainer import Trainer

    options = ("--epochs", 3, "--ema", "0.9")
    whole = train(tmp_path / "whole", *options, scenes=8)
    stopped = train(tmp_path / "stopped", *options, scenes=8)
    for path in [*stopped.glob("*.json*"), stopped / "results.csv", *stopped.rglob("*.pth"), stopped / "state.pt"]:
        if path.name != "data.json":
            path.unlink()
    spec = load_dataset(None, scenes=8)
    try:
        while True:
            next(spec)
    except StopIteration as end:
        dataset = end.value
    opened = open_run(stopped)
    config = opened.config()
    stream = training_events(Trainer(config, make_compute_device(config.device), dataset), opened, load_classifier())
    for event in stream:
        # Stop in the middle of the second epoch.
        if isinstance(event, events.Saved) and event.path.name == "state.pt":
            next(stream)
            break
    stream.close()
    state, _ = load_tensors(stopped / "state.pt")
    assert 0 < state["counters"]["step"] < 9

    result = ddpmctl("train", "--resume", stopped)
    assert result.exit_code == 0, result.output
    ends = [load_checkpoint(next((folder / "checkpoints").glob("epoch3_*"))).weights for folder in (whole, stopped)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    with (stopped / "results.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2", "3"]


def test_resume_refuses_other_settings_and_says_which(run: Path) -> None:
    result = ddpmctl("train", "--resume", run, "--lr", "0.01")
    assert result.exit_code == 2
    assert "lr: 0.0001 in the run, 0.01 now" in result.stderr


def test_resume_does_not_change_a_finished_run(run: Path) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    result = ddpmctl("train", "--resume", run)
    assert result.exit_code == 0, result.output
    assert "nothing to do" in result.stderr
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_finished_run_says_how_to_train_it_for_longer(tmp_path: Path) -> None:
    run = train(tmp_path, "--epochs", 1)
    said = ddpmctl("train", "--resume", run).stderr
    again = said.split("To train it for longer: ddpmctl ")[1].split()
    assert again[-2:] == ["--epochs", "2"]
    result = ddpmctl(*again)
    assert result.exit_code == 0, result.output
    assert "epoch 2  loss" in result.stderr


def test_after_training_the_next_commands_are_named_and_work(tmp_path: Path) -> None:
    result = ddpmctl("train", *TINY, "--epochs", 1, "--scenes", 4, "--runs-dir", tmp_path / "runs")
    commands = [line.removeprefix("next: ddpmctl ") for line in result.stderr.splitlines() if line.startswith("next: ")]
    assert [command.split()[0] for command in commands] == ["evaluate", "sample", "denoise-grid"]
    for command, out in zip(commands, ((), ("-o", tmp_path / "out"), ("-o", tmp_path / "out.png")), strict=True):
        again = ddpmctl(*shlex.split(command), *out)
        assert again.exit_code == 0, again.output


def test_minutes_are_a_budget_and_the_decay_follows_the_time(tmp_path: Path) -> None:
    folder = train(tmp_path, "--minutes", "0.03", "--lr-decay", "linear", scenes=8)
    last, times = ([json.loads(line) for line in (folder / name).read_text().splitlines()][-2] for name in ("metrics.jsonl", "timing.jsonl"))
    assert (last["event"], times["event"]) == ("epoch", "epoch")
    assert 1.8 <= times["seconds"] < 10
    assert last["lr"] < 0.2e-4
    assert (folder / "latest.json").is_file()


def test_without_a_terminal_there_is_one_plain_line_per_epoch(tmp_path: Path) -> None:
    result = ddpmctl("train", *TINY, "--epochs", 2, "--scenes", 2, "--runs-dir", tmp_path)
    lines = [line for line in result.stderr.splitlines() if re.match(r"epoch \d+  loss", line)]
    assert len(lines) == 2
    assert "\x1b" not in result.stderr
    assert "accuracy" in result.stdout
    assert "image:" in result.stdout


def test_a_network_is_built_once_and_once_on_meta_before_the_first_step(tmp_path: Path) -> None:
    code = (
        "import sys, torch\nfrom ddpmctl.nets.context_unet import ContextUnet as Net\nfrom ddpmctl.training.trainer import Trainer\n"
        "built, inner = [], Net.__init__\n"
        "def init(*arguments):\n    built.append(torch.get_default_device().type)\n    inner(*arguments)\n"
        "def step(trainer):\n    print(sorted(built))\n    raise SystemExit\n"
        "Net.__init__, Trainer.step = init, step\nfrom ddpmctl.cli.app import main\nmain()"
    )
    arguments = ["train", *TINY, "--epochs", 1, "--scenes", 4, "--runs-dir", tmp_path]
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=True, timeout=100)
    assert done.stdout.splitlines() == ["['cpu', 'meta']"]
