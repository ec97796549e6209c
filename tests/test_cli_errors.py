"""Invalid input on the command line: one line, exit code 2 or 3, no incomplete files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpmctl.iclevr import INDEX

from .conftest import TINY, ddpmctl


def refused(code: int, *arguments: object) -> str:
    """Run a command that must fail with ``code`` and one line on stderr, and return that line."""
    result = ddpmctl(*arguments)
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.output
    return lines[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small, complete folder in the lab's layout."""
    data = tmp_path / "data"
    (data / "iclevr").mkdir(parents=True)
    labels = {"CLEVR_train_000000_0.png": ["red cube"], "CLEVR_train_000000_1.png": ["red cube", "blue sphere"]}
    for name in labels:
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)).save(data / "iclevr" / name)
    (data / "objects.json").write_text(json.dumps(INDEX))
    (data / "train.json").write_text(json.dumps(labels))
    for name in ("test", "new_test"):
        (data / f"{name}.json").write_text(json.dumps([["red cube"], ["gray cylinder", "blue sphere"]]))
    return data


def train_on(data: Path, tmp_path: Path) -> tuple[object, ...]:
    return ("train", *TINY, "--epochs", 1, "--data", data, "--runs-dir", tmp_path / "runs")


def test_the_small_folder_is_valid(folder: Path, tmp_path: Path) -> None:
    assert ddpmctl(*train_on(folder, tmp_path)).exit_code == 0


@pytest.mark.parametrize("command", ["sample", "denoise-grid"])
@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("red cub", "did you mean 'red cube'"),
        ("", "a label is missing"),
        ("red cube,,blue sphere", "a label is missing"),
        (",", "a label is missing"),
        ("red cube,cube red", "named twice"),
        ("red", "did you mean 'red cube' or 'red sphere' or 'red cylinder'?"),
        ("red blue cube", "did you mean 'red cube' or 'blue cube'?"),
        ("gray cube sphere", "did you mean 'gray cube' or 'gray sphere'?"),
        ("red cube blue sphere", "several labels are separated by commas"),
        ("animal", "a label is a colour (gray, "),
    ],
)
def test_bad_labels(command: str, labels: str, expected: str, run: Path, tmp_path: Path) -> None:
    line = refused(2, command, run, "--labels", labels, "-o", tmp_path / "out" / "x.png")
    assert expected in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["objects.json", "train.json", "test.json", "new_test.json"])
def test_a_missing_json_file_is_named(name: str, folder: Path, tmp_path: Path) -> None:
    (folder / name).unlink()
    assert name in refused(3, *train_on(folder, tmp_path))
    assert not list((tmp_path / "runs").glob("*"))


def test_a_missing_image_is_named(folder: Path, tmp_path: Path) -> None:
    (folder / "iclevr" / "CLEVR_train_000000_1.png").unlink()
    assert "CLEVR_train_000000_1.png" in refused(3, *train_on(folder, tmp_path))


def test_a_truncated_image_is_named(folder: Path, tmp_path: Path) -> None:
    image = folder / "iclevr" / "CLEVR_train_000000_1.png"
    image.write_bytes(image.read_bytes()[:200])
    assert image.name in refused(3, *train_on(folder, tmp_path))
    assert not list((tmp_path / "runs").glob("*"))


def test_an_unknown_label_is_named(folder: Path, tmp_path: Path) -> None:
    (folder / "train.json").write_text(json.dumps({"CLEVR_train_000000_0.png": ["pink cube"]}))
    line = refused(3, *train_on(folder, tmp_path))
    assert "pink cube" in line
    assert "CLEVR_train_000000_0.png" in line


