"""Exports: the same model for other programs, proven equal, and back."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image, ImageChops

import ddpmctl as package
from ddpmctl.checkpoints.format import Checkpoint, load_checkpoint, save_checkpoint
from ddpmctl.config import PRESETS, Config
from ddpmctl.device import ComputeDevice
from ddpmctl.diffusion.randomness import ImageNoise
from ddpmctl.errors import UsageError
from ddpmctl.evaluation.evaluate import pipeline_for
from ddpmctl.export.card import Card
from ddpmctl.export.exporting import NotEqualError, export
from ddpmctl.export.half import halved
from ddpmctl.export.html_page import rounded
from ddpmctl.export.plan import sampling_plan
from ddpmctl.registry import EXPORTS, NETWORKS, OBJECTIVES, SAMPLERS
from ddpmctl.runs.sources import RunSources
from ddpmctl.sampling.pipeline import label_tensor, to_uint8
from ddpmctl.sampling.requests import requests_for
from ddpmctl.task import Task
from ddpmctl.training.trainer import make_network

from .conftest import TINY, ddpmctl, train

FEW = ("--sampler", "ddim", "--steps", 2)
HOSTILE = Task(('a </script><img src=x onerror=alert(1)>, "b"', "`c`| ```"), 32, ("test",))


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


@pytest.mark.parametrize("net", NETWORKS.names())
@pytest.mark.parametrize("form", ["safetensors", *(pytest.param(form, marks=pytest.mark.slow) for form in EXPORTS.names() if form != "safetensors")])
@pytest.mark.parametrize(
    ("objective", "task"),
    [("eps", Task((), 32, ("test",))), ("x0", HOSTILE), ("v", Task(("a", "b", "c"), 128, ("test", "heldout"))), ("edm", Task(("a",), 32, ("test",)))],
)
def test_every_form_is_equal_for_every_network_objective_and_size(net: str, form: str, objective: str, task: Task, tmp_path: Path) -> None:
    if objective not in getattr(NETWORKS.get(net), "objectives", OBJECTIVES.names()):
        pytest.skip(f"{net} does not predict {objective}")
    checkpoint = random_checkpoint(tmp_path / "c.pth", task, net=net, objective=objective)
    result = finished(export([(checkpoint, Card(task.classes[0] if task.classes else "x", data="`d`|", licence='x"\n---\n'))], form, tmp_path / "out"))
    assert result.levels <= EXPORTS.get(form).levels
    assert result.call <= EXPORTS.get(form).call <= (1e-3 if form == "page" else 1e-4)
    if form == "page":
        return
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert text.count("\n---\n") == 1, "the head ends once"
    outside = re.sub(r"```.*?\n```|`[^`\n]*`", "", text.split("\n---\n", 1)[1], flags=re.S)
    assert "<" not in outside, "markup only within code"


def random_checkpoint(path: Path, task: Task, **settings: object) -> Checkpoint:
    torch.manual_seed(0)
    config = Config().replace(**{**PRESETS["quick"], "width": 16, "sampler": "ddim", "steps": 3, **settings})  # type: ignore[arg-type]
    net = make_network(config, task)
    for parameter in net.parameters():  # layers that start at zero would hide differences
        torch.nn.init.normal_(parameter, std=0.05)
    save_checkpoint(path, config, net.state_dict(), task, epoch=3)
    return load_checkpoint(path)


def finished(task: object) -> object:
    while True:
        try:
            next(task)  # type: ignore[call-overload]
        except StopIteration as end:
            return end.value


def test_an_export_that_differs_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = random_checkpoint(tmp_path / "c.pth", Task(("a",), 32, ("test",)))
    form = EXPORTS.get("safetensors")
    monkeypatch.setattr(form, "levels", -1)
    with pytest.raises(NotEqualError, match=r"differ .* by up to 0 of 255 levels, .*; nothing was written"):
        finished(export([(checkpoint, Card("x"))], "safetensors", tmp_path / "out"))
    assert [one.name for one in tmp_path.iterdir()] == ["c.pth"]


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


@pytest.mark.parametrize("sampler", SAMPLERS.names())
@pytest.mark.parametrize("objective", OBJECTIVES.names())
def test_the_plan_makes_the_samplers_images(sampler: str, objective: str, tmp_path: Path) -> None:
    settings = {"net": "unet", "objective": objective, "sampler": sampler, "timesteps": 20, "steps": 6, "guidance": 1.5, "guidance_from": 0.2, "eta": 0.5}
    checkpoint = random_checkpoint(tmp_path / "c.pth", Task(("a", "b"), 32, ("test",)), **settings)
    pipeline = pipeline_for(checkpoint, {"particles": 1}, ComputeDevice(torch.device("cpu"), "fp32"))
    requests = requests_for("sample", [("a",), ("a", "b")], seed=3)
    expected = list(pipeline.frames(requests))
    noise, labels = ImageNoise([one.key for one in requests], (3, 32, 32), torch.device("cpu")), label_tensor(requests, checkpoint.task)
    x, before = noise(), torch.zeros(())
    with torch.inference_mode():
        for step, frame in zip(sampling_plan(pipeline), expected[1:], strict=True):
            time = torch.full((2,), step.time)
            output, w = pipeline.net(x, labels, time), step.guidance
            output = (1 + w) * output - w * pipeline.net(x, torch.zeros_like(labels), time) if w else output
            (p, q, r), (a, b, c, d, e) = step.x0, step.next
            x0 = p * x + q * output + r
            x, before = a * x + b * x0 + c * before + e + (d * noise() if step.noise else 0), x0
            scale = max(1.0, float(frame.x_t.abs().max()))
            assert float((x - frame.x_t).abs().max()) < 1e-3 * scale


def test_the_program_beside_the_network_runs_alone(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path / "c.pth", Task(("door, red", "b"), 32, ("test",)))
    finished(export([(checkpoint, Card("x"))], "onnx", tmp_path / "out"))
    command = [sys.executable, "-I", str(tmp_path / "out" / "sample.py")]
    done = subprocess.run([*command, '"door, red",b', "--count", "3", "--out", str(tmp_path / "made")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(file.name for file in (tmp_path / "made").iterdir()) == ["0.png", "1.png", "2.png"]
    refused = subprocess.run([*command, "tree"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "the labels are door, red, b" in refused.stderr
    assert len((tmp_path / "out" / "sample.py").read_text().splitlines()) <= 70


NO_NETWORK = """
import socket, sys
import numpy as np

