"""Data of one's own through the commands: judge, training, scores, samples, comparison; and runs without a judge."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpmctl.checkpoints.format import load_checkpoint
from ddpmctl.checkpoints.names import recorded_in_name
from ddpmctl.data.dataset import Dataset
from ddpmctl.device import ComputeDevice
from ddpmctl.errors import DataError, UsageError
from ddpmctl.evaluation.classifier_file import NoClassifierError, find_classifier, stored_classifier
from ddpmctl.evaluation.classifiers import load_classifier
from ddpmctl.evaluation.own_classifier import OwnTrained, last_tenth, train_on_images
from ddpmctl.iclevr import ICLEVR
from ddpmctl.runs.record import read_record
from ddpmctl.task import Task

from .benchmarks.tasks.data import HOUSE, clevr, houses, unlabelled
from .conftest import ddpmctl

CPU = ComputeDevice(torch.device("cpu"), "fp32")
TINY = (
    "--net",
    "unet",
    "--width",
    16,
    "--epochs",
    2,
    "--save-every",
    1,
    "--steps",
    3,
    "--sampler",
    "ddim",
    "--timesteps",
    40,
    "--batch-size",
    40,
    "--size",
    32,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with drawings of houses, a classifier of them, and two runs."""
    place = tmp_path_factory.mktemp("own")
    houses(place / "houses", 200)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        trained = ddpmctl("evaluator", "train", "--data", "houses", "--size", 32, "--steps", 60, "--json", "judge.json")
        assert trained.exit_code == 0, trained.stderr
        for seed in (0, 1):
            made = ddpmctl("train", *TINY, "--data", "houses", "--name", f"r{seed}", "--seed", seed)
            assert made.exit_code == 0, made.stderr
    return place


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


def test_a_run_keeps_its_task_its_conditions_and_its_scores(here: Path) -> None:
    record = read_record(here / "runs" / "r0")
    assert record.files == ("test", "heldout")
    assert [one.epoch for one in record.scored] == [1, 2]
    file = next((here / "runs" / "r0" / "checkpoints").glob("epoch2_*"))
    assert set(recorded_in_name(file)) == {"epoch", "test", "new_test"}, "two scores are in the name"
    task = load_checkpoint(file).task
    assert (task.classes, task.size, task.scored) == (tuple(sorted(HOUSE)), 32, ("test", "heldout"))
    heldout = json.loads((here / "runs" / "r0" / "conditions" / "heldout.json").read_text(encoding="utf-8"))
    assert 1 <= len(heldout) <= 32


def test_evaluate_compare_and_show_use_the_runs_own_conditions_and_classifier(here: Path) -> None:
    done = ddpmctl("evaluate", "runs/r0", "--json", "scores.json", "--html", "scores.html", "--breakdown", "--fidelity", "--repeats", 2)
    assert done.exit_code == 0, done.stderr
    scores = json.loads((here / "scores.json").read_text(encoding="utf-8"))
    assert set(scores["conditions"]) == {"test", "heldout"}
    assert scores["conditions"]["heldout"]["in_training"] == 0
    assert scores["conditions"]["test"]["in_training"] == scores["conditions"]["test"]["count"]
    assert set(scores["checkpoints"][0]["scores"]["test"]["by"]) == {"objects", "class"}, "these labels have no colours"
    assert "houses/evaluator.pt" in scores["evaluator"]["name"]
    assert "door, red" in (here / "scores.html").read_text(encoding="utf-8")
    assert "wrong shape" not in done.stdout
    compared = ddpmctl("compare", "runs/r0", "runs/r1", "--recorded", "--out", "c.png", "--json", "c.json")
    assert compared.exit_code == 0, compared.stderr
    assert json.loads((here / "c.json").read_text())["files"] == ["test", "heldout"]
    shown = ddpmctl("show", "runs/r0", "--out", "show.png")
    assert "heldout" in shown.stdout
    assert '--labels "' in shown.stdout or "--labels '" in shown.stdout
    assert "test and heldout" in ddpmctl("runs").stdout


def test_samples_are_asked_for_by_the_datas_own_labels(here: Path) -> None:
    done = ddpmctl("sample", "runs/r0", "--labels", '"door, red",ОКНО', "--out", "made")
    assert done.exit_code == 0, done.stderr
    (file,) = (here / "made").glob("000-*.png")
    assert "door-red+окно" in file.name
    refused = ddpmctl("sample", "runs/r0", "--labels", "red cube", "--out", "made")
    assert refused.exit_code == 2
    assert "unknown label 'red cube'" in refused.stderr
    grid = ddpmctl("denoise-grid", "runs/r0", "-l", "煙突", "--x0", "--out", "grid.png")
    assert grid.exit_code == 0, grid.stderr


def test_a_classifier_of_other_images_is_refused(here: Path) -> None:
    file = next((here / "runs" / "r0" / "checkpoints").glob("epoch2_*"))
    alone = here / "alone.pth"
    alone.write_bytes(file.read_bytes())
    refused = ddpmctl("evaluate", alone, "--json", "x.json")  # a file outside of a run is scored on the benchmark's conditions
    assert refused.exit_code == 3
    assert "has 6 classes, and built-in" in refused.stderr + refused.stdout
    with pytest.raises(DataError, match=r"the classifier .*evaluator.pt: has 6 classes, and the data 24; only the first has 'door, red'"):
        find_classifier(here / "houses" / "evaluator.pt", task=ICLEVR)