def test_no_data_folder(tmp_path: Path) -> None:
    assert "nowhere" in refused(2, *train_on(tmp_path / "nowhere", tmp_path))


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 torn"])
@pytest.mark.parametrize("command", [("sample", "--labels", "red cube"), ("denoise-grid", "--labels", "red cube"), ("evaluate",)])
def test_a_file_that_is_not_a_checkpoint(command: tuple[str, ...], content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "broken.pth"
    file.write_bytes(content)
    result = ddpmctl(*command, file)
    assert result.exit_code == 3, result.output
    assert "broken.pth" in result.stderr
    assert "is not a checkpoint, or is damaged" in result.stderr


def test_a_checkpoint_of_another_network(tmp_path: Path) -> None:
    file = tmp_path / "other.pth"
    torch.save({"encoder.weight": torch.zeros(3, 3)}, file)
    line = refused(3, "sample", file, "--labels", "red cube", "-o", tmp_path / "out")
    assert "other.pth" in line
    assert "report's network" in line


def test_a_checkpoint_whose_weights_do_not_fit_its_settings(run: Path, tmp_path: Path) -> None:
    content = torch.load(next((run / "checkpoints").glob("*.pth")), weights_only=True)
    content["config"]["model"]["width"] = 16
    torch.save(content, tmp_path / "wrong.pth")
    line = refused(3, "sample", tmp_path / "wrong.pth", "--labels", "red cube", "-o", tmp_path / "out")
    assert "wrong.pth" in line
    assert "width 16" in line


def test_a_missing_checkpoint(tmp_path: Path) -> None:
    assert "nowhere.pth" in refused(2, "sample", tmp_path / "nowhere.pth", "--labels", "red cube", "-o", tmp_path / "out")


def test_there_is_no_run(tmp_path: Path) -> None:
    assert "train first" in refused(2, "show", "--runs-dir", tmp_path)
    assert "train first" in refused(2, "evaluate", "--runs-dir", tmp_path / "nowhere")


def test_output_below_a_file_cannot_be_written(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for command, out in (("sample", "file/out"), ("denoise-grid", "file/x.png")):
        line = refused(2, command, run, "--labels", "red cube", "-o", tmp_path / out)
        assert "--out" in line
        assert "file" in line
    assert (tmp_path / "file").read_text() == "in the way"


def test_runs_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "--runs-dir" in refused(2, "train", *TINY, "--epochs", 1, "--scenes", 1, "--runs-dir", tmp_path / "file")


def test_resume_on_a_folder_that_is_not_a_run(tmp_path: Path) -> None:
    assert "is not a run" in refused(2, "train", "--resume", tmp_path)
    assert "there is no such file or folder, and no run of this name in runs/" in refused(2, "train", "--resume", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--act", "gellu"], "did you mean 'gelu'"),
        (["--schedule", "cosin"], "did you mean 'cosine'"),
        (["--preset", "fast"], "none of report, quick"),
        (["--epochs", "0"], "out of range"),
        (["--lr", "fast"], "is not a number"),
        (["--epochs", "3", "--minutes", "3"], "give one budget"),
        (["--device", "tpu9"], "--device"),
        (["--name", "a/b"], "not a folder name"),
        (["--scenes", "0"], "--scenes"),
        (["--scenes", "3", "--data", "x"], "--scenes"),
        (["--config", "nowhere.toml"], "nowhere.toml"),
        (["--evaluator", "nowhere.pth"], "nowhere.pth"),
    ],
)
def test_bad_flags_of_train(arguments: list[str], expected: str, tmp_path: Path) -> None:
    line = refused(2, "train", *TINY, "--scenes", 1, "--runs-dir", tmp_path / "runs", *arguments)
    assert expected in line


def test_a_network_that_does_not_recognise_objects_cannot_be_trained_to_name_them(tmp_path: Path) -> None:
    line = refused(2, "train", *TINY, "--scenes", 1, "--runs-dir", tmp_path / "runs", "--label-loss", "0.1")
    assert line == "error: --label-loss: the network context-unet does not recognise objects; give --label-loss 0, or --net fine-unet"
    of_preset = refused(2, "train", "--preset", "quick", "--net", "unet", "--dry-run", "--scenes", 1, "--runs-dir", tmp_path / "runs")
    assert "give --label-loss 0 and --error-loss 0 and --particles 1, or --net fine-unet" in of_preset
    line = refused(2, "train", *TINY, "--scenes", 1, "--runs-dir", tmp_path / "runs", "--error-loss", "0.1")
    assert line == "error: --error-loss: the network context-unet does not estimate its errors; give --error-loss 0, or --net fine-unet"
    assert not (tmp_path / "runs").exists()


def test_a_network_that_does_not_recognise_objects_cannot_choose_between_particles(run: Path, tmp_path: Path) -> None:
    line = refused(2, "train", *TINY, "--scenes", 1, "--runs-dir", tmp_path / "runs", "--particles", 2)
    assert line == "error: --particles: the network context-unet does not recognise objects; give --particles 1"
    assert refused(2, "sample", run, "--labels", "red cube", "--particles", 2, "-o", tmp_path / "out") == line
    assert line.removeprefix("error: ") in ddpmctl("evaluate", run, "--particles", 2).stderr
    assert not (tmp_path / "runs").exists()


def test_a_network_that_cannot_predict_the_objective_cannot_be_trained(tmp_path: Path) -> None:
    line = refused(2, "train", *TINY, "--scenes", 1, "--runs-dir", tmp_path / "runs", "--net", "fine-unet", "--objective", "eps")
    assert line == "error: --objective: the network fine-unet does not predict eps; give --objective x0"
    assert not (tmp_path / "runs").exists()


def test_more_steps_than_the_model_has(run: Path, tmp_path: Path) -> None:
    line = refused(2, "sample", run, "--labels", "red cube", "--steps", 7, "-o", tmp_path / "out")
    assert "7 is more than the model's 3 timesteps" in line


def test_text_from_files_is_not_markup(tmp_path: Path) -> None:
    file = tmp_path / "[red]x[bold].pth"
    file.write_bytes(b"no checkpoint")
    assert "[red]x[bold].pth" in refused(3, "sample", file, "--labels", "red cube", "-o", tmp_path / "out")


def test_resume_with_another_evaluator(run: Path, tmp_path: Path) -> None:
    from torchvision.models import resnet18

    net = resnet18(weights=None)
    net.fc = torch.nn.Sequential(torch.nn.Linear(512, 24), torch.nn.Sigmoid())
    torch.save({"model": net.state_dict()}, tmp_path / "lab.pth")
    assert "name the file with --evaluator" in refused(2, "train", "--resume", run, "--evaluator", tmp_path / "lab.pth")


@pytest.mark.parametrize("size", ["8x8", "320", "\u00b2x9", "1e3x2", "99999x99999"])
def test_invalid_sizes(size: str, tmp_path: Path) -> None:
    assert "--size" in refused(2, "data", "render", tmp_path / "d", "--size", size)
    assert not (tmp_path / "d").exists()


TORN = b"epoch,loss,test,new_test,test_exact,new_test_exact,evaluator\n1,2,36,0.5,0,0,x\n"


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"epoch,loss\n1,2\n", TORN])
def test_a_damaged_results_file(content: bytes, run: Path, tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "config.toml").write_bytes((run / "config.toml").read_bytes())
    (tmp_path / "r" / "results.csv").write_bytes(content)
    assert "results.csv" in refused(3, "compare", run, tmp_path / "r", "-o", tmp_path / "c.png")


