"""The command export: what it writes, scores and refuses, and what reads it again."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image, ImageChops

import ddpmctl as package
from ddpmctl.checkpoints.format import load_checkpoint, save_checkpoint
from ddpmctl.runs.sources import RunSources
from ddpmctl.task import Task

from .conftest import TINY, ddpmctl, train
from .exports import random_checkpoint

FEW = ("--sampler", "ddim", "--steps", 2)


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "model"
    done = ddpmctl("export", run, "--to", "safetensors", "--out", out, "--licence", "mit")
    assert done.exit_code == 0, done.stderr
    assert "differ by at most 0 of 255 levels" in done.stderr
    return out


def made(folder: Path, *arguments: object) -> list[Image.Image]:
    done = ddpmctl("sample", *arguments, "-l", "red cube", "-l", "blue sphere,cyan cylinder", *FEW, "--out", folder)
    assert done.exit_code == 0, done.stderr
    return [Image.open(file) for file in sorted(folder.glob("00*.png"))]


def test_sample_and_evaluate_take_the_folder_for_the_checkpoint(run: Path, exported: Path, tmp_path: Path) -> None:
    pairs = zip(made(tmp_path / "a", run), made(tmp_path / "b", exported), strict=True)
    assert not any(ImageChops.difference(*pair).getbbox() for pair in pairs)
    scores = []
    for one in (next((run / "checkpoints").glob("*.pth")), exported):
        done = ddpmctl("evaluate", one, "--conditions", "test", *FEW, "--json", tmp_path / "s.json")
        assert done.exit_code == 0, done.stderr
        scores.append(json.loads((tmp_path / "s.json").read_text())["checkpoints"][0]["scores"])
    best = package.load(run)
    assert package.load(exported).checkpoint.recorded == best.checkpoint.recorded
    assert scores[0]["test"].keys() == scores[1]["test"].keys()


def test_the_card_can_be_read_by_a_hub(run: Path, exported: Path) -> None:
    text = (exported / "README.md").read_text(encoding="utf-8")
    head, body = text.split("---\n")[1:3]
    values = {key: json.loads(value) for key, value in (line.split(": ", 1) for line in head.splitlines())}
    assert values["license"] == "mit"
    assert values["library_name"] == "ddpmctl"
    metrics = values["model-index"][0]["results"][0]["metrics"]
    assert [re.sub(r"[\d.]+", "#", one["name"]) for one in metrics[:1]] == ["accuracy on test, # % interval # to #"]
    best = package.load(run).checkpoint
    assert f"Checkpoint: sha256 {best.sha256}" in body
    assert "benchmark, 4 scenes" in body
    assert str(run.parent) not in text
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load(head) == values


def test_training_starts_from_the_folder(exported: Path, tmp_path: Path) -> None:
    run = train(tmp_path / "runs", "--epochs", 1, "--lr", 1e-12, "--weights", exported, scenes=5)
    before, after = load_checkpoint(exported / "model.safetensors").weights, package.load(run).checkpoint.weights
    moved = [
        name
        for name in before
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked")) and not torch.allclose(before[name], after[name], atol=1e-5)
    ]
    assert not moved
    assert RunSources.load(run / "data.json").weights == load_checkpoint(exported / "model.safetensors").sha256
    assert ddpmctl("train", "--resume", run, "--override", "epochs", "--epochs", 2).exit_code == 0
    for arguments, reason in (
        ((*TINY, "--scenes", 4, "--act", "relu", "--weights", exported), "--act: relu is not that of --weights"),
        (("--resume", run, "--weights", exported), "--weights: cannot be combined with --resume"),
        ((*TINY, "--scenes", 4, "--weights", exported, "--size", 32), "is for images of 64x64 pixels"),
    ):
        refused = ddpmctl("train", *arguments, "--epochs", 1, "--runs-dir", tmp_path / "other")
        assert refused.exit_code in (2, 3), refused.stderr
        assert reason in refused.stderr
    small = package.train(epochs=1, weights=exported, runs_dir=tmp_path / "py", scenes=4, timesteps=3, batch_size=8, save_every=1)
    assert small.config.model == load_checkpoint(exported / "model.safetensors").config.model


def test_a_folder_in_use_and_damaged_files_are_refused(run: Path, exported: Path, tmp_path: Path) -> None:
    assert ddpmctl("export", run, "--out", exported).exit_code == 2
    (tmp_path / "bad.pth").write_bytes(b"PK no")
    broken = ddpmctl("export", tmp_path / "bad.pth", "--out", tmp_path / "out")
    assert broken.exit_code == 3
    assert not (tmp_path / "out").exists()
    for number, spoil in enumerate((lambda data: data[:-8], lambda data: struct.pack("<Q", 2**40) + data[8:], lambda data: b"", lambda data: data + b"x")):
        folder = tmp_path / f"damaged{number}"
        folder.mkdir()
        (folder / "config.json").write_bytes((exported / "config.json").read_bytes())
        (folder / "model.safetensors").write_bytes(spoil((exported / "model.safetensors").read_bytes()))
        refused = ddpmctl("sample", folder, "-l", "red cube", "--out", tmp_path / "images")
        assert refused.exit_code == 3, refused.stderr
        assert "is not a file of safetensors, or is damaged" in refused.stderr


def test_a_foreign_checkpoint_is_exported_as_what_it_is_taken_for(run: Path, tmp_path: Path) -> None:
    content = load_checkpoint(next((run / "checkpoints").glob("*.pth"))).weights
    torch.save(content, tmp_path / "foreign.pth")
    assumed = ("--assume", "timesteps=3", "--assume", "act=relu")
    done = ddpmctl("export", tmp_path / "foreign.pth", *assumed, "--repeats", 0, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert "carries no settings: taken as context-unet, act relu" in done.stderr
    assert load_checkpoint(tmp_path / "out" / "model.safetensors").config.model.act == "relu"
    wrong = ddpmctl("export", tmp_path / "foreign.pth", "--assume", "net=unet", "--out", tmp_path / "wrong")
    assert wrong.exit_code == 3
    assert "foreign.pth" in wrong.stderr
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (None, "config.json"),
        ({"format": "other"}, "is not that of an exported ddpmctl checkpoint"),
        ({"weights": {}}, "is not that of an exported ddpmctl checkpoint"),
        ({"config": {}}, "the weights are not those of"),
        ({"config": {"model": {"net": "none"}}}, "settings are invalid|missing or invalid"),
        ({"task": {"classes": ["a"]}}, "missing or invalid"),
    ],
)
def test_settings_that_do_not_fit_are_refused(exported: Path, tmp_path: Path, change: dict[str, object] | None, reason: str) -> None:
    (tmp_path / "model.safetensors").write_bytes((exported / "model.safetensors").read_bytes())
    if change is not None:
        content = json.loads((exported / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**content, **change}))
    refused = ddpmctl("sample", tmp_path, "-l", "red cube", "--out", tmp_path / "images")
    assert refused.exit_code == 3, refused.stderr
    assert re.search(reason, refused.stderr)


def test_weights_of_another_network_are_refused(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((exported / "config.json").read_bytes())
    weights = safetensors.torch.load_file(exported / "model.safetensors")
    first = next(name for name, value in weights.items() if value.ndim == 4)
    for spoiled in (
        {**weights, "more": torch.zeros(2)},
        {**weights, first: weights[first][:1].clone()},
        {**weights, first: torch.full_like(weights[first], torch.nan)},
    ):
        safetensors.torch.save_file(spoiled, tmp_path / "model.safetensors")
        refused = ddpmctl("sample", tmp_path, "-l", "red cube", "--out", tmp_path / "images")
        assert refused.exit_code == 3, refused.stderr


def test_half_rounds_the_weights_and_the_card_scores_them(run: Path, exported: Path, tmp_path: Path) -> None:
    done = ddpmctl("export", run, "--half", "--out", tmp_path / "half")
    assert done.exit_code == 0, done.stderr
    assert "differ by at most 0 of 255 levels" in done.stderr
    before, after = (safetensors.torch.load_file(folder / "model.safetensors") for folder in (exported, tmp_path / "half"))
    for name, value in before.items():
        assert after[name].dtype == (torch.float16 if value.is_floating_point() else value.dtype)
        assert torch.equal(after[name], value.to(after[name].dtype))
    assert "weights rounded to float16" in (tmp_path / "half" / "README.md").read_text(encoding="utf-8")
    scored = ddpmctl("evaluate", tmp_path / "half", "--json", "-")
    pooled = json.loads(scored.stdout)["checkpoints"][0]["scores"]
    card = (tmp_path / "half" / "README.md").read_text(encoding="utf-8")
    assert all(f"| {name} | {score['accuracy']:.4f} |" in card for name, score in pooled.items())
    again = package.load(tmp_path / "half").sample("red cube", **{"sampler": "ddim", "steps": 2})
    assert again[0].size == (64, 64)


def test_half_refuses_weights_that_float16_cannot_hold(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path / "c.pth", Task(("a",), 32, ("test",)), net="unet")
    name = next(iter(checkpoint.weights))
    checkpoint.weights[name].view(-1)[0] = 1e5
    save_checkpoint(tmp_path / "c.pth", checkpoint.config, checkpoint.weights, checkpoint.task, epoch=1)
    refused = ddpmctl("export", tmp_path / "c.pth", "--half", "--out", tmp_path / "out")
    assert refused.exit_code == 3
    assert f"{name} has values over 65504" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_two_models_in_a_form_for_one_are_refused(run: Path, tmp_path: Path) -> None:
    refused = ddpmctl("export", run, "--beside", run, "--out", tmp_path / "out")
    assert refused.exit_code == 2
    assert "--beside: --to safetensors exports one model; only --to page can show a second one" in refused.stderr
    other = random_checkpoint(tmp_path / "c.pth", Task(("a",), 32, ("test",)))
    differ = ddpmctl("export", run, "--beside", other.path, "--to", "page", "--out", tmp_path / "p.html")
    assert differ.exit_code == 3
    assert "classes" in differ.stderr
    named = ddpmctl("export", run, "--to", "page", "--out", tmp_path / "page.png")
    assert named.exit_code == 2
    assert "must end in .html" in named.stderr
    assert not (tmp_path / "p.html").exists()