def refuse(*arguments):
    raise OSError("there is no network")

socket.socket.connect = socket.getaddrinfo = refuse
folder, noise, out = sys.argv[1:]
noise = np.load(noise)
texts = [*4 * ['"door, red"'], *4 * ['b, "door, red"']]
"""
OTHER_SIDE = {  # what a program does that knows only the folder
    "diffusers": """
sys.modules["ddpmctl"] = None  # an import of it would fail
import torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
assert len(pipeline("b").images) == 1
try:
    pipeline("tree")
except ValueError as error:
    assert "unknown label 'tree'; there are door, red, b" in str(error)
made = 255 * pipeline(texts, latents=torch.from_numpy(noise), output_type="np").images
""",
    "onnx": """
sys.modules["ddpmctl"] = sys.modules["torch"] = None
sys.path.insert(0, folder)
import sample
labels = np.array([*4 * [[1, 0]], *4 * [[1, 1]]], np.float32)
made = sample.sample(sample.load(folder), labels, lambda: noise)
""",
    "safetensors": """
from ddpmctl import load
made = np.stack([np.asarray(image) for image in load(folder, device="cpu", precision="fp32").sample(texts[::4], n=4, seed=1)])
""",
}


@pytest.mark.parametrize("sampler", ["ddim", "dpm++2m"])
@pytest.mark.parametrize("form", OTHER_SIDE)
def test_the_other_side_makes_the_images_in_a_process_of_its_own(form: str, sampler: str, tmp_path: Path) -> None:
    checkpoint = random_checkpoint(
        tmp_path / "c.pth", Task(("door, red", "b"), 32, ("test",)), net="unet", objective="v", sampler=sampler, guidance_to=0.9, particles=1
    )
    finished(export([(checkpoint, Card("x"))], form, tmp_path / "out"))
    requests = requests_for("sample", [("door, red",), ("b", "door, red")], seed=1, repeats=4)
    noise = ImageNoise([one.key for one in requests], (3, 32, 32), torch.device("cpu"))()
    np.save(tmp_path / "noise.npy", noise.numpy())
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    program = f"{NO_NETWORK}{OTHER_SIDE[form]}\nnp.save(out, made)"
    command = [sys.executable, "-c", program, str(tmp_path / "out"), str(tmp_path / "noise.npy"), str(tmp_path / "made.npy")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    pipeline = pipeline_for(checkpoint, {"particles": 1}, ComputeDevice(torch.device("cpu"), "fp32"))
    expected = to_uint8(list(pipeline.frames(requests))[-1].x_t).permute(0, 2, 3, 1).numpy().astype(float)
    assert np.abs(np.load(tmp_path / "made.npy") - expected).max() <= (0 if form == "safetensors" else 2)


@pytest.mark.slow
@pytest.mark.parametrize("form", [name for name in EXPORTS.names() if name != "safetensors"])
def test_samplers_that_draw_noise_are_equal_too(form: str, tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path / "c.pth", Task(("a", "b"), 32, ("test",)), net="unet", objective="eps", sampler="ddpm", timesteps=30, steps=None)
    result = finished(export([(checkpoint, Card("x"))], form, tmp_path / "out"))
    assert result.levels <= 2


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


def test_weights_of_a_page_are_rounded_to_nearest() -> None:
    values = torch.cat((torch.randn(10_000, generator=torch.Generator().manual_seed(0)), torch.tensor([0.0, -0.0, 1.00390625, 1.01171875])))
    kept = torch.from_numpy(rounded(values.numpy(), 7).view(np.float32))
    assert torch.equal(kept, values.bfloat16().float()), "bfloat16 has 7 bits"


@pytest.mark.slow
def test_the_network_of_half_is_half_as_large(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path / "c.pth", Task(("a",), 32, ("test",)), width=32)
    smaller = halved(checkpoint, tmp_path / "rounded")
    for name, one in (("full", checkpoint), ("half", smaller)):
        finished(export([(one, Card("x"))], "onnx", tmp_path / name))
    full, half = ((tmp_path / name / "network.onnx").stat().st_size for name in ("full", "half"))
    assert half < 0.75 * full
    assert str(Path(package.__file__).parent).encode() not in (tmp_path / "full" / "network.onnx").read_bytes(), "no path of this machine"


def test_two_models_in_a_form_for_one_are_refused(run: Path, tmp_path: Path) -> None:
    refused = ddpmctl("export", run, "--beside", run, "--out", tmp_path / "out")
    assert refused.exit_code == 2
    assert "--to safetensors: holds one model; --beside is for --to page" in refused.stderr
    other = random_checkpoint(tmp_path / "c.pth", Task(("a",), 32, ("test",)))
    differ = ddpmctl("export", run, "--beside", other.path, "--to", "page", "--out", tmp_path / "p.html")
    assert differ.exit_code == 3
    assert "classes" in differ.stderr
    named = ddpmctl("export", run, "--to", "page", "--out", tmp_path / "page.png")
    assert named.exit_code == 2
    assert "must end in .html" in named.stderr
    assert not (tmp_path / "p.html").exists()


def test_what_diffusers_has_no_scheduler_for_is_refused(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path / "c.pth", Task(("a",), 32, ("test",)), sampler="ddim", eta=0.5)
    with pytest.raises(UsageError, match=r"has no scheduler for the sampler ddim with eta over 0"):
        finished(export([(checkpoint, Card("x"))], "diffusers", tmp_path / "out"))
    assert [one.name for one in tmp_path.iterdir()] == ["c.pth"]
