"""Resuming is exact after any step; other settings need --override."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ddpmctl.config import Config
from ddpmctl.data.dataset import Dataset, load_dataset
from ddpmctl.data.source import DataSource
from ddpmctl.device import make_compute_device
from ddpmctl.runs.abandoned import abandon
from ddpmctl.runs.folder import Run, create_run
from ddpmctl.runs.sources import RunSources
from ddpmctl.training.log import RunLog
from ddpmctl.training.loop import _recipe_changes, save_state
from ddpmctl.training.state import restore, training_state
from ddpmctl.training.trainer import Trainer

from ..conftest import TINY, ddpmctl, load_tensors
from ..test_cli_errors import refused
from .kills import _flat
from .tools import result_of

RECIPES = {
    "the report's": {},
    "muon and an average": {"net": "unet", "width": 32, "optimizer": "muon", "ema": 0.9, "lr": 0.01, "warmup": 3, "label_dropout": 0.2, "mirror": 0.5},
    "fine-unet, falling noise levels": {
        "net": "fine-unet",
        "objective": "x0",
        "optimizer": "muon",
        "label_loss": 0.1,
        "error_loss": 0.001,
        "detail_weight": 3.0,
        "time_sampling": "logit-normal",
        "time_mean_end": -1.0,
        "ema": 0.9,
        "lr": 0.01,
    },
    "adamw, cosine, decay": {"optimizer": "adamw", "schedule": "cosine", "objective": "v", "lr_decay": "linear", "time_sampling": "logit-normal"},
    "accumulated": {"micro_batch": 3, "ema": 0.99},
}


NO_SOURCES = RunSources(DataSource(scenes=1), "", None, "")


def advance(trainer: Trainer, steps: int) -> None:
    for _ in range(steps):
        if trainer.epoch_is_over:
            trainer.end_epoch(trainer.mean_loss("epoch"))
        trainer.step()


@pytest.mark.parametrize("name", RECIPES)
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one_byte_for_byte(name: str, dataset: Dataset, tmp_path: Path) -> None:
    config = Config().replace(width=8, timesteps=6, batch_size=4, epochs=3, precision="fp32", device="cpu", threads=1).replace(**RECIPES[name])  # type: ignore[arg-type]
    compute = make_compute_device(config.device)
    straight = Trainer(config, compute, dataset)
    advance(straight, 10)
    for stop in (1, 3, 4, 5, 9):  # in an epoch, before its smaller last batch, at its end, in a later epoch
        run = create_run(tmp_path, None, config, NO_SOURCES)
        first = Trainer(config, compute, dataset)
        advance(first, stop)
        save_state(first, RunLog(run), run)
        second = Trainer(config, compute, dataset)
        restore(second, load_tensors(run.state_file)[0], "state")
        advance(second, 10 - stop)
        ends = [{k: v for k, v in _flat(training_state(trainer)).items() if "seconds" not in k} for trainer in (straight, second)]
        assert ends[0] == ends[1], stop


def test_a_stop_at_a_logged_step_that_ends_an_epoch_loses_no_epoch(tmp_path: Path) -> None:
    """50 images in batches of one: the logged step is the last one of the epoch."""
    from ddpmctl.evaluation.classifiers import load_classifier
    from ddpmctl.training.loop import training_events

    data = result_of(load_dataset(None, scenes=17))
    data = Dataset(data.name, data.key, data.images[:50], data.labels[:50], data.conditions, None)
    config = Config().replace(width=8, timesteps=3, batch_size=1, epochs=1, precision="fp32", device="cpu", threads=1)
    run = create_run(tmp_path, "r", config, NO_SOURCES)
    compute, classifier = make_compute_device(config.device), load_classifier()
    stream = training_events(Trainer(config, compute, data), run, classifier)
    for event in stream:
        if type(event).__name__ == "StepDone":
            break
    stream.close()
    assert load_tensors(run.state_file)[0]["counters"]["batch"] == 50
    rest = [type(event).__name__ for event in training_events(Trainer(config, compute, data), run, classifier, resume=True)]
    assert [name for name in rest if name not in ("Progress", "Ticked")] == ["EpochDone", "Evaluated", "Saved", "Saved"]
    events = [json.loads(line)["event"] for line in run.metrics_file.read_text().splitlines()]
    assert events == ["step", "epoch", "evaluation"]


def test_with_a_budget_in_minutes_checkpoints_after_the_state_are_abandoned(dataset: Dataset, tmp_path: Path) -> None:
    """The run resumes from an earlier state, so checkpoints written after that state no longer belong to it."""
    from ddpmctl.evaluation.classifiers import load_classifier
    from ddpmctl.progress import Notice
    from ddpmctl.training.events import Saved
    from ddpmctl.training.loop import training_events

    config = Config().replace(width=8, timesteps=3, batch_size=8, epochs=None, minutes=60, save_every=1, precision="fp32", device="cpu", threads=1)
    run, compute, classifier = create_run(tmp_path, "r", config, NO_SOURCES), make_compute_device(config.device), load_classifier()

    def until_epoch(last: int, **settings: bool) -> tuple[list[bytes], list[str]]:
        states, notices = [], []
        stream = training_events(Trainer(config, compute, dataset), run, classifier, **settings)
        for event in stream:
            if isinstance(event, Notice):
                notices.append(event.text)
            if event == Saved(run.state_file):
                states.append(run.state_file.read_bytes())
                if load_tensors(run.state_file)[0]["counters"]["epoch"] == last:
                    break
        stream.close()
        return states, notices

    states, _ = until_epoch(4)
    later = sorted(file.name for file in run.checkpoints.glob("*.pth"))[1:]
    for _ in range(2):
        for name in ("best", "latest"):
            run.point(name, run.checkpoints / max(file.name for file in run.checkpoints.glob("*.pth")))
        run.state_file.write_bytes(states[0])
        _, notices = until_epoch(2, resume=True)
        assert [f"moved to checkpoints/abandoned: {', '.join(later)}" in notice for notice in notices] == [True]
        assert all((run.checkpoints / "abandoned" / name).is_file() for name in later)
        files = sorted(file.name for file in run.checkpoints.glob("*.pth"))
        assert files == [row["checkpoint"] for row in run.results()]
        assert len(files) == 2
        assert run.pointer("latest") == run.checkpoints / files[-1]
        assert run.pointer("best") in [run.checkpoints / name for name in files]
        later = files[1:]
    assert len(list((run.checkpoints / "abandoned").iterdir())) == 3 + 1  # files of the same name are not overwritten


@pytest.mark.parametrize("changes", [[], ["--epochs", "3", "--lr", "0.001", "--override", "epochs,lr"]])
def test_with_a_budget_in_epochs_checkpoints_after_the_state_are_abandoned_only_if_settings_changed(changes: list[str], copy: Path) -> None:
    run = Run(copy)
    pointers = {name: run.pointer(name) for name in ("best", "latest")}
    later = run.checkpoints / "epoch9_0.9_0.9.pth"
    shutil.copy(next(run.checkpoints.glob("*.pth")), later)
    run.point("best", later)
    result = ddpmctl("train", "--resume", copy, *changes)
    assert result.exit_code == 0, result.output
    assert later.exists() != bool(changes)
    assert ("epoch9_0.9_0.9.pth" in result.stderr) == bool(changes)
    if changes:
        assert (run.checkpoints / "abandoned" / later.name).is_file()
        assert run.pointer("best") in (pointers["best"], run.pointer("latest"))
        assert "epoch9" not in ddpmctl("evaluate", copy, "--no-confirm").output


def test_a_run_without_scored_checkpoints_has_no_pointers(copy: Path) -> None:
    run = Run(copy)
    assert len(abandon(run, 0)) == 2
    assert not (copy / "best.json").exists()
    assert not (copy / "latest.json").exists()
    assert abandon(run, 0) == []


def test_changed_settings_need_override(copy: Path) -> None:
    line = refused(2, "train", "--resume", copy, "--epochs", 3, "--lr", "0.001")
    assert "epochs: 2 in the run, 3 now; lr: 0.0001 in the run, 0.001 now" in line or "lr: 0.0001 in the run, 0.001 now" in line
    assert "--override" in line
    assert "lr: " in refused(2, "train", "--resume", copy, "--epochs", 3, "--lr", "0.001", "--override", "epochs")
    result = ddpmctl("train", "--resume", copy, "--epochs", 3, "--lr", "0.001", "--override", "epochs,lr")
    assert result.exit_code == 0, result.output
    metrics = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    assert [m["changed"] for m in metrics if m["event"] == "override"] == [{"epochs": [2, 3], "lr": [0.0001, 0.001]}]
    assert [m["lr"] for m in metrics if m["event"] == "epoch"] == [0.0001, 0.0001, 0.001]
    config = Run(copy).config()
    assert (config.training.epochs, config.training.lr) == (3, 0.001)
    assert _recipe_changes(config, Config.from_flat({k: v for s in load_tensors(copy / "state.pt")[0]["config"].values() for k, v in s.items()})) == {}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--override", "lr"], "--lr VALUE"),
        (["--override", "learning"], "'learning' is not a setting"),
        (["--override", "width", "--width", "16"], "width cannot change within a run"),
        (["--width", "16"], "train a new run instead"),
        (["--batch-size", "4"], "--override batch_size"),
    ],
)
def test_invalid_overrides_are_refused(arguments: list[str], expected: str, copy: Path) -> None:
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert expected in refused(2, "train", "--resume", copy, *arguments)
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_override_without_resume(tmp_path: Path) -> None:
    assert "needs --resume" in refused(2, "train", *TINY, "--override", "lr", "--runs-dir", tmp_path)
