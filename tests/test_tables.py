"""Tables on a terminal, in a pipe and in LaTeX: what fits, what stands below, and which names rows have."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import shutil
from pathlib import Path

import pytest

from ddpmctl.cli.app import app
from ddpmctl.cli.layout import lay_out, length

from .conftest import ddpmctl

BOXES = re.compile(r"[\u2500-\u257f]")


class Screen(io.StringIO):
    """A stdout that is a terminal."""

    def isatty(self) -> bool:
        return True


def on_screen(monkeypatch: pytest.MonkeyPatch, columns: int, *arguments: object) -> list[str]:
    """Run a command in a terminal of a width, and return the lines on its screen, without colours."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    screen = Screen()
    with contextlib.redirect_stdout(screen):
        app([str(argument) for argument in arguments], standalone_mode=False)
    return re.sub(r"\x1b\[[\d;]*m", "", screen.getvalue()).splitlines()


def below_the_heading(lines: list[str], heading: str) -> list[str]:
    """Return the lines of a table's rows on a screen: from the rule below the heading to the note."""
    start = next(number for number, line in enumerate(lines) if line.startswith(heading))
    end = next(number for number, line in enumerate(lines) if number > start and line.startswith("best by"))
    return lines[start + 2 : end]


class TestEvaluation:
    def test_two_lines_a_checkpoint_at_80_columns_and_one_at_120(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        narrow, wide = (on_screen(monkeypatch, width, "evaluate", run, "--no-confirm") for width in (80, 120))
        for lines, width, count in ((narrow, 80, 2), (wide, 120, 1)):
            assert max(map(length, lines)) <= width
            rows = below_the_heading(lines, "checkpoint")
            assert len(rows) == 2 * count
            for row in rows[::count]:
                assert len(re.findall(r"\b0\.\d{4}\b", row)) == 3
            assert all(len(re.findall(r"\(\d\.\d{3}-\d\.\d{3}\)", row)) == 3 for row in rows[count - 1 :: count])
            (groups,) = (line for line in lines if re.fullmatch(r"\s+test\s+new_test\s+heldout", line))
            assert groups.index("test") > len("checkpoint")

    def test_a_pipe_gets_plain_text(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("COLUMNS", raising=False)
        asked = ("evaluate", run, "--breakdown", "--recorded")
        output = ddpmctl(*asked).stdout
        lines = output.splitlines()
        assert not BOXES.search(output)
        assert "\x1b" not in output
        assert lines == [line.rstrip() for line in lines]
        rows = [line for line in lines if re.search(r"epoch \d  0\.\d{4} \(", line)]
        assert len(rows) == 2
        assert len(set(map(len, rows))) == 1
        heading = next(line for line in lines if line.startswith("checkpoint") and "exact" in line)
        assert len(heading) == len(rows[0])
        monkeypatch.setenv("COLUMNS", "80")
        narrow = ddpmctl(*asked).stdout.splitlines()
        assert max(map(len, narrow)) <= 80
        assert sum(len(re.findall(r"\(0\.\d{3}-0\.\d{3}\)", line)) == 3 for line in narrow) == 2

    def test_what_training_recorded_is_shown_on_request(self, run: Path) -> None:
        asked = ("evaluate", run, "--no-confirm")
        assert "loss" not in ddpmctl(*asked).stdout
        table = ddpmctl(*asked, "--recorded").stdout.split("recorded in training\n")[1].splitlines()
        assert table[0].split() == ["checkpoint", "epoch", "loss", "test", "new_test", "heldout"]
        with (run / "results.csv").open() as file:
            recorded = [
                [row["epoch"], f"{float(row['loss']):.6f}", f"{float(row['test']):.4f}", f"{float(row['new_test']):.4f}"] for row in csv.DictReader(file)
            ]
        assert [line.split()[-5:-1] for line in table[1:3]] == recorded

    def test_names_say_run_and_epoch_and_are_short_and_unique(self, run: Path, tmp_path: Path) -> None:
        long = "context-unet8-{}-linear-200ep-s0"
        for parent, name in (("a", "q30"), ("b", "q30"), ("c", long.format("gelu")), ("c", long.format("relu"))):
            (tmp_path / parent / name).mkdir(parents=True)
            for file in (run / "checkpoints").glob("*.pth"):
                shutil.copy(file, tmp_path / parent / name)
        shutil.copy(next((run / "checkpoints").glob("epoch2_*.pth")), tmp_path / "mine.pth")

        def names(*paths: Path) -> list[str]:
            lines = ddpmctl("evaluate", *paths, "--no-confirm").stdout.splitlines()
            start = next(number for number, line in enumerate(lines) if line.startswith("checkpoint")) + 1
            return [line.split("  ")[0] for line in lines[start : start + 2 * len(paths)]]

        assert names(tmp_path / "a" / "q30")[:2] == ["q30 epoch 1", "q30 epoch 2"]
        assert names(*sorted((tmp_path / "c").iterdir())) == ["gelu epoch 1", "gelu epoch 2", "relu epoch 1", "relu epoch 2"]
        alike = [tmp_path / folder / "q30" for folder in "ab"]
        assert names(*alike) == [str(file.relative_to(tmp_path)) for folder in alike for file in sorted(folder.iterdir())]
        assert names(tmp_path / "mine.pth")[0] == "mine.pth"
        alone = names(tmp_path / "c" / long.format("gelu"))
        assert alone == ["context-…200ep-s0 epoch 1", "context-…200ep-s0 epoch 2"]

    def test_the_two_questions_to_the_classifier_are_named(self, run: Path, tmp_path: Path) -> None:
        result = ddpmctl("evaluate", run, "--no-confirm", "--breakdown", "--html", tmp_path / "p.html")
        found, shown = "found: the object is among the k highest outputs", "shown: the probability that the classifier gives the object is above 0.5"
        by_class = result.stdout.split(": by class\n")[1].split("\n\n")[0]
        assert found in by_class.splitlines()[-1]
        assert shown in result.stdout.split("that are not shown")[1]
        captions = re.findall("<figcaption>(.*?)</figcaption>", (tmp_path / "p.html").read_text())
        assert [found in caption for caption in captions[:2]] == [True, False]
        assert shown in captions[1]


def test_compare_shows_each_loss_once(run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run, tmp_path / "other")
    text = ddpmctl("compare", run, other, "--recorded", "-o", tmp_path / "c.png").stdout
    assert [line for line in text.splitlines() if re.search(r"\bloss\b", line)] == [
        "training loss",
        *(line for line in text.splitlines() if line.endswith(" loss") and "epoch" in line),
    ]
    with (run / "results.csv").open() as file:
        losses = [f"{float(row['loss']):.6f}" for row in csv.DictReader(file)]
    assert [text.count(loss) for loss in losses] == [0, 2]  # the last one, for each of the two runs


def test_latex_has_the_columns_of_the_screen_and_is_not_wider_than_the_text(run: Path, tmp_path: Path) -> None:
    result = ddpmctl("evaluate", run, "--no-confirm", "--latex", tmp_path / "t.tex", "--json", tmp_path / "r.json")
    assert result.exit_code == 0, result.output
    text = (tmp_path / "t.tex").read_text()
    (columns,) = re.findall(r"\\begin\{tabular\}\{(\w+)\}", text)
    assert columns == "l" + "rr" * 3
    lines = text[text.index(r"\toprule") : text.index(r"\bottomrule")].splitlines()[1:]
    groups, rules, heads, _, *rows = lines
    assert re.findall(r"\\multicolumn\{(\d)\}\{c\}\{(.*?)\}", groups) == [("1", ""), ("2", "test"), ("2", r"new\_test"), ("2", "heldout")]
    assert re.findall(r"\\cmidrule\(lr\)\{(\d-\d)\}", rules) == ["2-3", "4-5", "6-7"]
    assert all(line.count(" & ") == 6 and line.endswith(r"\\") for line in (heads, *rows))
    assert len(rows) == 4
    (low, high) = json.loads((tmp_path / "r.json").read_text())["checkpoints"][0]["scores"]["test"]["interval"]
    assert rf"{{\scriptsize ({low:.3f}-{high:.3f})}}" in rows[1]
    assert max(map(len, re.sub(r"\\\w+|[{}]", "", "\n".join(rows)).splitlines())) < 90
    assert text.index(r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%") < text.index(r"\begin{tabular}")
    assert text.count("{") == text.count("}")


class TestLayout:
    """What no command is sure to print: cells that do not fit, and characters of two cells."""

    ARMS = ("context-unet128-gelu-linear-600ep-s0", "context-unet128-relu-linear-600ep-s0", "context-unet128-silu-linear-600ep-s0")

    @pytest.mark.parametrize("width", [40, 80, 120])
    def test_folded_cells_lose_no_character(self, width: int) -> None:
        row = ["schedule", "linear", "cosine-periodic", "cosine"]
        lines = lay_out(["setting", *self.ARMS], [row], width=width)
        assert max(map(len, [*lines.head, *lines.rows[0]])) <= width
        for cells, printed in (([["setting"], *([arm] for arm in self.ARMS)], lines.head), ([[cell] for cell in row], lines.rows[0])):
            assert sorted("".join(cell for (cell,) in cells)) == sorted("".join(printed).replace(" ", ""))

    def test_wide_characters_take_two_cells(self) -> None:
        lines = lay_out(["run", "loss"], [["運行", "1"], ["run", "22"]], width=None)
        assert lines.rows == [["運行     1"], ["run     22"]]
