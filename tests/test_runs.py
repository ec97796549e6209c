"""show, runs, runs rm, and runs by their names, through the real command line."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from ddpmctl.cli.app import app
from ddpmctl.runs.folder import Run
from ddpmctl.runs.lock import locked
from ddpmctl.runs.removal import remove_run
from ddpmctl.statistics.ranking import Standing, best_index

from .conftest import ddpmctl, size, train
from .test_cli_errors import refused
from .test_page import Reader

HEAD = "epoch,step,images_seen,seconds,loss,test,new_test,test_exact,new_test_exact,evaluator,checkpoint"


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose weights stay the same (no batch norm), so that all its scores are equal; tests must not change it."""
    return train(tmp_path_factory.mktemp("other"), "--epochs", 3, "--lr", "1e-30", "--net", "unet", "--name", "still")


@pytest.fixture
def runs(run: Path, other: Path, tmp_path: Path) -> Path:
    """A folder with two runs, of which one was stopped: its budget is larger than what is done."""
    folder = tmp_path / "runs"
    shutil.copytree(run, folder / "q30")
    shutil.copytree(other, folder / "still")
    settings = folder / "still" / "config.toml"
    settings.write_text(settings.read_text().replace("epochs = 3", "epochs = 30"))
    return folder


def answered(text: str, *arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=text)


def listed(runs: Path) -> dict[str, dict[str, object]]:
    result = ddpmctl("runs", "--runs-dir", runs, "--json", "-")
    assert result.exit_code == 0, result.output
    return {row["name"]: row for row in json.loads(result.stdout)["runs"]}


class TestBest:
    def test_accuracy_comes_first_then_exact_match_then_the_later_epoch(self) -> None:
        standings = [Standing(0.9, 0.8, 1), Standing(0.9, 0.844, 2), Standing(0.9, 0.75, 3), Standing(0.8, 1.0, 4), Standing(0.9, 0.844, 5)]
        assert best_index(standings) == 4
        assert best_index(standings[:4]) == 1
        assert best_index([Standing(0.5), Standing(0.5)]) == 0

    def test_of_equal_scores_in_training_and_evaluation_the_later_epoch_is_the_best(self, other: Path) -> None:
        assert json.loads((other / "best.json").read_text())["checkpoint"].startswith("checkpoints/epoch3_")
        content = json.loads(ddpmctl("evaluate", other, "--json", "-").stdout)
        assert len({json.dumps(row["scores"]) for row in content["checkpoints"]}) == 1
        assert Path(content["selection"]["path"]).name.startswith("epoch3_")

    def test_of_equal_accuracy_the_higher_exact_match_stays_the_best(self, other: Path, tmp_path: Path) -> None:
        folder = tmp_path / "still"
        shutil.copytree(other, folder)
        head, *rows = (folder / "results.csv").read_text().splitlines()
        cells = rows[2].split(",")
        cells[7:9] = ["1.0", "1.0"]  # as long as before: the state holds the length of the file
        assert all(re.fullmatch(r"0\.0", cell) for cell in rows[2].split(",")[7:9])
        (folder / "results.csv").write_text("\n".join([head, *rows[:2], ",".join(cells)]) + "\n")
        result = ddpmctl("train", "--resume", folder, "--override", "epochs", "--epochs", 4)
        assert result.exit_code == 0, result.output
        assert json.loads((folder / "latest.json").read_text())["checkpoint"].startswith("checkpoints/epoch4_")
        assert json.loads((folder / "best.json").read_text())["checkpoint"].startswith("checkpoints/epoch3_")


