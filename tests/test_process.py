"""Tests in a separate process: exit codes, signals, start-up and streams."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .conftest import TINY

PYTHON = [sys.executable, "-m", "ddpmctl"]


def help_and_modules(*arguments: str) -> tuple[str, set[str]]:
    """Return a help text without line breaks, and the loaded modules."""
    lines = [
        f"import sys; sys.argv = ['ddpmctl', *{arguments!r}]", "from ddpmctl.cli.app import main", "try: main()", "except SystemExit: pass",
        "print('loaded:', *sorted(sys.modules))",
    ]  # fmt: skip
    environment = {**os.environ, "COLUMNS": "200", "TERMINAL_WIDTH": "200"}
    out = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True, env=environment).stdout
    text, _, modules = out.partition("loaded:")
    return text, set(modules.split())


def test_help_loads_no_torch_and_names_every_command() -> None:
    out, loaded = help_and_modules("--help")
    assert not {"torch", "torchvision", "matplotlib", "numpy", "PIL"} & loaded
    for command in ("train", "sample", "evaluate", "denoise-grid", "compare", "data", "evaluator"):
        assert command in out


def test_help_names_every_registered_entry_without_loading_torch() -> None:
    out, loaded = help_and_modules("train", "--help")
    assert "torch" not in loaded
    from ddpmctl import registry

    for kind in vars(registry).values():
        if isinstance(kind, registry.Registry):
            assert kind.names()
            page = help_and_modules("export", "--help")[0] if kind is registry.EXPORTS else out
            for name in kind.names():
                assert name in page, name


LOADING = (("sample", "-l", "red cube"), ("denoise-grid",), ("evaluator", "check"), ("train", "--epochs", "1"))


def without_torch(*arguments: str) -> list[str]:
    """Return a Python command that calls ours where importing torch is an error."""
    lines = ["import sys", "sys.modules['torch'] = None", f"sys.argv = ['ddpmctl', *{arguments!r}]", "from ddpmctl.cli.app import main", "main()"]
    return [sys.executable, "-c", "\n".join(lines)]


@pytest.mark.skipif(os.name != "posix", reason="terminals of POSIX")
@pytest.mark.parametrize("command", LOADING, ids=lambda each: each[0])
def test_a_terminal_shows_that_torch_is_being_loaded_before_it_is(command: tuple[str, ...], tmp_path: Path) -> None:
    import pty

    master, terminal = pty.openpty()
    environment = {**os.environ, "DDPMCTL_CACHE_DIR": str(tmp_path), "TERM": "xterm", "COLUMNS": "200"}
    done = subprocess.run(without_torch(*command), stdout=terminal, stderr=terminal, check=False, env=environment, cwd=tmp_path)
    os.close(terminal)
    shown = os.read(master, 100_000).decode()
    os.close(master)
    assert done.returncode == 1
    assert "loading torch" in shown.partition("import of torch halted")[0]


@pytest.mark.parametrize("command", ["evaluate", "compare"])
def test_cached_results_are_shown_without_loading_torch(command: str, run: Path, tmp_path: Path) -> None:
    ask = [command, *sorted(map(str, run.glob("checkpoints/*.pth"))), "--repeats", "2", "--html", str(tmp_path / "a.html")]
    ask += ["-o", str(tmp_path / "a.png")] if command == "compare" else ["--figures", str(tmp_path), "--breakdown", "--json", str(tmp_path / "a.json")]
    first = subprocess.run([*PYTHON, *ask], capture_output=True, text=True, check=True)
    files = {file.name for file in tmp_path.iterdir()}
    again = subprocess.run(without_torch(*ask), capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert again.stdout == re.sub(r"[0-2](\s+of 2\s+from)", r"2\1", first.stdout)
    assert files == {file.name for file in tmp_path.iterdir()}


def test_cached_results_of_the_labs_own_state_dict_are_shown_without_loading_torch(tmp_path: Path) -> None:
    from .report_network import report_net, saved, within_a_ddpm

    checkpoint = saved(tmp_path, within_a_ddpm(report_net().state_dict()), "epoch5_0.1_0.1.pth")
    ask = ["evaluate", str(checkpoint), "--conditions", "test", "--steps", "2", "--sampler", "ddim"]
    first = subprocess.run([*PYTHON, *ask], capture_output=True, text=True, check=True)
    again = subprocess.run(without_torch(*ask), capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert again.stdout == re.sub(r"0(\s+of 1\s+from)", r"1\1", first.stdout)


def test_results_go_to_stdout_and_messages_to_stderr(run: Path, tmp_path: Path) -> None:
    done = subprocess.run([*PYTHON, "sample", run, "-l", "red cube", "-o", tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(tmp_path / "000-red-cube-seed0-000.png"), str(tmp_path / "grid.png")]
    assert "ddpm, 3 steps" in done.stderr


@pytest.mark.parametrize(("environment", "coloured"), [({"NO_COLOR": "1", "FORCE_COLOR": "1"}, False), ({"FORCE_COLOR": "1"}, True)])
def test_no_color_is_respected_and_force_color_enables_no_progress_bars(environment: dict[str, str], coloured: bool, tmp_path: Path) -> None:
    done = subprocess.run([*PYTHON, "sample", tmp_path / "x", "-l", "red cube"], capture_output=True, text=True, check=False, env={**os.environ, **environment})
    assert done.returncode == 2
    assert ("\x1b[" in done.stderr and "31m" in done.stderr) == coloured
    assert "\x1b[2K" not in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGINT to a child is POSIX")
def test_ctrl_c_saves_the_run_and_resume_continues(tmp_path: Path) -> None:
    start = [*PYTHON, "train", *TINY, "--epochs", "100000", "--save-every", "100000", "--scenes", "64", "--runs-dir", tmp_path, "--name", "r"]
    with subprocess.Popen(start, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("epoch 2 "):
                break
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(60) == 130
    (end,) = (line for line in rest.splitlines() if "stopped" in line)
    assert re.fullmatch(r"stopped in epoch \d+, after step [\d,]+; to go on: ddpmctl train --resume .*r", end)
    assert "Traceback" not in rest
    assert "error" not in rest
    assert (tmp_path / "r" / "state.pt").is_file()
    again = [*PYTHON, "train", "--resume", str(tmp_path / "r")]
    with subprocess.Popen(again, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        epochs: list[int] = []
        before = []
        for line in process.stderr:
            before.append(line)
            if line.startswith("epoch "):
                epochs.append(int(line.split()[1]))
                break
        process.send_signal(signal.SIGINT)
        process.stderr.read()
        assert process.wait(60) == 130
    assert epochs[0] >= 3
    assert re.search(r"goes on in epoch \d+, after step [\d,]+: 0 % of the budget is used; about .* of training left", "".join(before))


def test_a_closed_pipe_is_not_an_error(run: Path, tmp_path: Path) -> None:
    with subprocess.Popen([*PYTHON, "evaluate", run, "--steps", "1", "--json", "-"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        deadline = time.monotonic() + 120
        assert "Traceback" not in process.stderr.read()
        assert time.monotonic() < deadline
        assert process.wait(60) == 141  # as for a process that SIGPIPE ended
