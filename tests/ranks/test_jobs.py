"""Whole jobs under a real torchrun: shared evaluation and sampling, killed ranks, signals, and ranks that differ."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

import ddpmctl as package

from ..conftest import TINY, ddpmctl, load_tensors
from ..survival.conftest import small_disk
from ..survival.kills import RECIPE, differences
from ..test_cli_errors import folder
from .launch import finished, several, torchrun, workers

__all__ = ["folder", "small_disk"]
pytestmark = [several, pytest.mark.slow]
EPOCHS = 4
OFTEN = ["--checkpoint-minutes", "0.004", "--save-every", "2"]


def errors_in(message: str) -> list[str]:
    return [line for line in message.splitlines() if line.startswith("error:")]


# Evaluating and sampling


def test_evaluate_gives_the_same_results_as_one_process(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def arguments(name: str) -> list[object]:
        return ["evaluate", run, "--repeats", 2, "--json", tmp_path / f"{name}.json", "--csv", tmp_path / f"{name}.csv", "--grid", tmp_path / name]

    monkeypatch.setenv("DDPMCTL_CACHE_DIR", str(tmp_path / "one's cache"))
    alone = ddpmctl(*arguments("one"), "--threads", 1)
    assert alone.exit_code == 0, alone.output
    out, message = finished(torchrun(2, *arguments("two"), environment={"DDPMCTL_CACHE_DIR": str(tmp_path / "two's cache")}))
    assert out == alone.stdout
    assert "Traceback" not in message
    for suffix in ("json", "csv"):
        assert (tmp_path / f"two.{suffix}").read_bytes() == (tmp_path / f"one.{suffix}").read_bytes()
    grids = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert len(grids[0]) == 6
    assert grids[0] == grids[1]


def test_evaluate_lists_a_broken_file_once_and_scores_the_rest(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "checkpoints", tmp_path / "c")
    (tmp_path / "c" / "broken.pth").write_bytes(b"no checkpoint")
    process = torchrun(2, "evaluate", tmp_path / "c", "--json", "-", environment={"DDPMCTL_CACHE_DIR": str(tmp_path / "cache")})
    out, message = finished(process, code=1)
    assert len(json.loads(out)["checkpoints"]) == 2
    assert message.count("skipped") == 1
    (line,) = errors_in(message)
    assert "1 of 3 checkpoints could not be scored" in line


def test_sample_gives_the_same_images_as_one_process(run: Path, tmp_path: Path) -> None:
    def arguments(name: str) -> list[object]:
        return ["sample", run, "--labels", "red cube,blue sphere", "--labels", "gray cylinder", "-n", 50, "-o", tmp_path / name, "--threads", 1]

    assert ddpmctl(*arguments("one")).exit_code == 0
    finished(torchrun(2, *arguments("two")))
    made = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert len(made[0]) == 101
    assert made[0] == made[1]


def test_a_command_for_one_process_is_refused(run: Path) -> None:
    _, message = finished(torchrun(2, "compare", run, "--recorded"), code=1)
    (line,) = errors_in(message)
    assert "this command runs in one process" in line


# Kills and signals


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks without interruption."""
    runs = tmp_path_factory.mktemp("uninterrupted")
    finished(torchrun(2, "train", *RECIPE, *OFTEN, "--epochs", EPOCHS, "--runs-dir", runs, "--name", "r"))
    return runs / "r"


def wait_for_rows(process: subprocess.Popen[str], run: Path, rows: int) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1][-3000:]
        if (run / "timing.jsonl").exists() and len((run / "timing.jsonl").read_text().splitlines()) >= rows:
            return
        time.sleep(0.01)
    raise AssertionError("it does not train")


@pytest.mark.parametrize(("rank", "number"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (0, signal.SIGSTOP)])
def test_a_killed_or_frozen_rank_leads_to_a_restart_and_the_same_result(rank: int, number: signal.Signals, uninterrupted: Path, tmp_path: Path) -> None:
    arguments = ["--exist-ok", "resume", "--peer-timeout", 6]
    process = torchrun(2, "train", *RECIPE, *OFTEN, "--epochs", EPOCHS, "--runs-dir", tmp_path, "--name", "r", *arguments, restarts=1)
    wait_for_rows(process, tmp_path / "r", 4)  # two epochs, one evaluation and a third epoch
    os.kill(workers(process.pid)[rank], number)
    _, message = finished(process)
    assert "exists already; resuming it" in message
    assert "Traceback (most recent call last)" not in message
    assert differences(uninterrupted, tmp_path / "r") == []


