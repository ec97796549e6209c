"""What a command does beside other busy processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddpmctl.cli.busy import LOADAVG, others_are_busy

TINY = ["--scenes", "2", "--epochs", "1", "--width", "8", "--timesteps", "4", "--batch-size", "6", "--device", "cpu", "--precision", "fp32"]
SHOW = "import os\nfrom ddpmctl.cli.busy import spin_briefly_beside_others\nspin_briefly_beside_others()\nprint(os.environ.get('GOMP_SPINCOUNT'))"


def beside_a_busy_process(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run Python while another process keeps a core busy."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=True, timeout=120)
        finally:
            other.kill()


@pytest.mark.parametrize(
    ("content", "busy"), [("0.50 0.41 0.30 1/105 4711\n", False), ("0.00 0.01 0.05 3/105 4711\n", True), ("", False), ("not numbers at all", False)]
)
def test_another_runnable_process_means_busy(content: str, busy: bool, tmp_path: Path) -> None:
    (tmp_path / "loadavg").write_text(content)
    assert others_are_busy(tmp_path / "loadavg") is busy
    assert not others_are_busy(tmp_path / "missing")


@pytest.mark.skipif(not LOADAVG.exists(), reason="the system does not tell how many processes are runnable")
@pytest.mark.parametrize(("given", "shown"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")])
def test_threads_spin_briefly_beside_a_busy_process_unless_the_user_says_how_they_wait(given: dict[str, str], shown: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    assert beside_a_busy_process(["-c", SHOW], {**environment, **given}).stdout.strip() == shown


@pytest.mark.skipif(not LOADAVG.exists(), reason="the system does not tell how many processes are runnable")
@pytest.mark.parametrize("threads", [[], ["--threads", "2"]])
def test_train_names_one_thread_beside_a_busy_process_unless_a_number_is_given(threads: list[str], tmp_path: Path) -> None:
    done = beside_a_busy_process(["-m", "ddpmctl", "train", *TINY, *threads, "--runs-dir", str(tmp_path)], dict(os.environ))
    assert ("--threads 1 may train faster" in done.stderr) is (not threads)
