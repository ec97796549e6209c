"""Checkpoints, runs and outputs with odd names: nothing acts on the terminal or a page, rows stay rows, and no result is lost."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ddpmctl.errors import UsageError, visible
from ddpmctl.files import prepare_file
from ddpmctl.runs.folder import find_checkpoints

from ..conftest import ddpmctl, train
from ..test_cli_errors import refused

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems do not allow these names")

# Bytes of names, and how they are shown.
NAMES = {
    b"\x1b[31mred\x1b]0;title\x07": "\\x1b[31mred\\x1b]0;title\\x07",
    b"line\nbreak\r\t": "line\\nbreak\\r\\t",
    b"latin-1 caf\xe9": "latin-1 caf\\xe9",
    "\u202etxt\u200f\u2028".encode(): "\\u202etxt\\u200f\\u2028",
    b"\xc2\x9b31m": "\\x9b31m",
    "日本語".encode(): "日本語",
    b"$x^$ & [bold]m[/bold]".replace(b"/", b"|"): "$x^$ & [bold]m[|bold]",
    "日".encode() * 83: "日" * 83,
}


@pytest.fixture(scope="module")
def conditions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("conditions") / "mine.json"
    file.write_text('[["red cube"], ["blue sphere", "gray cube"]]')
    return file


@pytest.fixture(scope="module")
def checkpoints(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of two arms."""
    folder, other = tmp_path_factory.mktemp("odd"), train(tmp_path_factory.mktemp("other"), "--epochs", 1, "--act", "relu")
    for number, name in enumerate(NAMES):
        shutil.copy(find_checkpoints(run if number % 2 else other)[0], os.fsencode(folder) + b"/" + name + b".pth")
    return folder


@pytest.fixture(scope="module")
def runs(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd-runs")
    for name in NAMES:
        shutil.copytree(run, os.fsdecode(os.fsencode(folder) + b"/" + name))
    return folder


def is_plain(text: str) -> bool:
    return all(character.isprintable() or character in "\n" for character in text)


def test_names_of_checkpoints_are_shown_escaped_everywhere_and_exact_in_json(checkpoints: Path, conditions: Path, tmp_path: Path) -> None:
    files = {kind: tmp_path / f"out.{kind}" for kind in ("json", "csv", "latex", "html")}
    flags = [part for kind, file in files.items() for part in (f"--{kind}", file)]
    result = ddpmctl("evaluate", checkpoints, "--conditions", conditions, "--figures", tmp_path / "figures", "--recorded", *flags)
    assert result.exit_code == 0, result.output
    written = {kind: file.read_bytes().decode() for kind, file in files.items()}
    for text in (result.stdout, result.stderr, written["latex"], written["html"], written["csv"].replace("\r\n", "\n")):
        assert is_plain(text)
    starts = [line.split("  ")[0] for line in result.stdout.splitlines()]
    for shown in NAMES.values():
        assert starts.count(f"{shown}.pth") == 2  # the table of scores, and what was recorded
        assert f"{shown}.pth".replace("&", "&amp;") in written["html"]
    rows = list(csv.DictReader(written["csv"].splitlines()))
    assert sorted(row["path"] for row in rows) == sorted(f"{checkpoints}/{shown}.pth" for shown in NAMES.values())
    exact = {os.fsencode(row["path"]) for row in json.loads(written["json"])["checkpoints"]}
    assert exact == {os.fsencode(checkpoints) + b"/" + name + b".pth" for name in NAMES}


def test_a_broken_checkpoint_of_an_odd_name_is_named_in_one_line(conditions: Path, tmp_path: Path) -> None:
    for name in NAMES:
        with open(os.fsencode(tmp_path) + b"/" + name + b".pth", "wb") as file:
            file.write(b"text")
    result = ddpmctl("evaluate", tmp_path, "--conditions", conditions)
    assert result.exit_code == 3
    assert is_plain(result.stderr)
    for shown in NAMES.values():
        assert sum(line.startswith(f"skipped {tmp_path}/{shown}.pth: ") for line in result.stderr.splitlines()) == 1


def test_figures_draw_odd_names(checkpoints: Path, conditions: Path, runs: Path, tmp_path: Path) -> None:
    files = sorted(checkpoints.iterdir())
    result = ddpmctl("evaluate", *files, "--conditions", conditions, "--sweep", "steps=1,2", "--figures", tmp_path)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "sweep-steps.svg").is_file()
    result = ddpmctl("compare", *files, "--conditions", conditions, "--repeats", 1, "-o", tmp_path / "c.png", "--html", tmp_path / "c.html")
    assert result.exit_code == 0, result.output
    assert is_plain((tmp_path / "c.html").read_text(encoding="utf-8"))
    result = ddpmctl("compare", *runs.iterdir(), "--recorded", "-o", tmp_path / "r.png")
    assert result.exit_code == 0, result.output
    names = ",".join(os.fsdecode(os.fsencode(checkpoints) + b"/" + name + b".pth") for name in NAMES if b"," not in name)
    result = ddpmctl("denoise-grid", "--checkpoints", names, "--columns", 2, "-o", tmp_path / "d.png")
    assert result.exit_code == 0, result.output