def test_two_launchers_are_one_job_which_survives_a_kill(uninterrupted: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    arguments = ["train", *RECIPE, *OFTEN, "--epochs", EPOCHS, "--runs-dir", tmp_path, "--name", "r", "--exist-ok", "resume"]
    launchers = [torchrun(1, *arguments, restarts=2, endpoint=endpoint) for _ in range(2)]
    wait_for_rows(launchers[0], tmp_path / "r", 3)
    os.kill(workers(launchers[1].pid)[0], signal.SIGKILL)
    message = "".join(finished(launcher)[1] for launcher in launchers)
    assert message.count("exists already; resuming it") == 1
    assert differences(uninterrupted, tmp_path / "r") == []


def test_sigterm_to_the_launcher_is_a_resumable_stop_at_any_world_size(uninterrupted: Path, tmp_path: Path) -> None:
    process = torchrun(2, "train", *RECIPE, "--epochs", 10_000, "--runs-dir", tmp_path, "--name", "r")
    wait_for_rows(process, tmp_path / "r", 3)
    process.send_signal(signal.SIGTERM)
    _, message = process.communicate(timeout=60)
    assert f"ddpmctl train --resume {tmp_path / 'r'}" in message
    steps = [load_tensors(tmp_path / "r" / "state.pt")[0]["counters"]["step"]]
    epochs = steps[0] // 6 + 3
    for count in (3, 1):
        finished(torchrun(count, "train", "--resume", tmp_path / "r", "--epochs", epochs, "--override", "epochs"))
        steps.append(load_tensors(tmp_path / "r" / "state.pt")[0]["counters"]["step"])
        epochs += 1
    assert steps[1:] == [6 * (epochs - 2), 6 * (epochs - 1)]
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows if row["event"] == "epoch"] == list(range(1, epochs))


# Frozen ranks, launchers that are killed, and slow and full disks

ENDLESS = ["--epochs", 100_000, "--save-every", 100_000, "--checkpoint-minutes", "0.004"]


def endless(folder: Path, *arguments: object, module: str = "ddpmctl") -> subprocess.Popen[str]:
    """Start a job of two ranks, which trains until it is stopped."""
    process = torchrun(2, "train", *RECIPE, *ENDLESS, "--runs-dir", folder, "--name", "r", *arguments, module=module)
    wait_for_rows(process, folder / "r", 2)
    return process


