"""Names of files: they must leave the command line and pages without control characters, one row for each."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from hypothesis import strategies as st
from typer.testing import CliRunner

from ddpmctl.cli.app import app
from ddpmctl.errors import visible

from .mutations import Fuzz

PIECES = (
    b"\x1b[31m", b"\x1b]0;title\x07", b"\n", b"\r", b"\t", b"\x7f", b"\xe9", b"\xff", b"\xc2\x9b31m", b"\xc2\x85", "\u202e".encode(), "\u200f".encode(),
    "\u2028".encode(), "\u200b".encode(), "\ufeff".encode(), "日本".encode(), "e\u0301".encode(), "مرحبا".encode(), "😀".encode(), b"$x^$", b"$", b"\\",
    b"[bold]", b"[", b"{{ 7 }}", b"<b>", b"&", b"%", b"#", b"'", b'"', b" ", b"-", b"~", b"*", b"?", b"=", b",", b"a" * 100, b"epoch5_0.5_0.5",
)  # fmt: skip
NAMES = st.lists(st.sampled_from(PIECES) | st.binary(min_size=1, max_size=4), min_size=1, max_size=5).map(
    lambda parts: b"".join(parts).replace(b"/", b"|").replace(b"\0", b"0")[:250].strip(b".") or b"x"
)


def names_fuzz(folder: Path) -> Fuzz:
    """Return the test of names of checkpoints, runs and images in tables, errors and pages, and what to draw for it."""
    os.environ["DDPMCTL_CACHE_DIR"] = str(folder / "cache")
    runner, place = CliRunner(), os.fsencode(folder)
    (folder / "mine.json").write_text('[["red cube"]]')
    tiny = ["--width", 8, "--timesteps", 2, "--batch-size", 8, "--save-every", 1, "--epochs", 1, "--threads", 1]
    made = runner.invoke(app, list(map(str, ["train", *tiny, "--scenes", 2, "--runs-dir", folder / "runs", "--name", "plain"])))
    assert made.exit_code == 0, made.output
    (checkpoint,) = (folder / "runs" / "plain" / "checkpoints").glob("*.pth")

    def call(code: int, *arguments: object) -> str:
        result = runner.invoke(app, list(map(str, arguments)))
        assert result.exit_code == code, result.output
        for line in result.output.splitlines():
            assert line.isprintable(), line
        return str(result.stdout)

    def test(names: list[bytes]) -> None:
        for each in (b"odd", b"odd-runs", b"images"):
            shutil.rmtree(place + b"/" + each, ignore_errors=True)
            os.mkdir(place + b"/" + each)
        for name in names:
            shutil.copy(checkpoint, place + b"/odd/" + name + b".pth")
            shutil.copytree(folder / "runs" / "plain", os.fsdecode(place + b"/odd-runs/" + name))
            with open(place + b"/images/" + name + b".png", "wb") as file:
                file.write(b"no image")
        page = folder / "page.html"
        call(0, "evaluate", folder / "odd", "--conditions", folder / "mine.json", "--html", page, "--csv", folder / "x.csv", "--latex", folder / "x.tex")
        for file in (page, folder / "x.tex"):
            assert all(line.isprintable() for line in file.read_text(encoding="utf-8").split("\n"))
        table = call(0, "runs", "--runs-dir", folder / "odd-runs").split("\n")
        for name in names:
            shown = visible(os.fsdecode(name))
            assert sum(line.startswith(f"{shown} ") for line in table) >= 1, shown
        call(0, "show", os.fsdecode(place + b"/odd-runs/" + names[0]), "--html", page, "-o", folder / "x.png")
        assert all(line.isprintable() for line in page.read_text(encoding="utf-8").split("\n"))
        call(0, "compare", "--recorded", *(os.fsdecode(place + b"/odd-runs/" + name) for name in names), folder / "runs" / "plain", "-o", folder / "x.png")
        call(3, "evaluate", "--images", folder / "images", "--conditions", folder / "mine.json")

    return test, (st.lists(NAMES, min_size=1, max_size=10, unique=True),)