class TestList:
    def test_state_scores_and_the_settings_that_differ(self, runs: Path) -> None:
        rows = listed(runs)
        assert {name: row["state"] for name, row in rows.items()} == {"q30": "finished", "still": "stopped"}
        assert rows["q30"]["settings"] == {"net": "context-unet", "epochs": 2, "lr": 1e-4}
        assert (rows["still"]["epochs"], rows["still"]["last"]["epoch"], rows["still"]["best"]["epoch"]) == (3, 3, 3)  # type: ignore[index]
        assert rows["q30"]["data"] == "benchmark, 4 scenes"
        assert rows["q30"]["bytes"] == sum(path.stat().st_size for path in (runs / "q30").rglob("*") if path.is_file())
        text = " ".join(ddpmctl("runs", "--runs-dir", runs).stdout.split())
        assert "net unet, epochs 30, lr 1e-30" in text
        assert "data: benchmark, 4 scenes" in text
        assert f"{sum(rows['q30']['last']['accuracy'].values()) / 2:.3f}" in text  # type: ignore[index]

    def test_a_run_that_is_trained_now_is_running(self, runs: Path) -> None:
        with locked(Run(runs / "q30")):
            assert listed(runs)["q30"]["state"] == "running"
        (runs / "q30" / ".holder").write_text("process 1 on a machine that lost its power")
        assert listed(runs)["q30"]["state"] == "finished"

    def test_broken_runs_are_listed_with_the_reason(self, runs: Path) -> None:
        (runs / "q30" / "results.csv").write_text(f"{HEAD}\n1,2\n")
        (runs / "torn").mkdir()
        (runs / "torn" / "config.toml").write_text("x =")
        result = ddpmctl("runs", "--runs-dir", runs, "--json", "-")
        content = json.loads(result.stdout)
        assert [row["name"] for row in content["runs"]] == ["still"]
        assert {row["name"] for row in content["broken"]} == {"q30", "torn"}
        text = ddpmctl("runs", "--runs-dir", runs).stdout
        assert "results.csv: a row is not in the form that train writes" in text
        assert "torn: " in text
        assert "is not valid TOML" in text

    def test_a_line_that_is_just_written_is_no_damage(self, runs: Path) -> None:
        with (runs / "q30" / "metrics.jsonl").open("a") as file:
            file.write('{"event": "epoch", "epoch": 3, "st')
        assert listed(runs)["q30"]["epochs"] == 2

    def test_no_runs(self, tmp_path: Path) -> None:
        assert "has no run" in ddpmctl("runs", "--runs-dir", tmp_path).stdout
        assert "there is no folder" in refused(2, "runs", "--runs-dir", tmp_path / "nowhere")