def test_one_file_for_two_outputs(run: Path, tmp_path: Path) -> None:
    assert "overwrite" in refused(2, "evaluate", run, "--json", tmp_path / "x", "--csv", tmp_path / "x")


@pytest.mark.parametrize(
    ("variables", "toml", "words"),
    [
        ({"DDPMCTL_LR": "abc"}, "", "DDPMCTL_LR: 'abc' is not a number"),
        ({"DDPMCTL_LR": "-1"}, "", "DDPMCTL_LR: -1 is out of range"),
        ({"DDPMCTL_ACT": "gello"}, "", "DDPMCTL_ACT: unknown activation 'gello'"),
        ({}, 'lr = "abc"', "my.toml: lr: 'abc' is not a number"),
        ({}, "[model]\nwidth = 4", "my.toml: width: 4 is out of range"),
    ],
)
def test_a_bad_value_is_reported_under_the_name_of_its_source(
    variables: dict[str, str], toml: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "my.toml").write_text(toml)
    assert words in refused(2, "train", "--print-config", "--config", tmp_path / "my.toml")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("denoise-grid", "--labels", "red cube", "-o", "a.txt"), "--out: a.txt must end in .png"),
        (("denoise-grid", "--labels", "red cube", "--gif", "a.png"), "--gif: a.png must end in .gif"),
        (("compare", "a", "b", "-o", "a.txt"), "--out: a.txt must end in .png"),
    ],
)
def test_an_output_file_of_the_wrong_kind_is_refused_before_any_work(
    arguments: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in refused(2, *arguments)
    assert not list(tmp_path.iterdir())
