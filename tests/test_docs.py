"""The documentation, checked against the code: commands, flags, files, links."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from ddpmctl.cli.app import app
from ddpmctl.config import settings
from ddpmctl.config_sources import assumed, resolve
from ddpmctl.iclevr import ICLEVR
from ddpmctl.label_lists import parse_labels
from ddpmctl.task import Task

ROOT = Path(__file__).parents[1]
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# i-CLEVR's labels, and those of the examples of other data.
DOCUMENTED = Task((*ICLEVR.classes, "door, red", "tree", "cat", "outdoors"), ICLEVR.size, ICLEVR.scored)
# Flags of torchrun, of the benchmarks, and of a recipe in CONTRIBUTING.md.
OTHERS = {"--max-restarts", "--model-only", "--churn"}
# Entries that the recipes of CONTRIBUTING.md add; tests/test_contributing.py runs them.
RECIPES = {"scaled-linear", "churned", "one-convolution", "sgd", "classes"}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
ROOTS = ("ddpmctl/", "tests/", "docs/", ".github/", ".ci/")


def command_lines(text: str) -> Iterator[str]:
    """Yield the command lines of a text's console and bash blocks."""
    for language, block in FENCE.findall(text):
        for line in block.splitlines():
            if language == "console" and line.startswith("$ "):
                yield line[2:]
            elif language == "bash" and line.strip():
                yield line


def commands(command: Any = None) -> Iterator[Any]:
    """Yield every command that has options of its own, groups included."""
    command = command or typer.main.get_command(app)
    yield command
    for inner in getattr(command, "commands", {}).values():
        yield from commands(inner)


def problem_of_line(line: str) -> str | None:
    """Return what is wrong with a command line, or None."""
    words = shlex.split(line, comments=True)
    if words[:2] == ["python", "-m"] and words[2].startswith("tests."):
        place = ROOT / words[2].replace(".", "/")
        return None if place.with_suffix(".py").is_file() or (place / "__main__.py").is_file() else f"{line}: no such module"
    if words[0] == "python" and words[1].endswith(".py"):
        return None if (ROOT / words[1]).is_file() else f"{line}: no such file"
    if words[0] == "torchrun":
        words = words[words.index("-m") + 1 :]
    if words[0] != "ddpmctl" or RECIPES & set(words):
        return None
    command, rest = typer.main.get_command(app), words[1:]
    while hasattr(command, "commands"):
        if command.invoke_without_command and (not rest or rest[0].startswith("-")):
            break
        if not rest or rest[0] not in command.commands:
            return f"{line}: no such command"
        command = command.commands[rest.pop(0)]
    try:
        _check_values(command.make_context(command.name, rest, resilient_parsing=False).params)
    except (Exception, SystemExit) as error:
        return f"{line}: {getattr(error, 'message', error)}"
    return None


def _check_values(given: dict[str, Any]) -> None:
    known = {s.name: s for s in settings()}
    values = {name: value for name, value in given.items() if name in known and isinstance(value, str)}
    for name, value in values.items():
        known[name].check(value)
    if "preset" in given:
        resolve(values, None, given["preset"], environ={})
    assumed(given.get("assume"))
    parse_labels(given.get("labels") or (), DOCUMENTED)


def prose(text: str) -> str:
    """Return a text without its fenced blocks."""
    return FENCE.sub("", text)


def anchors(text: str) -> set[str]:
    """Return the anchors of a text's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


def problems(file: Path, text: str) -> list[str]:
    """Return all problems of a file's text."""
    found = [problem for line in command_lines(text) if (problem := problem_of_line(line))]
    flags = {flag for command in commands() for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    flags |= {"--help", "--install-completion", "--show-completion"}
    body = prose(text)
    for code in re.findall(r"`([^`\n]+)`", body):
        found += [f"{flag}: no command has this flag" for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", code) if flag not in flags | OTHERS]
        if code.startswith(ROOTS) and re.fullmatch(r"[\w./-]+", code) and not (ROOT / code).exists():
            found.append(f"{code}: no such file")
        if code.startswith("ddpmctl ") and (problem := _problem_of_name(code)):
            found.append(problem)
    for target in re.findall(r"\]\(([^)\s]+)\)", body):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        place = (file.parent / path) if path else file
        if not place.exists():
            found.append(f"{target}: broken link")
        elif anchor and anchor not in anchors(text if not path else place.read_text(encoding="utf-8")):
            found.append(f"{target}: no such heading")
    found += [f"placeholder {word}" for word in re.findall(r"\b(?:TODO|TBD|XXX|FIXME|SCALING)\b", text)]
    return found


def _problem_of_name(code: str) -> str | None:
    """Return what is wrong with the command that inline code names; its arguments may be left out there."""
    command: Any = typer.main.get_command(app)
    for word in code.split()[1:]:
        if word.startswith("-") or not hasattr(command, "commands"):
            return None
        if word not in command.commands:
            return f"{code}: no such command"
        command = command.commands[word]
    return None


@pytest.mark.parametrize("file", DOCS, ids=lambda file: file.name)
def test_a_document_has_no_problems(file: Path) -> None:
    assert problems(file, file.read_text(encoding="utf-8")) == []


def test_the_readme_is_short_and_begins_with_its_two_blocks() -> None:
    raw = (ROOT / "README.md").read_bytes()
    assert len(raw) <= 7000
    first, second = re.findall(r"```bash\n(.*?)```", raw.decode(), re.DOTALL)[:2]
    assert first == "python -m pip install -e .\nddpmctl train --preset quick\n"
    assert second == 'python -m pip install -e ".[test]"\npython -m pytest -n auto\n'


def test_the_readme_links_every_document() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [file.name for file in DOCS[2:] if f"(docs/{file.name})" not in text] == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("```console\n$ ddpmctl train --no-such-flag 1\n```\n", "--no-such-flag"),
        ("```console\n$ ddpmctl train --schedule nonsense\n```\n", "nonsense"),
        ("```console\n$ ddpmctl train --preset huge\n```\n", "huge"),
        ('```console\n$ ddpmctl sample --labels "red cone"\n```\n', "red cone"),
        ("```bash\nddpmctl nonsense\n```\n", "no such command"),
        ("```console\n$ torchrun --nproc-per-node 2 -m ddpmctl train --nonsense\n```\n", "--nonsense"),
        ("```console\n$ python -m tests.benchmarks.nonsense\n```\n", "no such module"),
        ("Give `--nonsense 3`.\n", "--nonsense: no command"),
        ("Run `ddpmctl data nonsense`.\n", "no such command"),
        ("See `ddpmctl/nets/nonsense.py`.\n", "no such file"),
        ("See [this](docs/nonsense.md).\n", "broken link"),
        ("![image](.github/assets/nonsense.png)\n", "broken link"),
        ("See [this](#nonsense).\n", "no such heading"),
        ("TODO\n", "placeholder"),
    ],
)
def test_problems_are_reported(text: str, expected: str) -> None:
    (problem,) = problems(ROOT / "README.md", text)
    assert expected in problem


def test_a_correct_text_has_no_problems() -> None:
    text = "# A `heading`, here\n\nSee [this](#a-heading-here) and `--batch-size`.\n\n```console\n$ ddpmctl train --act relu # why\n```\n"
    assert problems(ROOT / "README.md", text) == []


@pytest.mark.parametrize("name", [file.stem for file in sorted((ROOT / "tests" / "benchmarks").glob("[a-z]*.py"))] + ["fuzz.__main__"])
def test_every_benchmark_can_be_imported(name: str) -> None:
    importlib.import_module(f"tests.benchmarks.{name}")