def test_runs_of_odd_names_are_listed_and_shown(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = ddpmctl("runs", "--runs-dir", runs)
    assert result.exit_code == 0, result.output
    assert is_plain(result.output)
    starts = [line.split("  ")[0] for line in result.stdout.splitlines()]
    assert all(shown in starts for shown in NAMES.values())
    for name in (b"\x1b[31mred\x1b]0;title\x07", b"latin-1 caf\xe9", "日".encode() * 83):
        result = ddpmctl("show", os.fsdecode(os.fsencode(runs) + b"/" + name), "--html", "run.html")
        assert result.exit_code == 0, result.output
        assert is_plain(result.output)
        assert is_plain((tmp_path / "run.html").read_text(encoding="utf-8"))
    assert len(list(tmp_path.glob("show-*.png"))) == 3


def test_an_output_without_other_characters_than_ascii_loses_no_result(checkpoints: Path, conditions: Path, runs: Path, tmp_path: Path) -> None:
    evaluate = ["evaluate", checkpoints, "--conditions", conditions, "--html", tmp_path / "s.html"]
    c_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for command, environment in ((evaluate, {"PYTHONIOENCODING": "ascii"}), (["runs", "--runs-dir", runs], c_locale)):
        done = subprocess.run([sys.executable, "-m", "ddpmctl", *command], capture_output=True, check=False, env={**os.environ, **environment})
        assert done.returncode == 0, done.stderr
        assert done.stdout.isascii()
        assert b"caf\\xe9" in done.stdout
    assert (tmp_path / "s.html").is_file()


def test_completion_does_not_offer_names_that_act_on_the_terminal(runs: Path) -> None:
    program = "import sys; sys.argv[0] = 'ddpmctl'; from ddpmctl.cli.app import main; main()"
    shell = {"_DDPMCTL_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": "ddpmctl show ", "DDPMCTL_RUNS_DIR": str(runs)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env={**os.environ, **shell})
    assert "日本語" in done.stdout
    assert is_plain(done.stdout)
    assert "red" not in done.stdout


@pytest.mark.parametrize("flag", ["--html", "--json", "--csv", "--latex"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(flag: str, checkpoints: Path, conditions: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "link")
    os.mkfifo(tmp_path / "pipe")
    for file, words in {"x" * 300: "File name too long", "link": "cannot be written", "pipe": "is not a regular file"}.items():
        result = ddpmctl("evaluate", checkpoints, "--conditions", conditions, flag, tmp_path / file)
        assert result.exit_code == 2, result.output
        assert words in result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert result.stdout == ""


def test_dev_stdout_is_not_replaced_by_a_file() -> None:
    with pytest.raises(UsageError, match="--html: /dev/stdout is not a regular file"):
        prepare_file(Path("/dev/stdout"), "--html")  # not the command, which would replace it if this failed


def test_outputs_may_have_names_as_long_as_the_system_allows(checkpoints: Path, conditions: Path, tmp_path: Path) -> None:
    page, out = tmp_path / ("日" * 83 + ".html"), tmp_path / ("日" * 82 + ".png")
    one = sorted(checkpoints.iterdir())[0]
    result = ddpmctl("evaluate", one, checkpoints / ("日" * 83 + ".pth"), "--conditions", conditions, "--html", page, "--grid", tmp_path / "grids")
    assert result.exit_code == 0, result.output
    assert page.is_file()
    assert len(list((tmp_path / "grids").iterdir())) == 2
    assert "give a shorter name" in refused(2, "compare", *checkpoints.iterdir(), "--conditions", conditions, "-o", out)


@pytest.mark.parametrize("command", ["show", "evaluate", "compare x", "sample -l red-cube", "train --data", "runs --runs-dir", "data verify"])
def test_a_name_that_is_too_long_is_refused_in_one_line(command: str, run: Path) -> None:
    line = refused(2, *command.replace("x", str(run)).split(), "n" * 300)
    assert "nnn" in line


@pytest.mark.parametrize("text", ["plain.pth", "é 日本語 .pth", "a\\b", ""])
def test_usual_names_are_shown_as_they_are(text: str) -> None:
    assert visible(text) == text