def goes_on(run: Path) -> None:
    """Check that nobody holds the run, and that it goes on from a state in its midst."""
    step = load_tensors(run / "state.pt")[0]["counters"]["step"]
    assert step > 0
    result = ddpmctl("train", "--resume", run, "--epochs", step // 6 + 2, "--override", "epochs")
    assert result.exit_code == 0, result.output
    assert f"after step {step:,}" in result.stderr


def test_a_rank_that_was_frozen_for_a_while_is_named_and_goes_on_with_the_same_bytes(uninterrupted: Path, tmp_path: Path) -> None:
    process = torchrun(2, "train", *RECIPE, *OFTEN, "--epochs", EPOCHS, "--runs-dir", tmp_path, "--name", "r", "--peer-timeout", 24)
    wait_for_rows(process, tmp_path / "r", 1)
    frozen = workers(process.pid)[1]
    os.kill(frozen, signal.SIGSTOP)
    time.sleep(9)
    os.kill(frozen, signal.SIGCONT)
    _, message = finished(process)
    (line,) = [line for line in message.splitlines() if "not answered" in line]
    assert line.startswith("note: rank 1 of 2 on ")
    assert "the job ends after 24 s without an answer (--peer-timeout)" in line
    assert differences(uninterrupted, tmp_path / "r") == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_frozen_rank_ends_the_job_with_one_line_that_names_it(rank: int, tmp_path: Path) -> None:
    process = endless(tmp_path, "--peer-timeout", 5)
    frozen = time.monotonic()
    os.kill(workers(process.pid)[rank], signal.SIGSTOP)
    _, message = finished(process, code=1, timeout=60)
    assert time.monotonic() - frozen < 25  # torchrun waits 30 seconds for a process that does not end
    (line,) = errors_in(message)
    assert line.startswith(f"error: rank {1 - rank} of 2 on ")
    assert f": rank {rank} of 2 on " in line
    assert "has not answered for 5 s (--peer-timeout)" in line
    assert f"from the last saved state: ddpmctl train --resume {tmp_path / 'r'}" in line
    assert "exitcode  : 5" in message  # in torchrun's report
    goes_on(tmp_path / "r")


@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_while_a_rank_is_frozen_is_a_resumable_stop(rank: int, tmp_path: Path) -> None:
    process = endless(tmp_path)
    os.kill(workers(process.pid)[rank], signal.SIGSTOP)
    time.sleep(1)
    signalled = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, message = process.communicate(timeout=60)
    assert time.monotonic() - signalled < 25
    (line,) = [line for line in message.splitlines() if line.startswith("terminated")]
    assert f"terminated; rank {rank} of 2 on " in line
    assert f"from the last saved state: ddpmctl train --resume {tmp_path / 'r'}" in line
    assert errors_in(message) == []
    goes_on(tmp_path / "r")


def test_a_killed_launcher_is_a_resumable_stop_of_its_ranks(tmp_path: Path) -> None:
    process = endless(tmp_path)
    process.kill()
    _, message = process.communicate(timeout=30)  # until no rank has the pipe
    (line,) = [line for line in message.splitlines() if "--resume" in line]
    assert line.startswith("stopped in epoch ")
    assert errors_in(message) == []
    assert "frame #" not in message  # of torch's C++
    goes_on(tmp_path / "r")


def test_no_rank_is_lost_while_the_leader_waits_for_a_slow_disk(uninterrupted: Path, tmp_path: Path) -> None:
    arguments = ["train", *RECIPE, *OFTEN, "--epochs", EPOCHS, "--runs-dir", tmp_path, "--name", "r", "--peer-timeout", 5]
    _, message = finished(torchrun(2, *arguments, module="tests.ranks.slow_disk"))
    assert "not answered" not in message
    assert differences(uninterrupted, tmp_path / "r") == []


def test_a_full_disk_of_rank_0_ends_the_job_with_one_line_and_loses_nothing(small_disk: Path) -> None:
    process = endless(small_disk)
    with (small_disk / "ballast").open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    _, message = finished(process, code=1, timeout=60)
    (line,) = errors_in(message)
    assert line.startswith("error: rank 0 of 2 on ")
    assert "make room" in line
    (small_disk / "ballast").unlink()
    goes_on(small_disk / "r")


# Ranks that differ


def test_other_ranks_need_not_see_the_folder_of_a_resumed_run(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "r")
    folder = os.path.relpath(tmp_path / "r", Path(package.__file__).parents[1])  # in which the ranks start
    arguments = ["train", "--resume", folder, "--epochs", 3, "--override", "epochs"]
    finished(torchrun(2, *arguments, module="tests.ranks.one_differs", environment={"DIFFERS": "disk"}))
    assert load_tensors(tmp_path / "r" / "state.pt")[0]["counters"]["epoch"] == 3


@pytest.mark.parametrize(
    ("differs", "words"),
    [
        ("data", "/nowhere/at/all: there is no such folder"),
        ("content", "another data set than rank 0: its content is"),
        ("settings", "another setting than rank 0: lr is 0.5 here and 0.0001 on rank 0"),
        ("code", "another version than rank 0: ddpmctl is"),
    ],
)
def test_a_rank_that_differs_ends_the_job_with_one_message(differs: str, words: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "other")
    labels = json.loads((tmp_path / "other" / "train.json").read_text())
    (tmp_path / "other" / "train.json").write_text(json.dumps({name: ["gray cube"] for name in labels}))
    shutil.copytree(Path(package.__file__).parent, tmp_path / "code" / "ddpmctl", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "code" / "ddpmctl" / "config.py").open("a") as file:
        file.write("# another version\n")
    environment = {"DIFFERS": differs, "OTHER_DATA": str(tmp_path / "other"), "OTHER_CODE": str(tmp_path / "code")}
    arguments = ["train", *TINY, "--epochs", 1, "--data", folder, "--runs-dir", tmp_path / "runs"]
    _, message = finished(torchrun(2, *arguments, module="tests.ranks.one_differs", environment=environment), code=1, timeout=60)
    (line,) = errors_in(message)
    assert "rank 1 of 2 on " in line
    assert words in line
    assert not list((tmp_path / "runs").glob("*/state.pt"))


def test_no_rank_waits_for_one_that_was_killed_at_the_start(folder: Path, tmp_path: Path) -> None:
    arguments = ["train", *TINY, "--epochs", 1, "--data", folder, "--runs-dir", tmp_path / "runs"]
    _, message = finished(torchrun(2, *arguments, module="tests.ranks.one_differs", environment={"DIFFERS": "death"}), code=1, timeout=60)
    assert len(errors_in(message)) <= 1


def test_a_finished_job_does_not_fail_during_pythons_shutdown(run: Path, tmp_path: Path) -> None:
    arguments = ["sample", run, "--labels", "red cube", "-o", tmp_path / "out", "--threads", 1]
    out, message = finished(torchrun(2, *arguments, module="tests.ranks.one_differs", environment={"DIFFERS": "teardown"}))
    assert len(out.splitlines()) == 2
    assert errors_in(message) == []


def test_restarts_need_exist_ok(tmp_path: Path) -> None:
    _, message = finished(torchrun(2, "train", *TINY, "--runs-dir", tmp_path, restarts=1), code=1)
    assert all("--exist-ok resume" in line for line in errors_in(message))
    assert errors_in(message)
