"""Signals during training, rendering and evaluation."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from torch import Tensor, nn

from ddpmctl.config import Config
from ddpmctl.device import make_compute_device
from ddpmctl.training.trainer import Trainer

from ..conftest import TINY
from .tools import PYTHON, posix


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
    assert all(".partial." in file.name for file in tmp_path.rglob("*.tmp")), "only images that the next start goes on from"
    assert not (tmp_path / "x.json").exists()
    assert list((tmp_path / "runs").glob("*")) == []


def _is_busy(process: int) -> bool:
    """Whether a process has used ten seconds of processor time: it is then past its imports, also on a slow machine."""
    return sum(map(int, Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK") > 10