class TestRemove:
    def test_it_asks_first(self, runs: Path) -> None:
        refusal = answered("n\n", "runs", "--runs-dir", runs, "rm", "q30")
        assert refusal.exit_code == 1
        assert "Remove 1 run?" in refusal.stderr
        assert (runs / "q30" / "state.pt").is_file()
        assert answered("y\n", "runs", "rm", "q30", runs / "still", "--runs-dir", runs).exit_code == 0
        assert list(runs.iterdir()) == []

    def test_only_runs_that_no_process_trains_are_removed_and_all_or_none(self, runs: Path, tmp_path: Path) -> None:
        mine = tmp_path / "mine"
        (mine / "checkpoints").mkdir(parents=True)
        (mine / "config.toml").write_text("[model]\n")
        (runs / "link").symlink_to(runs / "still", target_is_directory=True)
        for name, words in (("link", "symbolic link"), (mine, "is not a run"), ("nowhere", "no run of this name"), (runs, "is not a run")):
            assert words in refused(2, "runs", "rm", "--yes", "q30", name, "--runs-dir", runs)
        with locked(Run(runs / "q30")):
            assert "is training this run" in refused(2, "runs", "rm", "--yes", "still", "q30", "--runs-dir", runs)
        assert {path.name for path in runs.iterdir()} == {"q30", "still", "link"}
        assert mine.is_dir()

    def test_what_links_in_a_run_point_to_stays(self, runs: Path, tmp_path: Path) -> None:
        (tmp_path / "precious").mkdir()
        (tmp_path / "precious" / "file").write_text("x")
        (runs / "q30" / "samples" / "link").symlink_to(tmp_path / "precious", target_is_directory=True)
        assert ddpmctl("runs", "rm", "q30", "--yes", "--runs-dir", runs).exit_code == 0
        assert (tmp_path / "precious" / "file").read_text() == "x"
        assert [path.name for path in runs.iterdir()] == ["still"]

    def test_the_rest_of_an_interrupted_removal_is_no_run(self, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def stop(folder: Path) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(shutil, "rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            remove_run(runs / "q30")
        assert set(listed(runs)) == {"still"}


class TestShow:
    def test_state_scores_figure_and_next_commands(self, runs: Path, tmp_path: Path) -> None:
        result = ddpmctl("show", "still", "--runs-dir", runs, "-o", tmp_path / "s.png")
        assert result.exit_code == 0, result.output
        text = result.stdout
        assert "stopped; 3 of 30 epochs" in text
        assert "preset report, but net unet, width 8" in text
        assert "best by mean accuracy: epoch 3" in text
        assert f"next: ddpmctl train --resume {runs / 'still'}" in text
        assert f"figure: {tmp_path / 's.png'}" in text
        width, height = size(tmp_path / "s.png")
        assert height > 0.6 * width  # the sample grids stand below the curves
        assert "--override epochs --epochs 4" in ddpmctl("show", runs / "q30", "-o", tmp_path / "q.png").stdout

    def test_the_default_is_the_newest_run_and_a_figure_of_its_name(self, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        os.utime(runs / "q30" / "results.csv", (2**31, 2**31))
        result = ddpmctl("show")
        assert result.exit_code == 0, result.output
        assert "figure: show-q30.png" in result.stdout
        assert (tmp_path / "show-q30.png").is_file()

    def test_a_run_without_scores(self, runs: Path, tmp_path: Path) -> None:
        for name in ("results.csv", "metrics.jsonl", "timing.jsonl"):
            (runs / "q30" / name).unlink()
        result = ddpmctl("show", runs / "q30", "-o", tmp_path / "s.png")
        assert result.exit_code == 0, result.output
        assert "stopped; 0 of 2 epochs" in result.stdout

    def test_the_page(self, runs: Path, tmp_path: Path) -> None:
        result = ddpmctl("show", runs / "q30", "-o", tmp_path / "s.png", "--html", tmp_path / "s.html")
        assert result.exit_code == 0, result.output
        page = Reader((tmp_path / "s.html").read_text(encoding="utf-8"))
        images = [attrs for tag, attrs in page.tags if tag == "img"]
        assert len(images) == 3
        assert all(attrs["alt"] and (attrs["src"] or "").startswith("data:image/") for attrs in images)
        assert "Run q30" in page.texts
        assert page.texts[page.texts.index("timesteps") + 1] == "3"

    def test_refusals(self, runs: Path, tmp_path: Path) -> None:
        assert "must end in .png" in refused(2, "show", runs / "q30", "-o", tmp_path / "a.xyz")
        assert "is not a run" in refused(2, "show", tmp_path)
        assert "has no run" in refused(2, "show", "--runs-dir", tmp_path / "nowhere")


class TestNames:
    @pytest.mark.parametrize(
        ("command", "options"),
        [("sample", ("--labels", "red cube")), ("denoise-grid", ("--labels", "red cube", "--columns", 2)), ("evaluate", ()), ("train", ())],
    )
    def test_the_name_of_a_run_stands_for_its_folder(self, command: str, options: tuple[object, ...], runs: Path, tmp_path: Path) -> None:
        out = {"sample": ("-o", tmp_path / "out"), "denoise-grid": ("-o", tmp_path / "g.png")}.get(command, ())
        result = ddpmctl(command, *(["--resume"] if command == "train" else []), "q30", *options, *out, "--runs-dir", runs)
        assert result.exit_code == 0, result.output
        line = refused(2, command, *(["--resume"] if command == "train" else []), "q3", *options, *out, "--runs-dir", runs)
        assert line == f"error: q3: there is no such file or folder, and no run of this name in {runs}/; did you mean 'q30'?"

    def test_of_a_path_and_a_run_the_path_wins(self, runs: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        shutil.copytree(other, tmp_path / "q30")
        assert "net unet" in ddpmctl("show", "q30").stdout

    def test_compare_takes_names_and_patterns(self, runs: Path, tmp_path: Path) -> None:
        for named in (("q30", "still"), (runs / "*",)):
            result = ddpmctl("compare", *named, "--recorded", "--runs-dir", runs, "-o", tmp_path / "c.png")
            assert result.exit_code == 0, result.output
            assert re.search(r"net\s.*context-unet.*unet", result.stdout)

    def test_a_pattern_is_expanded_or_explained(self, runs: Path) -> None:
        result = ddpmctl("evaluate", runs / "*" / "checkpoints" / "epoch2_*.pth", "--no-confirm", "--json", "-")
        assert len(json.loads(result.stdout)["checkpoints"]) == 2
        assert "no file or folder fits this pattern" in refused(2, "evaluate", runs / "*.pth")
        assert "fits 2 files or folders" in refused(2, "sample", runs / "*", "--labels", "red cube")


class TestOutputs:
    def test_an_option_is_not_taken_for_the_name_of_a_file(self, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert "looks like an option, and the value is missing; a file of that name is ./-x" in refused(2, "evaluate", run, "--json", "-x")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("name", ["a.png", "a.JPG"])
    def test_a_folder_of_images_is_not_named_like_an_image(self, name: str, run: Path, tmp_path: Path) -> None:
        assert "looks like a file" in refused(2, "sample", run, "--labels", "red cube", "-o", tmp_path / name)
        assert not (tmp_path / name).exists()

    def test_folders_are_made_next_to_existing_ones_only_and_not_in_silence(self, run: Path, tmp_path: Path) -> None:
        line = refused(2, "show", run, "-o", tmp_path / "s.png", "--html", tmp_path / "no" / "such" / "x.html")
        assert line.startswith(f"error: --html: there is no folder {tmp_path / 'no'}; make it first")
        assert not list(tmp_path.iterdir())
        result = ddpmctl("show", run, "-o", tmp_path / "new" / "s.png")
        assert result.exit_code == 0, result.output
        assert f"made the folder {tmp_path / 'new'}" in result.stderr

    def test_a_command_that_is_refused_later_leaves_no_empty_folder(self, run: Path, tmp_path: Path) -> None:
        refused(2, "sample", run, "--labels", "red cube", "--steps", 9, "-o", tmp_path / "images" / "test")
        refused(2, "train", "--epochs", 10**9, "--scenes", 1, "--runs-dir", tmp_path / "runs")
        assert not list(tmp_path.iterdir())
