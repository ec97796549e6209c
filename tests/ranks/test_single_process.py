"""A single process: commands that a scheduler may repeat, and no imports of distributed code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ddpmctl.config import DeviceConfig
from ddpmctl.device import make_compute_device
from ddpmctl.distributed.job import split
from ddpmctl.errors import UsageError

from ..conftest import TINY, ddpmctl
from ..test_cli_errors import refused


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_same_command_twice_is_one_run(tmp_path: Path) -> None:
    command = ("train", *TINY, "--epochs", 2, "--scenes", 4, "--runs-dir", tmp_path, "--exist-ok", "resume")
    assert ddpmctl(*command).exit_code == 0
    (run,) = tmp_path.iterdir()
    before = files_of(run)
    again = ddpmctl(*command)
    assert again.exit_code == 0, again.output
    assert "nothing to do" in again.stderr
    assert list(tmp_path.iterdir()) == [run]
    assert files_of(run) == before


def test_exist_ok_resumes_a_stopped_run(run: Path, tmp_path: Path) -> None:
    """The first process stops after one epoch, by SIGTERM."""
    from ..conftest import load_tensors

    command = ["train", *TINY, "--epochs", "2", "--scenes", "4", "--runs-dir", str(tmp_path), "--exist-ok", "resume"]
    code = (
        "import sys; from ddpmctl.training import loop\ninner = loop._end_epoch\n"
        "def dying(trainer):\n    event = inner(trainer)\n    import os, signal\n    os.kill(os.getpid(), signal.SIGTERM)\n    return event\n"
        "loop._end_epoch = dying\nsys.argv = ['ddpmctl', *sys.argv[1:]]\nfrom ddpmctl.cli.app import main\nmain()"
    )
    assert subprocess.run([sys.executable, "-c", code, *command], capture_output=True, check=False, timeout=100).returncode == 143
    (made,) = tmp_path.iterdir()
    assert load_tensors(made / "state.pt")[0]["counters"]["epoch"] == 1
    result = ddpmctl(*command)
    assert result.exit_code == 0, result.output
    assert "exists already; resuming it" in result.stderr
    assert (made / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lr", "0.01"], "lr: 0.0001 in the run, 0.01 now"),
        (["--scenes", "5"], "scenes: 4 in the run, 5 now"),
        (["--exist-ok", "overwrite"], "'overwrite' is not known"),
    ],
)
def test_exist_ok_refuses_a_run_with_other_settings(arguments: list[str], words: str, tmp_path: Path) -> None:
    command = ("train", *TINY, "--epochs", 1, "--scenes", 4, "--runs-dir", tmp_path, "--exist-ok", "resume")
    assert ddpmctl(*command).exit_code == 0
    before = files_of(tmp_path)
    assert words in refused(2, *command, *arguments)
    assert files_of(tmp_path) == before


def test_exist_ok_does_not_go_with_resume(run: Path) -> None:
    assert "--exist-ok" in refused(2, "train", "--resume", run, "--exist-ok", "resume")


def test_one_process_imports_no_distributed_code(tmp_path: Path) -> None:
    """Except what torch, torchvision and torch's weight averaging import themselves."""
    listing = "import json, sys; print(json.dumps([name for name in sys.modules if 'distributed' in name or 'parallel' in name or 'elastic' in name]))"
    themselves = "import torch, torchvision, torch.optim.swa_utils, torch.optim; "
    train = f"sys.argv = ['ddpmctl', *{[*TINY, '--epochs', '1', '--scenes', '4', '--runs-dir', str(tmp_path)]!r}]; sys.argv.insert(1, 'train')"
    ours = f"import sys; {train}\nfrom ddpmctl.cli.app import main\ntry:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
    loaded = []
    for code in (themselves + listing, ours + listing):
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100).stdout
        loaded.append(set(json.loads(out.splitlines()[-1])))
    ours = {"ddpmctl.distributed", "ddpmctl.distributed.job", "ddpmctl.distributed.replicas"}
    assert loaded[1] - loaded[0] <= {"torch.distributed.algorithms", *ours}, loaded[1] - loaded[0]


@pytest.mark.parametrize(("device", "local", "words"), [("cuda", 97, "'cuda:97' is not available"), ("cuda:0", 1, "give --device cuda")])
def test_each_process_uses_its_own_gpu(device: str, local: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make_compute_device(DeviceConfig(device=device), local)


@pytest.mark.parametrize(("count", "pieces"), [(8, 1), (8, 2), (8, 3), (5, 3), (1, 3), (0, 2), (64, 7)])
def test_shares_are_complete_in_order_and_even(count: int, pieces: int) -> None:
    shares = [range(count)[split(count, pieces, index)] for index in range(pieces)]
    assert [place for share in shares for place in share] == list(range(count))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert sizes[0] == max(sizes)
