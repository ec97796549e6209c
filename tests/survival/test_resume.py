"""Resuming is exact after any step; other settings and damaged or foreign states are refused."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from ddpmctl.checkpoints.format import save_tensors
from ddpmctl.config import Config
from ddpmctl.data.dataset import Dataset, load_dataset
from ddpmctl.device import make_compute_device
from ddpmctl.runs.abandoned import abandon
from ddpmctl.runs.folder import Run, create_run
from ddpmctl.runs.sources import RunSources
from ddpmctl.training.log import RunLog
from ddpmctl.training.loop import _recipe_changes, save_state
from ddpmctl.training.state import restore, training_state
from ddpmctl.training.trainer import Trainer

from ..conftest import TINY, ddpmctl, load_tensors, train
from ..test_cli_errors import refused
from .kills import _flat

R = TypeVar("R")


def result_of(spec: Generator[object, None, R]) -> R:
    try:
        while True:
            next(spec)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return result_of(load_dataset(None, scenes=5))  # 15 images: in batches of 4 the last of each epoch is smaller


RECIPES = {
    "the report's": {},
    "muon and an average": {"net": "unet", "width": 32, "optimizer": "muon", "ema": 0.9, "lr": 0.01, "warmup": 3, "label_dropout": 0.2, "mirror": 0.5},
    "fine-unet, falling noise levels": {
        "net": "fine-unet",
        "objective": "x0",
        "optimizer": "muon",
        "label_loss": 0.1,
        "time_sampling": "logit-normal",
        "time_mean_end": -1.0,
        "ema": 0.9,
        "lr": 0.01,
    },
    "adamw, cosine, decay": {"optimizer": "adamw", "schedule": "cosine", "objective": "v", "lr_decay": "linear", "time_sampling": "logit-normal"},
    "accumulated": {"micro_batch": 3, "ema": 0.99},
}


NO_SOURCES = RunSources(None, 1, "", None, "")


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


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be damaged."""
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


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
    assert "goes with --resume" in refused(2, "train", *TINY, "--override", "lr", "--runs-dir", tmp_path)


# The number of threads, and other settings on which the last bits depend


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


def edited(file: Path, **changes: object) -> None:
    content = load_tensors(file)[0]
    save_tensors(file, {**content, **changes})


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
    assert "state.pt: is not the state of this run" in refused(3, "train", "--resume", copy, "--epochs", 3, "--override", "epochs")
    log = load_tensors(copy / "state.pt")[0]["log"]
    edited(copy / "state.pt", counters=counters, log={**log, "metrics.jsonl": log["metrics.jsonl"] - 3})
    assert "state.pt: is not the state of this run" in refused(3, "train", "--resume", copy, "--epochs", 3, "--override", "epochs")
    after = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file() and path.name not in (".lock", "state.pt")}
    assert after == {path: content for path, content in before.items() if path.name != "state.pt"}


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
