"""Too little memory, and too few open files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ddpmctl.config import Config
from ddpmctl.device import make_compute_device
from ddpmctl.errors import UsageError, out_of_memory
from ddpmctl.nets.recognition import FoundObjects
from ddpmctl.sampling.pipeline import SamplingPipeline, sample_images
from ddpmctl.sampling.requests import requests_for
from ddpmctl.training.trainer import Trainer

from ..conftest import TINY, ddpmctl
from .tools import PYTHON, files_of, posix, result_of


class LimitedMemory(nn.Module):
    """A network on a device with memory for ``room`` images at a time."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.calls = room, []
        self.scale = nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor, labels: Tensor, time: Tensor) -> Tensor:
        self.calls.append(len(x))
        if len(x) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.scale * x + labels.sum(1).view(-1, 1, 1, 1) * time.view(-1, 1, 1, 1)

    def find_objects(self, x: Tensor, time: Tensor) -> FoundObjects:
        return FoundObjects(x.flatten(1)[:, : 24 * 9].view(-1, 24, 3, 3))


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("room", [1, 5, 64])
def test_sampling_uses_smaller_batches_if_memory_is_short_and_gives_the_same_images(room: int, particles: int) -> None:
    from ddpmctl.diffusion.denoiser import Diffusion

    config = Config().replace(timesteps=6, sampler="ddpm", particles=particles)
    requests = requests_for("x", [("red cube",), ("blue sphere", "red cube")], seed=3, repeats=9)
    made = []
    for net in (LimitedMemory(room), LimitedMemory(1000)):
        compute = make_compute_device(config.replace(precision="fp32", device="cpu").device)
        pipeline = SamplingPipeline(net, Diffusion.of(config.diffusion), config.sampling, compute)
        made.append(result_of(sample_images(pipeline, requests, 16)))
    assert torch.equal(made[0], made[1])


def test_training_names_a_micro_batch_that_fits(dataset: object) -> None:
    config = Config().replace(width=8, timesteps=6, batch_size=12, epochs=1, precision="fp32", device="cpu")
    trainer = Trainer(config, make_compute_device(config.device), dataset)  # type: ignore[arg-type]
    trainer.net = trainer.forward = LimitedMemory(4)
    with pytest.raises(UsageError, match=r"12 images at a time do not fit .* --micro-batch 3 does, and accumulates 4 of them"):
        trainer.step()


@pytest.mark.parametrize(("flags", "ends"), [([], 2), (["--micro-batch", 2], 0)])
def test_a_batch_that_does_not_fit_is_refused_before_the_first_step_and_the_named_micro_batch_runs(tmp_path: Path, flags: list[object], ends: int) -> None:
    code = (
        "import sys, torch\nfrom ddpmctl.nets.context_unet import ContextUnet as Net\ninner = Net.forward\n"
        "def forward(net, x, *rest):\n    if len(x) > 3 and net.training:\n        raise torch.OutOfMemoryError('CUDA out of memory')\n"
        "    return inner(net, x, *rest)\nNet.forward = forward\nfrom ddpmctl.cli.app import main\nmain()"
    )
    arguments = ["train", *TINY, "--batch-size", 4, "--epochs", 1, "--scenes", 4, "--runs-dir", tmp_path, *flags]
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == ends, done.stderr
    assert ("--micro-batch 2 does" in done.stderr) == bool(ends)


def test_accumulated_gradients_equal_those_of_the_whole_batch(dataset: object) -> None:
    """In a network without batch norm they are equal up to rounding."""
    gradients = []
    for micro in (None, 3):
        config = Config().replace(net="unet", width=32, timesteps=6, batch_size=8, epochs=1, precision="fp32", device="cpu", micro_batch=micro)
        trainer = Trainer(config, make_compute_device(config.device), dataset)  # type: ignore[arg-type]
        trainer.step()
        gradients.append([p.grad for p in trainer.net.parameters() if p.grad is not None])
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


# Sets a limit when a checkpoint is opened: the command line, and torch for the most part, are loaded by then.
LIMITED = """import resource, sys
from ddpmctl.cli.app import main
def limit(event, arguments):
    if event == "open" and str(arguments[0]).endswith((".pth", ".png")):
        resource.setrlimit({limit})
if "{limit}":
    sys.addaudithook(limit)
main()
"""


LIMITS = {
    "an address space too small for torch": ("evaluate", "", "too little memory"),
    "no more memory": ("sample", "resource.RLIMIT_AS, (int(open('/proc/self/statm').read().split()[0]) * 4096,) * 2", "too little memory"),
    "no more open files": ("evaluate", "resource.RLIMIT_NOFILE, (3, 3)", "too many files are open"),
}


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the size of the address space is read from /proc")
@pytest.mark.parametrize("limit", LIMITS)
def test_too_little_memory_and_too_few_open_files_are_said_in_one_line(limit: str, run: Path, tmp_path: Path) -> None:
    command, call, words = LIMITS[limit]
    before = files_of(run)
    flags = ["--labels", "red cube", "--count", "64", "--out", tmp_path / "out"] if command == "sample" else ["--repeats", "2", "--html", tmp_path / "out.html"]
    shell = 'exec "$@"' if call else 'ulimit -v 400000; exec "$@"'
    arguments = [sys.executable, "-c", LIMITED.format(limit=call), command, run, *flags, "--threads", "1"]
    done = subprocess.run(["sh", "-c", shell, "sh", *map(str, arguments)], capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert words in line
    assert list(tmp_path.iterdir()) == []
    assert files_of(run) == before


@posix
def test_too_few_open_files_are_not_taken_for_damaged_images(tmp_path: Path) -> None:
    assert ddpmctl("data", "render", tmp_path / "lab", "--scenes", 2).exit_code == 0
    program = LIMITED.format(limit="resource.RLIMIT_NOFILE, (3, 3)")
    done = subprocess.run([sys.executable, "-c", program, "data", "verify", tmp_path / "lab"], capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 2, done.stderr
    assert "too many files are open" in done.stderr
    assert "cannot be decoded" not in done.stdout + done.stderr


@pytest.mark.slow
@posix
def test_every_file_is_closed_again(run: Path, tmp_path: Path) -> None:
    """Sixteen open files are enough, however many checkpoints there are."""
    for epoch in range(24):
        shutil.copy(next((run / "checkpoints").glob("*.pth")), tmp_path / f"epoch{epoch}_0.5_0.5.pth")
    (tmp_path / "one.json").write_text('[["red cube"]]')
    arguments = [*PYTHON, "evaluate", tmp_path, "--conditions", tmp_path / "one.json", "--no-confirm", "--json", "-"]
    done = subprocess.run(["sh", "-c", 'ulimit -n 16; exec "$@"', "sh", *map(str, arguments)], capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["checkpoints"]) == 24


def test_a_library_for_which_there_is_no_memory_is_no_unexpected_error() -> None:
    """Ctypes, which loads some of torch's libraries, raises an OSError without a number."""
    assert out_of_memory(OSError("libtorch_global_deps.so: failed to map segment from shared object"))
    assert not out_of_memory(OSError("libtorch_global_deps.so: no such file"))
