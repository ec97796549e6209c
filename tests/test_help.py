"""Help pages, and the errors of the command line's parser."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from ddpmctl.cli.app import app
from ddpmctl.config import settings

from .test_docs import problem_of_line

EXAMPLE = re.compile(r"^  (?:\w+=\S+ )?(ddpmctl .*)$", re.MULTILINE)
COMMANDS_OF_CHECKPOINTS = [("sample",), ("evaluate",), ("denoise-grid",), ("compare",)]


def every_command(command: Any = None, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the words of every command and of every group."""
    command = command or typer.main.get_command(app)
    yield words
    for name, inner in getattr(command, "commands", {}).items():
        yield from every_command(inner, (*words, name))


def parameters(words: tuple[str, ...]) -> list[Any]:
    command: Any = typer.main.get_command(app)
    for word in words:
        command = command.commands[word]
    return [parameter for parameter in command.params if parameter.param_type_name == "option"]


def page(words: tuple[str, ...], columns: int = 80) -> str:
    result = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": str(columns)})
    assert result.exit_code == 0
    return result.stdout


def in_one_line(words: tuple[str, ...]) -> str:
    return " ".join(page(words).split())


@pytest.mark.parametrize("words", [*every_command()], ids=" ".join)
class TestEveryPage:
    def test_fits_80_columns_and_cuts_no_name(self, words: tuple[str, ...]) -> None:
        text = page(words)
        assert max(map(len, text.splitlines())) <= 80
        for parameter in parameters(words):
            for flag in (*parameter.opts, *parameter.secondary_opts):
                assert re.search(rf"(?<!\S){flag}(?![\w-])", text), flag

    def test_begins_with_two_or_three_examples_that_can_be_typed(self, words: tuple[str, ...]) -> None:
        text = page(words)
        examples = EXAMPLE.findall(text[: text.index(":\n  ")])
        assert 2 <= len(examples) <= 3
        assert [problem for example in examples if (problem := problem_of_line(example))] == []
        assert all(example.split()[1 : len(words) + 1] == [*words] for example in examples)

    def test_names_only_options_that_the_command_has(self, words: tuple[str, ...]) -> None:
        known = {flag for parameter in parameters(words) for flag in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
        known |= set() if words else {"--install-completion", "--show-completion"}
        text = EXAMPLE.sub("", page(words)) if "\nCommands:" in page(words) else page(words)  # a group's examples are those of its commands
        assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) <= known

    def test_writes_values_in_one_style(self, words: tuple[str, ...]) -> None:
        for parameter in parameters(words):
            assert parameter.is_flag or parameter.metavar in ("INT", "NUMBER", "TEXT", "NAME", "PATH"), parameter.name
        assert not re.search(r"<\w+>|x[<>]=", page(words).replace("runs/<name>/", ""))


def test_examples_that_most_people_want_stand_first() -> None:
    for words, example in (
        (("train",), "ddpmctl train --act gelu --epochs 600"),
        (("evaluate",), "ddpmctl evaluate checkpoints/"),
        (("denoise-grid",), 'ddpmctl denoise-grid --labels "red cube,blue sphere"'),
    ):
        assert f"\n  {example}\n" in page(words)


def test_options_that_most_people_need_come_first_and_the_others_under_headings_that_say_when() -> None:
    text = page(("train",))
    headings = re.findall(r"^(\w.*):$", text, re.MULTILINE)
    assert headings[0] == "Options"
    assert all(re.search(" where | for |Going on|that may ", heading) for heading in headings[1:])
    first = text[text.index("\nOptions:") : text.index(f"\n{headings[1]}:")]
    assert re.findall(r"^  (?:-\w, )?(--[\w-]+)", first, re.MULTILINE)[:6] == ["--preset", "--act", "--net", "--schedule", "--epochs", "--minutes"]


