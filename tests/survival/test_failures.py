"""Failures during a run: full disks, concurrent training, signals, NaN and inf, too little memory, unexpected errors."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ddpmctl.checkpoints.format import load_checkpoint
from ddpmctl.config import Config
from ddpmctl.device import make_compute_device
from ddpmctl.errors import UsageError
from ddpmctl.runs.folder import Run
from ddpmctl.sampling.pipeline import SamplingPipeline, sample_images
from ddpmctl.sampling.requests import requests_for
from ddpmctl.training.state import training_state
from ddpmctl.training.trainer import Trainer

from ..conftest import TINY, ddpmctl, load_tensors, train
from ..test_cli_errors import refused
from .test_resume import dataset, edited, result_of

__all__ = ["dataset"]
PYTHON = [sys.executable, "-m", "ddpmctl"]
posix = pytest.mark.skipif(os.name != "posix", reason="signals and mounts are POSIX")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# Disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A mounted disk of eight megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small disk can be mounted by root on Linux only")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_run_that_does_not_fit_on_the_disk_is_refused_before_it_starts(small_disk: Path) -> None:
    line = refused(2, "train", *TINY, "--epochs", 500, "--scenes", 4, "--runs-dir", small_disk / "runs")
    assert "500 checkpoints" in line
    assert "--keep" in line
    assert "free" in line
    assert not (small_disk / "runs").exists()


@pytest.mark.slow
@posix
def test_a_full_disk_loses_nothing_and_the_run_resumes_after_space_is_freed(small_disk: Path) -> None:
    command = [*PYTHON, "train", *TINY, "--minutes", "10", "--scenes", "4", "--keep", "0", "--runs-dir", str(small_disk), "--name", "r"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("epoch 2 "):
                break
        with (small_disk / "ballast").open("wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(4096)):
                pass
        rest = process.stderr.read()
        assert process.wait(60) == 2
    assert "make room" in rest
    assert "Traceback" not in rest
    step = load_tensors(small_disk / "r" / "state.pt")[0]["counters"]["step"]
    assert step > 0
    for file in (small_disk / "r" / "checkpoints").iterdir():
        load_checkpoint(file)
    (small_disk / "ballast").unlink()
    with subprocess.Popen([*PYTHON, "train", "--resume", str(small_disk / "r")], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("epoch ") and "loss" in line:
                break
        process.send_signal(signal.SIGTERM)
        process.stderr.read()
        assert process.wait(60) == 143
    assert load_tensors(small_disk / "r" / "state.pt")[0]["counters"]["step"] > step
    epochs = [m["epoch"] for m in map(json.loads, (small_disk / "r" / "metrics.jsonl").read_text().splitlines()) if m["event"] == "epoch"]
    assert epochs == list(range(1, len(epochs) + 1))


@pytest.mark.parametrize("inodes", [3, 9, 11, 14, 17])
def test_a_disk_on_which_no_more_files_fit_loses_nothing(inodes: int, small_disk: Path, run: Path) -> None:
    """Files are made in this order: the run's folder, the state, the log, the checkpoint, the grids, the pointers."""
    subprocess.run(["mount", "-o", f"remount,nr_inodes={inodes}", str(small_disk)], check=True)
    command = ("train", *TINY, "--epochs", 2, "--scenes", 4, "--runs-dir", small_disk / "runs", "--name", "r")
    assert "no inodes" in refused(2, *command)
    subprocess.run(["mount", "-o", "remount,nr_inodes=1000", str(small_disk)], check=True)
    assert not list(small_disk.rglob("*.tmp"))
    result = ddpmctl(*command, "--exist-ok", "resume")
    assert result.exit_code == 0, result.output
    folder = small_disk / "runs" / "r"
    assert (folder / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {path.name for path in (run / "checkpoints").iterdir()}
    assert len((folder / "results.csv").read_text().splitlines()) == 3


def test_a_write_to_a_full_disk_keeps_the_old_file(small_disk: Path) -> None:
    from ddpmctl.files import write_verified

    write_verified(small_disk / "x", b"old")
    with pytest.raises(UsageError, match="make room"):
        write_verified(small_disk / "x", bytes(9_000_000))
    (small_disk / "ballast").write_bytes(bytes(max(0, shutil.disk_usage(small_disk).free - 8192)))
    with pytest.raises(UsageError, match="make room"):
        write_verified(small_disk / "x", bytes(10_000))
    assert (small_disk / "x").read_bytes() == b"old"
    assert sorted(path.name for path in small_disk.iterdir()) == ["ballast", "x"]


def test_a_read_only_disk_is_refused(small_disk: Path, run: Path) -> None:
    shutil.copytree(run, small_disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert "run" in refused(2, "train", "--resume", small_disk / "run")
    assert "--runs-dir" in refused(2, "train", *TINY, "--epochs", 1, "--scenes", 1, "--runs-dir", small_disk)
    assert "--out" in refused(2, "sample", small_disk / "run", "--labels", "red cube", "-o", small_disk / "out")


@pytest.mark.slow
def test_keep_never_deletes_the_best_and_the_last(tmp_path: Path) -> None:
    folder = train(tmp_path, "--epochs", 6, "--keep", 1)
    left = {path.name for path in (folder / "checkpoints").iterdir()}
    run = Run(folder)
    best, latest = run.pointer("best"), run.pointer("latest")
    assert best is not None
    assert latest is not None
    assert {best.name, latest.name} <= left
    assert len(left) == len({best.name, latest.name}) + 1
    assert latest.name.startswith("epoch6_")


def test_what_keep_does_not_keep_is_deleted_on_resume_too(run: Path, tmp_path: Path) -> None:
    """As where the run was stopped between its last score and the deletion."""
    shutil.copytree(run, tmp_path / "r")
    stopped = Run(tmp_path / "r")
    spared = {stopped.pointer("best"), stopped.pointer("latest")}
    assert len(spared) < len(list(stopped.checkpoints.iterdir()))
    assert ddpmctl("train", "--resume", stopped.folder, "--keep", 0).exit_code == 0
    assert set(stopped.checkpoints.iterdir()) == spared


def test_checkpoints_after_the_state_are_not_counted_among_those_that_are_kept(run: Path, tmp_path: Path) -> None:
    """Their epochs are trained again, so that the end is the same as without a stop."""
    shutil.copytree(run, tmp_path / "r")
    copied = Run(tmp_path / "r")
    for file in copied.checkpoints.iterdir():
        file.unlink()
    for epoch in range(1, 6):
        (copied.checkpoints / f"epoch{epoch}_0.5_0.5.pth").touch()
    copied.point("best", copied.checkpoints / "epoch1_0.5_0.5.pth")
    copied.point("latest", copied.checkpoints / "epoch4_0.5_0.5.pth")
    copied.retain(1, until=4)
    assert sorted(int(file.name[5]) for file in copied.checkpoints.iterdir()) == [1, 3, 4, 5]


# Other processes and signals


@pytest.mark.slow
@posix
@pytest.mark.parametrize("what", ["deleted", "moved", "replaced"])
def test_a_run_whose_folder_is_gone_ends_in_one_line_and_makes_no_other(what: str, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "r"
    command = [*PYTHON, "train", *TINY, "--epochs", "100000", "--save-every", "100000", "--scenes", "16", "--runs-dir", str(tmp_path), "--name", "r"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("epoch 1 "):
                break
        folder.rename(tmp_path / "other")
        if what == "replaced":
            shutil.copytree(run, folder)
            (folder / ".lock").touch()
        elif what == "deleted":
            shutil.rmtree(tmp_path / "other")
        before = files_of(folder) if folder.exists() else None
        rest = process.stderr.read()
        assert process.wait(60) == 2, rest
    (line,) = [line for line in rest.splitlines() if line.startswith("error:")]
    assert line.startswith(f"error: {folder}: is gone or is another run now")
    assert (files_of(folder) if folder.exists() else None) == before
    assert folder.exists() == (what == "replaced")


@pytest.mark.parametrize("still_trains", [True, False])
def test_of_two_that_begin_a_run_with_exist_ok_one_trains_and_the_other_says_so_or_goes_on_with_it(tmp_path: Path, still_trains: bool) -> None:
    from ddpmctl.training.session import TrainingRequest, run_training

    config = Config().replace(width=8, timesteps=3, batch_size=8, epochs=1, precision="fp32", device="cpu", threads=1)
    request = TrainingRequest(config, scenes=7 + still_trains, runs_dir=tmp_path, exist_ok=True)  # not in the cache yet
    late, early = run_training(request), run_training(request)
    assert type(next(late)).__name__ == "Progress"  # of rendering: it has found no run of this name
    assert not list(tmp_path.iterdir())
    for event in early:
        if still_trains and type(event).__name__ == "Prepared":
            break
    if still_trains:
        with pytest.raises(UsageError, match=f"process {os.getpid()} .* is training this run"):
            list(late)
    else:
        assert "exists already; resuming it" in " ".join(getattr(event, "text", "") for event in late)
    early.close()
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
@posix
def test_a_halted_trainer_keeps_its_lock_and_its_half_written_file(tmp_path: Path) -> None:
    """As by Ctrl-Z or a suspended machine, in the middle of a save."""
    folder = tmp_path / "r"
    small = [*TINY, "--minutes", "60", "--save-every", "100000", "--checkpoint-minutes", "0.0001", "--scenes", "16"]
    with subprocess.Popen([*PYTHON, "train", *small, "--runs-dir", str(tmp_path), "--name", "r"], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("epoch 2 "):
                break
        for _ in range(200):
            while not (halted := list(folder.glob(".state.pt.*.tmp"))):
                time.sleep(0.0001)
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.05)
            if halted := list(folder.glob(".state.pt.*.tmp")):
                break
            process.send_signal(signal.SIGCONT)
        try:
            assert halted
            before = load_tensors(folder / "state.pt")[0]["counters"]["step"]
            assert f"process {process.pid}" in refused(2, "train", "--resume", folder)
            assert "running" in ddpmctl("show", folder, "-o", tmp_path / "s.png").stdout
            assert list(folder.glob(".state.pt.*.tmp")) == halted
        finally:
            process.send_signal(signal.SIGCONT)
            process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(60) == 143, rest
    assert load_tensors(folder / "state.pt")[0]["counters"]["step"] > before
    assert not list(folder.glob(".*.tmp"))


@posix
def test_a_step_within_which_the_process_was_halted_counts_as_long_as_the_others(dataset: object) -> None:
    from ddpmctl.cli.signals import StopRequest, stop_is_noted

    config = Config().replace(width=8, timesteps=6, batch_size=4, epochs=1, precision="fp32", device="cpu", threads=1)
    signals = StopRequest()
    trainer = Trainer(config, make_compute_device(config.device), dataset, continued=lambda: signals.continued)  # type: ignore[arg-type]
    trainer.step()
    others = trainer.counters.seconds

    class Halting(nn.Module):
        """The network, but a second passes in it, after which the process is told to go on."""

        def forward(self, *inputs: Tensor) -> Tensor:
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGCONT)
            out: Tensor = trainer.net(*inputs)
            return out

    trainer.forward = Halting()
    with stop_is_noted(signals):
        trainer.step()
    assert signals.continued == 1
    assert trainer.counters.seconds == pytest.approx(2 * others)


@pytest.mark.slow
@posix
def test_a_second_training_process_is_refused_and_the_lock_of_a_killed_one_is_released(tmp_path: Path) -> None:
    command = [*PYTHON, "train", *TINY, "--epochs", "100000", "--save-every", "100000", "--scenes", "16", "--runs-dir", str(tmp_path), "--name", "r"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("epoch 1 "):
                break
        message = refused(2, "train", "--resume", tmp_path / "r")
        assert f"process {process.pid}" in message
        assert "is training this run" in message
        process.kill()
    (tmp_path / "r" / "checkpoints" / ".epoch1.pth.1-abc.tmp").write_bytes(b"half")
    for path in (tmp_path / "r").rglob("*"):  # modification times in the future
        os.utime(path, (time.time() + 10**7,) * 2)
    before = load_tensors(tmp_path / "r" / "state.pt")[0]["counters"]["step"]
    with subprocess.Popen([*PYTHON, "train", "--resume", str(tmp_path / "r")], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("epoch "):
                break
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(60) == 143
    assert "--resume" in rest
    assert not list((tmp_path / "r").rglob(".*.tmp"))
    assert load_tensors(tmp_path / "r" / "state.pt")[0]["counters"]["step"] > before


@pytest.mark.slow
@posix
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("stage", ["rendering", "sampling"])
def test_signals_end_rendering_and_evaluation_cleanly(stage: str, number: signal.Signals, code: int, run: Path, tmp_path: Path) -> None:
    commands = {
        "rendering": ["train", *TINY, "--epochs", "1", "--runs-dir", str(tmp_path / "runs")],
        "sampling": ["evaluate", str(run), "--repeats", "200", "--json", str(tmp_path / "x.json")],
    }
    environment = {**os.environ, "DDPMCTL_CACHE_DIR": str(tmp_path / "cache")}
    with subprocess.Popen([*PYTHON, *commands[stage]], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline and not _is_busy(process.pid):
            time.sleep(0.05)
        process.send_signal(number)
        rest = process.stderr.read()
        assert process.wait(60) == code, rest
    assert "Traceback" not in rest
    (last,) = rest.splitlines()[-1:]
    assert last.startswith({signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}[number])
    assert ("are kept in the cache" in last) == (stage == "sampling")
    assert "error" not in rest
    assert not list(tmp_path.rglob("*.tmp"))
    assert not (tmp_path / "x.json").exists()
    assert list((tmp_path / "runs").glob("*")) == []


def _is_busy(process: int) -> bool:
    """Whether a process has used six seconds of processor time: it is then past its imports."""
    return sum(map(int, Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK") > 6


# NaN and inf


@pytest.fixture
def overflowing(run: Path, tmp_path: Path) -> Path:
    """A run whose next step overflows: its last bias is so large that the square of an error is not finite."""
    shutil.copytree(run, tmp_path / "r")
    state = load_tensors(tmp_path / "r" / "state.pt")[0]
    edited(tmp_path / "r" / "state.pt", net={**state["net"], next(reversed(state["net"])): torch.full((3,), 1e30)})
    return tmp_path / "r"


def test_a_loss_that_is_not_finite_stops_before_the_optimizer_step(overflowing: Path) -> None:
    before = {name: content for name, content in files_of(overflowing).items() if name.startswith(("checkpoints", "results"))}
    result = ddpmctl("train", "--resume", overflowing, "--epochs", 3, "--override", "epochs")
    assert result.exit_code == 4, result.output
    assert "the loss is not finite at step 5 (epoch 3, learning rate 0.0001)" in result.stderr
    assert "--on-nan rollback" in result.stderr
    known = json.loads((overflowing / "diagnosis.json").read_text())
    assert (known["step"], known["lr"], known["loss"], len(known["batch_indices"]), known["state"]) == (5, 1e-4, "inf", 8, "state.pt")
    assert known["last_checkpoint"].startswith("epoch2_")
    assert load_tensors(overflowing / "state.pt")[0]["counters"]["step"] == 4
    assert {name: content for name, content in files_of(overflowing).items() if name.startswith(("checkpoints", "results"))} == before


def test_sampled_images_that_are_not_finite_stop_the_run_and_write_no_checkpoint(tmp_path: Path) -> None:
    folder = train(tmp_path, "--epochs", 1, "--ema", 0.9)
    average = {name: value * 3e37 if value.is_floating_point() else value for name, value in load_tensors(folder / "state.pt")[0]["average"].items()}
    edited(folder / "state.pt", average=average)
    before = files_of(folder / "checkpoints")
    result = ddpmctl("train", "--resume", folder, "--epochs", 2, "--override", "epochs")
    assert result.exit_code == 4, result.output
    assert "the sampled images are not finite after step 4" in result.stderr
    assert json.loads((folder / "diagnosis.json").read_text())["step"] == 4
    assert files_of(folder / "checkpoints") == before


def test_rollback_halves_the_learning_rate_three_times_and_is_logged(overflowing: Path) -> None:
    result = ddpmctl("train", "--resume", overflowing, "--epochs", 3, "--override", "epochs", "--on-nan", "rollback")
    assert result.exit_code == 4, result.output
    assert "rolled back 3 times already" in result.stderr
    rollbacks = [m for m in map(json.loads, (overflowing / "metrics.jsonl").read_text().splitlines()) if m["event"] == "rollback"]
    assert [(m["step"], m["lr_scale"], m["count"]) for m in rollbacks] == [(4, 0.5, 1), (4, 0.25, 2), (4, 0.125, 3)]
    assert load_tensors(overflowing / "state.pt")[0]["counters"]["rollbacks"] == 3


def test_after_a_rollback_the_learning_rate_is_lower(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "r")
    counters = load_tensors(tmp_path / "r" / "state.pt")[0]["counters"]
    edited(tmp_path / "r" / "state.pt", counters={**counters, "lr_scale": 0.25, "rollbacks": 2})
    assert ddpmctl("train", "--resume", tmp_path / "r", "--epochs", 3, "--override", "epochs").exit_code == 0
    epochs = [m for m in map(json.loads, (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()) if m["event"] == "epoch"]
    assert [m["lr"] for m in epochs] == [1e-4, 1e-4, 0.25e-4]


def test_a_step_that_is_not_finite_changes_no_weights(dataset: object, tmp_path: Path) -> None:
    from ddpmctl.errors import DivergedError

    config = Config().replace(width=8, timesteps=6, batch_size=4, epochs=1, ema=0.9, precision="fp32", device="cpu")
    trainer = Trainer(config, make_compute_device(config.device), dataset)  # type: ignore[arg-type]
    trainer.step()
    before = {name: p.detach().clone() for name, p in trainer.net.named_parameters()}
    trainer.loss.signal.fill_(float("inf"))
    with pytest.raises(DivergedError, match="loss is not finite at step 2"):
        trainer.step()
    assert all(torch.equal(p, before[name]) for name, p in trainer.net.named_parameters())
    assert trainer.counters.step == 1
    with torch.no_grad():
        next(trainer.net.parameters()).fill_(float("nan"))
    with pytest.raises(DivergedError, match=r"weights .* are not finite"):
        training_state(trainer)


# Memory


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

    def name_objects(self, x: Tensor, time: Tensor) -> Tensor:
        return x.flatten(1)[:, :24]


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
    if event == "open" and str(arguments[0]).endswith(".pth"):
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
    shell = "exec \"$@\"" if call else "ulimit -v 400000; exec \"$@\""
    arguments = [sys.executable, "-c", LIMITED.format(limit=call), command, run, *flags, "--threads", "1"]
    done = subprocess.run(["sh", "-c", shell, "sh", *map(str, arguments)], capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert words in line
    assert list(tmp_path.iterdir()) == []
    assert files_of(run) == before


@pytest.mark.slow
@posix
def test_every_file_is_closed_again(run: Path, tmp_path: Path) -> None:
    """Sixteen open files are enough, however many checkpoints there are."""
    for epoch in range(24):
        shutil.copy(next((run / "checkpoints").glob("*.pth")), tmp_path / f"epoch{epoch}_0.5_0.5.pth")
    (tmp_path / "one.json").write_text('[["red cube"]]')
    arguments = [*PYTHON, "evaluate", tmp_path, "--conditions", tmp_path / "one.json", "--no-confirm", "--json", "-"]
    done = subprocess.run(["sh", "-c", "ulimit -n 16; exec \"$@\"", "sh", *map(str, arguments)], capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["checkpoints"]) == 24


# Unexpected errors


def test_an_unexpected_error_is_one_line_and_a_file_in_the_run_without_data(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no such kernel")

    shutil.copytree(run, tmp_path / "run")
    monkeypatch.setattr(torch, "_foreach_add_", broken)
    result = ddpmctl("train", "--resume", tmp_path / "run", "--epochs", 3, "--override", "epochs")
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    (file,) = (tmp_path / "run").glob("crash-*.txt")
    assert str(file) in line
    message = file.read_text()
    assert "RuntimeError: no such kernel" in message
    assert "in step" in message
    assert "tensor(" not in message
