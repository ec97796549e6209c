"""The recipes of CONTRIBUTING.md, applied to a copy of the package and used through its command line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ddpmctl

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
TINY = ["--width", "8", "--timesteps", "4", "--epochs", "1", "--scenes", "2", "--batch-size", "6", "--threads", "1", "--device", "cpu"]


def recipe(title: str) -> list[str]:
    """Return the Python blocks of one recipe."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = re.split(r"^### ", text, flags=re.M)
    (found,) = [part for part in section if part.startswith(title + "\n")]
    return re.findall(r"```python\n(.*?)```", found, re.S)


def apply(root: Path, block: str) -> None:
    """Write a block to the file that its first line names: at its end, in a class, or before a line."""
    first, _, code = block.partition("\n")
    match = re.fullmatch(r"# (\S+?)(?:, (in|before) (.+))?", first)
    assert match, first
    file, where, what = root / match[1], match[2], match[3]
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    if where == "in":
        start = text.index(f"class {what}:")
        end = text.index("\n\n\n", start)
        text = f"{text[:end]}\n{code.rstrip()}{text[end:]}"
    elif where == "before":
        place = text.index(f"\n{what}")
        text = f"{text[:place]}\n{code}\n{text[place:]}"
    else:
        text = f"{text}\n\n{code}" if text else code
    file.write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("title", "listing", "words", "use"),
    [
        ("A noise schedule", ["train", "--help"], "scaled-linear", ["train", *TINY, "--schedule", "scaled-linear"]),
        ("A sampler with an option of its own", ["sample", "--help"], "--churn", ["train", *TINY, "--sampler", "churned", "--churn", "0.3", "--steps", "2"]),
        ("A network", ["train", "--help"], "one-convolution", ["train", *TINY, "--net", "one-convolution"]),
        ("An optimizer", ["train", "--help"], "sgd", ["train", *TINY, "--optimizer", "sgd"]),
        ("A command", ["--help"], "classes", ["classes"]),
    ],
)
def test_a_recipe_adds_an_entry_that_is_listed_and_works(title: str, listing: list[str], words: str, use: list[str], tmp_path: Path) -> None:
    shutil.copytree(Path(ddpmctl.__file__).parent, tmp_path / "ddpmctl", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "300"}

    def output(arguments: list[str]) -> str:
        command = [sys.executable, "-m", "ddpmctl", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert words not in output(listing)
    for block in recipe(title):
        apply(tmp_path, block)
    assert words in output(listing)
    assert output(use)