@pytest.mark.parametrize("words", COMMANDS_OF_CHECKPOINTS, ids=" ".join)
def test_the_settings_of_sampling_default_to_the_checkpoints(words: tuple[str, ...]) -> None:
    text = in_one_line(words)
    for setting in settings("sampling"):
        assert re.search(rf"{setting.flag} \w+ [^\[]*\[default: the checkpoint's\]", text), setting.flag


def test_train_shows_its_own_defaults_of_sampling() -> None:
    text = in_one_line(("train",))
    assert "the checkpoint's" not in text
    assert re.search(r"--sampler NAME [^\[]*\[default: ddpm\]", text)
    assert re.search(r"--steps INT [^\[]*\[default: auto\]", text)


def test_a_wide_terminal_is_used_up_to_120_columns() -> None:
    assert 100 < max(map(len, page(("train",), 200).splitlines())) <= 120


# Errors of the parser


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["sample", "-l", "red", "cube"], '-l red cube: a value with spaces needs quotes; write -l "red cube"'),
        (["sample", "-l", "red", "cube,blue", "sphere", "q30"], '-l red cube,blue sphere: a value with spaces needs quotes; write -l "red cube,blue sphere"'),
        (["sample", "-labels", "red cube"], "-labels: write it with two hyphens, --labels"),
        (["sample", "-l", "red cube", "-n", "0"], "--count: 0 is out of range (at least 1, at most 10000)"),
        (["sample", "-l", "red cube", "--seed", "-1"], "--seed: -1 is out of range (at least 0)"),
        (["sample", "-l", "red cube", "-n", "many"], "--count: give a whole number"),
        (["data", "cache", "clear", "--older-than", "long"], "--older-than: give a number"),
        (["train", "--epoch", "3"], "--epoch: ddpmctl train has no such option; did you mean --epochs?"),
        (["sample", "--epochs", "3"], "--epochs: ddpmctl sample has no such option; it is an option of train"),
        (["--epochs", "3", "train"], "--epochs: ddpmctl has no such option; it is an option of train"),
        (["sample", "-z"], "-z: ddpmctl sample has no such option; ddpmctl sample --help lists all"),
        (["tran"], "ddpmctl has no command 'tran'; did you mean train?"),
        (["data", "frob"], "ddpmctl data has no command 'frob'; there are render, verify, labels, convert, cache"),
        (["train", "--epochs"], "--epochs: a value is missing; give --epochs INT"),
        (["train", "--name", "--dry-run"], "--name: a value is missing before --dry-run; give --name TEXT"),
        (["train", "--dry-run=yes"], "--dry-run: takes no value; write --dry-run alone"),
        (["compare"], "RUNS is missing; for example: ddpmctl compare runs/gelu runs/relu"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_what_the_parser_refuses_is_one_line_with_the_fix(line: list[str], expected: str) -> None:
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 2
    assert result.stderr == f"error: {expected}\n"
    assert result.stdout == ""


def test_a_missing_option_is_shown_with_an_example() -> None:
    result = CliRunner().invoke(app, ["sample", "runs/q 30", "-n", "4"])
    assert result.stderr.startswith('error: --labels is missing; for example: --labels "red cube,blue sphere"')
    assert result.exit_code == 2


def test_words_too_many_are_named_with_an_example() -> None:
    result = CliRunner().invoke(app, ["train", "quick"])
    assert result.stderr.startswith("error: ddpmctl train: 'quick' has no place here; ")
    assert result.stderr.endswith("for example: ddpmctl train --preset quick\n")
    assert result.exit_code == 2


def test_the_program_itself_prints_the_same_line() -> None:
    done = subprocess.run([sys.executable, "-m", "ddpmctl", "train", "--epoch", "3"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == ["error: --epoch: python -m ddpmctl train has no such option; did you mean --epochs?"]


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_of_several_processes_the_first_one_prints(rank: str, lines: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    result = CliRunner().invoke(app, ["train", "--epoch", "3"])
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == lines


def test_without_a_command_there_is_help(tmp_path: Path) -> None:
    for words in ([], ["data"], ["evaluator"]):
        result = CliRunner().invoke(app, words)
        assert "Commands:" in result.output
        assert "error:" not in result.output
