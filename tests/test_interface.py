"""The Python interface gives what the commands give."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ddpmctl as package
from ddpmctl import DataError, Model, UsageError
from ddpmctl.progress import Progress
from ddpmctl.training.events import Evaluated, Prepared

from .conftest import ddpmctl, train

FEW = {"sampler": "ddim", "steps": 2}
FLAGS = ("--sampler", "ddim", "--steps", 2)
SMALL = {"width": 8, "timesteps": 3, "batch_size": 8, "precision": "fp32", "threads": 1, "save_every": 1, "scenes": 4}


@pytest.fixture(scope="module")
def model(run: Path) -> Model:
    return package.load(run)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


def read(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def test_import_is_light_and_tells_its_names() -> None:
    code = "import sys, ddpmctl; print(sorted({'torch', 'numpy', 'PIL', 'typer', 'rich'} & set(sys.modules)), 'load' in dir(ddpmctl), ddpmctl.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "True", package.__version__]
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        package.lode  # noqa: B018


def test_sample_gives_the_bytes_of_the_command(run: Path, model: Model, tmp_path: Path) -> None:
    done = ddpmctl("sample", run, "-l", "red cube, blue sphere", "-l", "cyan cylinder", "-n", 2, "--seed", 5, *FLAGS, "--out", tmp_path)
    assert done.exit_code == 0, done.stderr
    files = sorted(tmp_path.glob("00*.png"))
    stages = []
    made = model.sample(["red cube, blue sphere", ["cyan cylinder"]], 2, seed=5, progress=stages.append, **FEW)
    assert len(made) == len(files) == 4
    assert all((pixels(image) == read(file)).all() for image, file in zip(made, files, strict=True))
    assert isinstance(stages[-1], Progress)
    assert stages[-1].done == stages[-1].total


def test_denoise_ends_at_the_sampled_image(model: Model) -> None:
    frames = list(model.denoise("red cube", seed=3, **FEW))
    assert [frame.t for frame in frames] == [3, *sorted((frame.t for frame in frames[1:]), reverse=True)]
    assert frames[0].x0_hat is None
    assert frames[-1].t == 0
    assert (pixels(frames[-1].x_t) == pixels(model.sample("red cube", seed=3, **FEW)[0])).all()
    assert model.task.size == frames[1].x0_hat.width  # type: ignore[union-attr]


def test_score_is_that_of_evaluate(run: Path, model: Model, tmp_path: Path) -> None:
    done = ddpmctl("sample", run, "--conditions", "test", "--layout", "lab", *FLAGS, "--out", tmp_path / "test")
    assert done.exit_code == 0, done.stderr
    scored = ddpmctl("evaluate", "--images", tmp_path / "test", "--conditions", "test", "--json", tmp_path / "s.json")
    assert scored.exit_code == 0, scored.stderr
    theirs = json.loads((tmp_path / "s.json").read_text())["scores"]["test"]
    from ddpmctl.benchmark.embedded import conditions

    wanted = conditions()["test"]
    found = model.score([Image.open(tmp_path / "test" / f"{index}.png") for index in range(len(wanted))], wanted)
    assert found.to_dict()["accuracy"] == theirs["accuracy"]
    assert found.probabilities.shape == (len(wanted), 24)
    assert found.interval.low <= found.score.accuracy <= found.interval.high
    with pytest.raises(UsageError, match="2 label sets for 3 images"):
        model.score([np.zeros((64, 64, 3), np.uint8)] * 3, ["red cube", "blue cube"])
    with pytest.raises(UsageError, match="must be uint8 of 64x64"):
        model.score([np.zeros((32, 32, 3), np.uint8)], "red cube")


def test_what_the_model_does_not_know_is_refused(model: Model) -> None:
    with pytest.raises(UsageError, match="unknown label 'red pyramid'"):
        model.sample("red pyramid")
    with pytest.raises(UsageError, match="labels: are missing"):
        model.sample()
    with pytest.raises(UsageError, match="stepz: is not a setting"):
        model.sample("red cube", stepz=3)
    with pytest.raises(UsageError, match="steps: 0 is out of range"):
        model.sample("red cube", steps=0)
    with pytest.raises(UsageError, match="does not recognise objects"):
        model.sample("red cube", particles=4)
    with pytest.raises(UsageError, match="one image at a time"):
        model.denoise(["red cube", "blue cube"])
    with pytest.raises(UsageError, match="n: must be"):
        model.sample("red cube", 0)


def test_evaluate_and_its_forms_are_those_of_the_command(run: Path, tmp_path: Path) -> None:
    found = package.evaluate(run, repeats=2, conditions="test", **FEW)
    done = ddpmctl("evaluate", run, "--repeats", 2, "--conditions", "test", *FLAGS, "--json", tmp_path / "e.json", "--csv", tmp_path / "e.csv")
    assert done.exit_code == 0, done.stderr
    assert json.loads(json.dumps(found.to_dict())) == json.loads((tmp_path / "e.json").read_text())
    assert f"test {found.results[0].scores['test'].accuracy:.4f} (" in repr(found)
    assert found.selection is not None
    frame = found.to_pandas()
    assert list(frame["conditions"]) == ["test"] * len(found.results)
    assert list(frame.columns) == (tmp_path / "e.csv").read_text().splitlines()[0].split(",")
    with pytest.raises(UsageError, match=r"no such file"):
        package.evaluate(tmp_path / "none")


def test_a_damaged_checkpoint_is_told(run: Path, tmp_path: Path) -> None:
    file = next((run / "checkpoints").glob("*.pth"))
    (tmp_path / "a.pth").write_bytes(file.read_bytes())
    (tmp_path / "b.pth").write_bytes(file.read_bytes()[:-1000])
    found = package.evaluate([tmp_path / "a.pth", tmp_path / "b.pth"], conditions="test", **FEW)
    assert [failure.path.name for failure in found.failed] == ["b.pth"]
    with pytest.raises(DataError, match=r"b\.pth"):
        package.evaluate(tmp_path / "b.pth", conditions="test", **FEW)


def test_compare_is_that_of_the_command(run: Path, tmp_path: Path) -> None:
    other = train(tmp_path / "runs", "--epochs", 1, "--act", "relu")
    found = package.compare([run, other], repeats=2, conditions="test", **FEW)
    done = ddpmctl("compare", run, other, "--repeats", 2, "--conditions", "test", *FLAGS, "--out", tmp_path / "c.png", "--json", tmp_path / "c.json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(json.dumps(found.to_dict())) == json.loads((tmp_path / "c.json").read_text())
    assert repr(found) == "\n".join(found.sentences) != ""
    assert len(found.to_pandas()) == 1
    with pytest.raises(UsageError, match="give two or more runs"):
        package.compare([run], repeats=2, conditions="test", **FEW)


def test_train_gives_the_weights_of_the_command(tmp_path: Path) -> None:
    by_command = train(tmp_path / "a", "--epochs", 1)
    events = package.train(epochs=1, runs_dir=tmp_path / "b", **SMALL)
    with pytest.raises(UsageError, match="no folder yet"):
        _ = events.folder
    seen = list(events)
    assert isinstance(next(event for event in seen if not isinstance(event, Progress)), Prepared)
    assert [event.epoch for event in seen if isinstance(event, Evaluated)] == [1]
    mine, theirs = (package.load(folder).checkpoint.weights for folder in (events.folder, by_command))
    assert all((mine[name] == theirs[name]).all() for name in theirs)
    on = package.train(resume=events.folder, epochs=2).finish()
    assert on.checkpoint.epoch in (1, 2)
    assert on.config.training.epochs == 2 or on.checkpoint.epoch == 1


def test_train_refuses_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDPMCTL_EPOCHS", "7")  # of the command line alone
    assert package.train(preset="quick", runs_dir=tmp_path).config.training.minutes == 5
    with pytest.raises(UsageError, match="fast: is not a setting"):
        package.train(fast=True)
    with pytest.raises(UsageError, match="--preset: 'slow' is none of"):
        package.train(preset="slow")
    with pytest.raises(UsageError, match="resume: a run keeps"):
        package.train(resume=tmp_path, size=32)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_training_goes_on(tmp_path: Path) -> None:
    events = package.train(epochs=2, runs_dir=tmp_path, **SMALL)
    for event in events:
        if isinstance(event, Evaluated):
            break
    events.close()
    assert package.train(resume=events.folder).finish().path.exists()
    whole = package.train(epochs=2, runs_dir=tmp_path / "whole", **SMALL)
    list(whole)
    mine, theirs = (package.load(next(folder.glob("checkpoints/epoch2_*.pth"))).checkpoint.weights for folder in (events.folder, whole.folder))
    assert all((mine[name] == theirs[name]).all() for name in theirs)
