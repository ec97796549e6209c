"""The forms of export, each proven equal, by itself and by the programs that read it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import ddpmctl as package
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
from ddpmctl.sampling.pipeline import label_tensor, to_uint8
from ddpmctl.sampling.requests import requests_for
from ddpmctl.task import Task

from .exports import HOSTILE, finished, random_checkpoint


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


def test_an_export_that_differs_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = random_checkpoint(tmp_path / "c.pth", Task(("a",), 32, ("test",)))
    form = EXPORTS.get("safetensors")
    monkeypatch.setattr(form, "levels", -1)
    with pytest.raises(NotEqualError, match=r"differ .* by up to 0 of 255 levels, .*; nothing was written"):
        finished(export([(checkpoint, Card("x"))], "safetensors", tmp_path / "out"))
    assert [one.name for one in tmp_path.iterdir()] == ["c.pth"]


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


def test_what_diffusers_has_no_scheduler_for_is_refused(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path / "c.pth", Task(("a",), 32, ("test",)), sampler="ddim", eta=0.5)
    with pytest.raises(UsageError, match=r"has no scheduler for the sampler ddim with eta over 0"):
        finished(export([(checkpoint, Card("x"))], "diffusers", tmp_path / "out"))
    assert [one.name for one in tmp_path.iterdir()] == ["c.pth"]
