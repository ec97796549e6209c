"""Completion, with Tab typed into real shells."""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ddpmctl.cli.app import app
from ddpmctl.config import Setting, settings
from ddpmctl.label_lists import parse_labels
from ddpmctl.registry import Registry

from .test_layers import SLOW_MODULES

pty = pytest.importorskip("pty", reason="shells in a terminal are POSIX")

SHELLS = {"bash": (["bash", "--norc", "--noprofile", "-i"], ""), "zsh": (["zsh", "-f", "-i"], "autoload -Uz compinit; compinit -u -D; ")}
PROGRAM = "import sys; sys.argv[0] = 'ddpmctl'; from ddpmctl.cli.app import main; main()"


@pytest.fixture(params=SHELLS)
def shell(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if not shutil.which(name):
        pytest.skip(f"{name} is not installed")
    return name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with runs and the program in ``bin``."""
    program = tmp_path / "bin" / "ddpmctl"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{PROGRAM}" "$@"\n')
    program.chmod(0o755)
    for runs, name in (("runs", "q30"), ("runs", "relu-long"), ("elsewhere", "gelu-1")):
        checkpoints = tmp_path / runs / name / "checkpoints"
        checkpoints.mkdir(parents=True)
        (checkpoints.parent / "config.toml").touch()
        (checkpoints / "epoch5_0.5_0.5.pth").touch()
    (tmp_path / "runs" / "notes").mkdir()
    return tmp_path


def completed(shell: str, folder: Path, lines: list[str], **environment: str) -> list[list[str]]:
    """Type lines with tabs into a shell; return the words that a command would get from each."""
    start, prepare = SHELLS[shell]
    places = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(Path(__file__).parents[1]), "HOME": str(folder), "TERM": "dumb"}
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        start, stdin=terminal, stdout=terminal, stderr=terminal, cwd=folder, env={**os.environ, **places, **environment}, start_new_session=True
    )
    os.close(terminal)
    try:
        typed(controller, f'{prepare}eval "$(ddpmctl --show-completion)"; echo rea""dy\n', "ready")
        found = []
        for line in lines:
            # Typed after the completion: at the start of the line, a command that shows its words; at its end, one that says that it is over.
            screen = typed(controller, f"{line}\x01printf '[%s]' \x05; echo o\"\"ver\n", "over")
            found.append(re.findall(r"\[([^][%\r\n]*)\]", screen))
        return found
    finally:
        process.kill()
        process.wait()
        os.close(controller)


def typed(controller: int, keys: str, until: str) -> str:
    """Type keys and return what the terminal shows, up to a word."""
    os.write(controller, keys.encode())
    screen, end = "", time.monotonic() + 60
    while until not in screen:
        assert time.monotonic() < end, screen
        if select.select([controller], [], [], 1)[0]:
            screen += os.read(controller, 65536).decode(errors="replace")
    return screen


def test_words_that_are_completed_in_a_shell(shell: str, folder: Path) -> None:
    expected = {
        "ddpmctl denoi": "denoise-grid", "ddpmctl train --preset q": "quick", "ddpmctl sample --sampler dpm": "dpm++2m", "ddpmctl sample q": "q30",
        "ddpmctl compare q30 runs/rel": "runs/relu-long", "ddpmctl evaluate runs/q30/": "runs/q30/checkpoints/epoch5_0.5_0.5.pth",
    }  # fmt: skip
    assert [words[-1] for words in completed(shell, folder, [f"{line}\t" for line in expected])] == [*expected.values()]


def test_labels_also_after_a_comma(shell: str, folder: Path) -> None:
    lines = [
        "ddpmctl sample -l red-cu\t",
        "ddpmctl sample -l red-cube,blue-sp\t",
        'ddpmctl sample -l "gray cyl\t',
        'ddpmctl denoise-grid --labels "red cube,blue sp\t',
    ]
    values = [words[-1] for words in completed(shell, folder, lines)]
    assert values == ["red-cube", "red-cube,blue-sphere", "gray cylinder", "red cube,blue sphere"]
    assert parse_labels(values) == [("red cube",), ("red cube", "blue sphere"), ("gray cylinder",), ("red cube", "blue sphere")]


def offered(*words: str, **environment: str) -> list[str]:
    """Return what the program answers to bash for the last word."""
    asked = {"_DDPMCTL_COMPLETE": "complete_bash", "COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)}
    result = CliRunner().invoke(app, env={**asked, **environment})
    assert result.stderr == ""
    return result.stdout.split("\n")[:-1] if result.stdout.strip() else []


@pytest.mark.parametrize("setting", [s for s in settings() if s.choices is not None], ids=lambda s: s.name)
def test_every_name_that_a_setting_can_have_is_offered(setting: Setting) -> None:
    assert setting.choices is not None
    names = setting.choices.names() if isinstance(setting.choices, Registry) else setting.choices
    assert offered("ddpmctl", "train", setting.flag, "") == [*names]
    assert offered("ddpmctl", "train", setting.flag, names[-1][:-1])[-1] == names[-1]


def test_a_label_is_offered_once_in_an_image() -> None:
    assert offered("ddpmctl", "sample", "-l", "red-cube,red") == ["red-cube,red-sphere", "red-cube,red-cylinder"]
    assert offered("ddpmctl", "sample", "-l", '"red') == ["red cube", "red sphere", "red cylinder"]


def test_runs_are_those_in_the_folder_of_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for command in (("sample",), ("denoise-grid",), ("evaluate",), ("compare",), ("compare", "q30"), ("train", "--resume")):
        assert offered("ddpmctl", *command, "") == ["q30", "relu-long"]
        assert offered("ddpmctl", *command, "runs/") == ["runs/q30", "runs/relu-long"]
    assert offered("ddpmctl", "sample", "--runs-dir", "elsewhere", "") == ["gelu-1"]
    assert offered("ddpmctl", "sample", "pre") == ["pretrained"]
    assert offered("ddpmctl", "sample", "", DDPMCTL_RUNS_DIR=str(folder / "elsewhere")) == ["gelu-1"]
    assert offered("ddpmctl", "sample", "runs/q30/") == ["runs/q30/checkpoints/epoch5_0.5_0.5.pth"]


def test_where_nothing_is_known_the_shell_offers_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert offered("ddpmctl", "sample", "other/") == []
    assert offered("ddpmctl", "nonsense", "x") == []


def test_completion_loads_nothing_slow() -> None:
    program = f"try:\n    exec({PROGRAM!r})\nfinally:\n    print(sorted({SLOW_MODULES} & set(sys.modules)), file=sys.stderr)"
    environment = {**os.environ, "_DDPMCTL_COMPLETE": "complete_bash", "COMP_WORDS": "ddpmctl\ntrain\n--act\ng", "COMP_CWORD": "3"}
    done = subprocess.run([sys.executable, "-c", f"import sys\n{program}"], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["gelu"]
    assert done.stderr.strip() == "[]"