def test_the_judge_says_how_good_it_is(here: Path) -> None:
    judge = json.loads((here / "judge.json").read_text(encoding="utf-8"))
    assert judge["images"] == sum(last_tenth([f"house-{index:05d}.png" for index in range(200)]))
    assert set(judge["classes"]) == set(HOUSE)
    known = find_classifier(here / "houses" / "evaluator.pt")
    assert known.task.classes == tuple(sorted(HOUSE))
    assert bool(known.warning) == (judge["accuracy"]["estimate"] < 0.95)
    checked = ddpmctl("evaluator", "check", "--data", "houses", "--size", 32)
    assert checked.exit_code == 0, checked.stderr
    assert f"{judge['accuracy']['estimate']:.4f}" in checked.stdout


def noise(count: int = 60, task: Task = Task(("a", "b"), 32, ("test",))) -> Dataset:  # noqa: B008
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (count, task.columns), dtype=np.uint8)
    return Dataset("noise", "k", rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8), labels, {}, None, task, tuple(f"{i}.png" for i in range(count)))


def test_a_judge_that_knows_little_warns(tmp_path: Path) -> None:
    *_, last = train_on_images(tmp_path / "j.pt", noise(), CPU, steps=2)
    assert isinstance(last, OwnTrained)
    assert last.checked.accuracy.estimate < 0.95
    assert "so its scores are worth little" in load_classifier(tmp_path / "j.pt").warning


def test_what_cannot_be_judged_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a classifier needs at least 40"):
        list(train_on_images(tmp_path / "j.pt", noise(39), CPU, steps=2))
    with pytest.raises(UsageError, match="its images have no labels"):
        list(train_on_images(tmp_path / "j.pt", noise(task=Task((), 32, ("test",))), CPU, steps=2))
    assert not list(tmp_path.iterdir())


def test_the_last_tenth_stays_when_images_are_added_and_never_splits_a_scene() -> None:
    names = [f"set/CLEVR_train_{scene:06d}_{frame}.png" for scene in range(300) for frame in range(3)]
    held = last_tenth(names)
    assert 0.05 < held.mean() < 0.15
    assert (held.reshape(-1, 3) == held.reshape(-1, 3)[:, :1]).all()
    assert (last_tenth([*names, "more.png"])[:-1] == held).all()
    assert last_tenth(["1.png", "2.png"]).sum() == 1


def test_a_classifier_is_found_in_the_cache_and_its_absence_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDPMCTL_CACHE_DIR", str(tmp_path / "cache"))
    task = Task(("a", "b"), 32, ("test",))
    with pytest.raises(NoClassifierError, match=r"to train one: ddpmctl evaluator train --data .*data --size 32"):
        find_classifier(None, tmp_path / "data", task)
    stored_classifier(task).parent.mkdir(parents=True)
    list(train_on_images(stored_classifier(task), noise(task=task), CPU, steps=1))
    assert find_classifier(None, tmp_path / "data", task).task.key == task.key


def test_a_classifier_in_the_cache_never_replaces_the_built_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDPMCTL_CACHE_DIR", str(tmp_path / "cache"))
    built_in = find_classifier()
    stored_classifier(ICLEVR).parent.mkdir(parents=True)
    list(train_on_images(stored_classifier(ICLEVR), noise(task=Task(("a", "b"), 32, ("test",))), CPU, steps=1))
    assert find_classifier().sha256 == built_in.sha256


def test_the_grids_default_labels_are_the_datas_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDPMCTL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    clevr(tmp_path / "data", 60)  # has colours and shapes, as i-CLEVR has, but other ones
    made = ddpmctl("train", *TINY, "--data", "data", "--name", "r")
    assert made.exit_code == 0, made.stderr
    grid = ddpmctl("denoise-grid", "runs/r", "--out", "grid.png")
    assert grid.exit_code == 0, grid.stderr


@pytest.mark.parametrize("kind", ["unlabelled", "no judge"])
def test_without_a_judge_training_goes_on_with_loss_and_grids(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDPMCTL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    if kind == "unlabelled":
        unlabelled(tmp_path / "data", 40)
    else:
        houses(tmp_path / "data", 64)
    made = ddpmctl("train", *TINY, "--data", "data", "--name", "r")
    assert made.exit_code == 0, made.stderr
    assert ("no labels to score" if kind == "unlabelled" else "ddpmctl evaluator train --data data --size 32") in made.stderr
    record = read_record(tmp_path / "runs" / "r")
    assert [(one.epoch, one.accuracy, one.evaluator) for one in record.scored] == [(1, {}, "none"), (2, {}, "none")]
    assert (tmp_path / "runs" / "r" / "checkpoints" / "epoch2.pth").exists()
    assert (tmp_path / "runs" / "r" / "samples" / "epoch2_test.png").exists()
    assert record.run.pointer("best") == record.run.pointer("latest")
    on = ddpmctl("train", "--resume", "runs/r", "--override", "epochs", "--epochs", 3)
    assert on.exit_code == 0, on.stderr
    assert "newest checkpoint is used" in ddpmctl("show", "runs/r", "--out", "show.png").stdout
    assert ddpmctl("runs").exit_code == 0
    other = ddpmctl("train", *TINY, "--data", "data", "--name", "s", "--seed", 1)
    assert other.exit_code == 0
    refused = ddpmctl("compare", "runs/r", "runs/s", "--recorded", "--out", "c.png")
    assert refused.exit_code == 3
    assert "was trained without a classifier" in refused.stderr
    if kind == "unlabelled":
        assert ddpmctl("sample", "runs/r", "-n", 3, "--out", "made").exit_code == 0
        assert len(list((tmp_path / "made").glob("000-image-*.png"))) == 3
        assert "leave --labels out" in ddpmctl("sample", "runs/r", "--labels", "x", "--out", "made").stderr
