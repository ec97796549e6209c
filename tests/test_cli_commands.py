"""sample, evaluate, denoise-grid, compare and data, through the real command line."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpmctl.engine.checkpoint import load_checkpoint

from .conftest import TINY, ddpmctl, size, train


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def checkpoint_of(run: Path, epoch: int = 2) -> Path:
    return next((run / "checkpoints").glob(f"epoch{epoch}_*.pth"))


def test_all_five_commands_on_a_rendered_folder(tmp_path: Path) -> None:
    data, runs = tmp_path / "data", tmp_path / "runs"
    assert ddpmctl("data", "render", data, "--scenes", 3, "--size", "80x60").exit_code == 0
    assert size(data / "iclevr" / "CLEVR_train_000002_2.png") == (80, 60)
    verified = ddpmctl("data", "verify", data)
    assert verified.exit_code == 0
    assert "9 images of 3 scenes" in verified.stdout
    for act in ("gelu", "relu"):
        trained = ddpmctl("train", *TINY, "--data", data, "--runs-dir", runs, "--epochs", 1, "--act", act, "--name", act)
        assert trained.exit_code == 0, trained.output
        assert "epoch 1" in trained.stdout
    evaluated = ddpmctl("evaluate", runs / "gelu", "--data", data)
    assert evaluated.exit_code == 0, evaluated.output
    assert "heldout" in evaluated.stdout
    sampled = ddpmctl("sample", runs / "relu", "--labels", "red cube", "-o", tmp_path / "out")
    assert sampled.exit_code == 0, sampled.output
    grid = ddpmctl("denoise-grid", runs / "relu", "--labels", "red cube,blue sphere", "-o", tmp_path / "grid.png")
    assert grid.exit_code == 0, grid.output
    compared = ddpmctl("compare", runs / "gelu", runs / "relu", "-o", tmp_path / "compared.png")
    assert compared.exit_code == 0, compared.output
    assert re.search(r"act\s.*gelu.*relu", compared.stdout)
    assert size(tmp_path / "compared.png")[0] > 800


class TestSample:
    def test_pictures_and_a_captioned_grid(self, run: Path, tmp_path: Path) -> None:
        options = ("--labels", "red cube,blue sphere", "--labels", "Gray  Cylinder", "-n", 2, "--sampler", "dpm++2m", "--steps", 3, "--guidance", 2)
        result = ddpmctl("sample", checkpoint_of(run), *options, "-o", tmp_path / "out")
        assert result.exit_code == 0, result.output
        names = sorted(path.name for path in (tmp_path / "out").iterdir())
        assert names == [
            "000-red-cube+blue-sphere-seed0-000.png", "000-red-cube+blue-sphere-seed0-001.png",
            "001-gray-cylinder-seed0-000.png", "001-gray-cylinder-seed0-001.png", "grid.png",
        ]  # fmt: skip
        assert pixels(tmp_path / "out" / names[0]).shape == (64, 64, 3)
        assert sorted(result.stdout.split()) == sorted(str(tmp_path / "out" / name) for name in names)
        assert "dpm++2m, 3 steps, guidance 2: 6 network calls an image" in result.stderr

    def test_the_seed_decides_and_the_count_does_not(self, run: Path, tmp_path: Path) -> None:
        for name, options in {"a": ("-n", 1), "b": ("-n", 3), "c": ("-n", 1, "--seed", 1)}.items():
            assert ddpmctl("sample", run, "--labels", "red cube", "-o", tmp_path / name, *options).exit_code == 0
        a, b = (pixels(tmp_path / name / "000-red-cube-seed0-000.png").astype(int) for name in "ab")
        assert np.abs(a - b).max() <= 1  # rounding to 8 bits may tip where float32 differs in its last digits
        assert np.abs(a - pixels(tmp_path / "c" / "000-red-cube-seed1-000.png")).max() > 20

    def test_the_newest_runs_best_is_taken_and_named(self, run: Path, tmp_path: Path) -> None:
        result = ddpmctl("sample", "--runs-dir", run.parent, "--labels", "red cube", "-o", tmp_path)
        assert result.exit_code == 0, result.output
        best = json.loads((run / "best.json").read_text())["checkpoint"]
        assert f"checkpoint: {run / best}" in result.stderr

    @pytest.mark.parametrize("prefix", ["", "nn_model."])
    def test_a_foreign_state_dict(self, prefix: str, run: Path, tmp_path: Path) -> None:
        own = load_checkpoint(checkpoint_of(run))
        torch.save({prefix + name: value for name, value in own.weights.items()}, tmp_path / "foreign.pth")
        options = ("--labels", "red cube", "--steps", 3, "--sampler", "ddim", "--precision", "fp32")
        foreign = ddpmctl("sample", tmp_path / "foreign.pth", *options, "--assume", "timesteps=6", "-o", tmp_path / "foreign")
        assert foreign.exit_code == 0, foreign.output
        assert "carries no settings" in foreign.stderr
        assert ddpmctl("sample", own.path, *options, "-o", tmp_path / "own").exit_code == 0
        assert np.array_equal(*(pixels(tmp_path / name / "grid.png") for name in ("foreign", "own")))


class TestEvaluate:
    def test_every_checkpoint_on_every_condition_file(self, run: Path, tmp_path: Path) -> None:
        result = ddpmctl("evaluate", run, "--json", tmp_path / "r.json", "--csv", tmp_path / "r.csv", "--repeats", 2, "--grid", tmp_path / "grids")
        assert result.exit_code == 0, result.output
        content = json.loads((tmp_path / "r.json").read_text())
        assert [row["epoch"] for row in content["checkpoints"]] == [1, 2]
        for row in content["checkpoints"]:
            totals = {name: (score["labels"], score["images"]) for name, score in row["scores"].items()}
            assert totals == {"test": (2 * 72, 64), "new_test": (2 * 84, 64), "heldout": (2 * 96, 64)}
            assert set(row["recorded"]) == {"test", "new_test"}
        assert len(content["evaluator"]["sha256"]) == 64
        with (tmp_path / "r.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [(row["epoch"], row["conditions"]) for row in rows] == [(e, c) for e in "12" for c in ("test", "new_test", "heldout")]
        assert len(list((tmp_path / "grids").iterdir())) == 6
        assert content["evaluator"]["sha256"][:12] in result.stdout
        assert "best by mean accuracy" in result.stdout

    def test_what_auto_came_to_is_told_and_is_part_of_the_question(self, run: Path) -> None:
        asked = ("evaluate", checkpoint_of(run), "--sampler", "ddim", "--seed", 11)
        (row,) = json.loads(ddpmctl(*asked, "--steps", "auto", "--json", "-").stdout)["checkpoints"]
        assert row["sampling"]["steps"] == 6  # all of this model's T, being fewer than ddim's own choice
        again = ddpmctl(*asked, "--steps", 6).stdout
        assert "ddim, 6 steps, guidance 0;" in again
        assert "1 of 1 from kept results" in again
        guided = ("--steps", 3, "--guidance", 2, "--guidance-to", 0.7, "--spacing", "karras")
        assert "ddim, 3 steps spaced by karras, guidance 2 for t / T from 0 to 0.7;" in ddpmctl(*asked, *guided).stdout

    def test_a_guidance_interval_saves_network_calls(self, run: Path, tmp_path: Path) -> None:
        asked = ("sample", run, "--labels", "red cube", "--sampler", "ddim", "--guidance", 2, "-o", tmp_path)
        assert "12 network calls an image" in ddpmctl(*asked).stderr
        assert "9 network calls an image" in ddpmctl(*asked, "--guidance-from", 0.5, "--guidance-to", 0.9).stderr  # t = 3, 4, 5 of 6

    def test_scores_agree_with_those_recorded_in_training(self, run: Path) -> None:
        result = ddpmctl("evaluate", checkpoint_of(run), "--precision", "fp32", "--json", "-")
        (row,) = json.loads(result.stdout)["checkpoints"]
        for name in ("test", "new_test"):
            assert row["scores"][name]["accuracy"] == row["recorded"][name]
        assert checkpoint_of(run).stem.split("_")[1:] == [str(row["recorded"][name]) for name in ("test", "new_test")]

    def test_kept_results_answer_a_second_call_and_not_another_question(self, run: Path, tmp_path: Path) -> None:
        copy = tmp_path / "copy.pth"
        shutil.copy(checkpoint_of(run), copy)
        ask = ("evaluate", copy, "--seed", 7)
        assert "0 of 1 from kept results" in ddpmctl(*ask).stdout
        again = ddpmctl(*ask)
        assert "1 of 1 from kept results" in again.stdout
        assert "0 of 1 from kept results" in ddpmctl(*ask, "--steps", 2).stdout
        assert "0 of 1 from kept results" in ddpmctl("evaluate", copy, "--seed", 8).stdout
        content = torch.load(copy, weights_only=True)
        content["weights"]["out.3.bias"] += 0.5
        torch.save(content, copy)
        assert "0 of 1 from kept results" in ddpmctl(*ask).stdout

    def test_broken_files_are_listed_and_do_not_stop_the_rest(self, run: Path, tmp_path: Path) -> None:
        shutil.copy(checkpoint_of(run), tmp_path / "good.pth")
        (tmp_path / "broken.pth").write_bytes(b"torn")
        result = ddpmctl("evaluate", tmp_path, "--json", tmp_path / "r.json")
        assert result.exit_code == 3
        assert "good.pth" in result.stdout
        assert re.search(r"skipped .*broken\.pth: is no checkpoint", result.stderr)
        content = json.loads((tmp_path / "r.json").read_text())
        assert [Path(row["path"]).name for row in content["checkpoints"]] == ["good.pth"]
        assert [Path(row["path"]).name for row in content["failed"]] == ["broken.pth"]

    def test_checkpoints_of_one_name_keep_their_grids_apart(self, run: Path, tmp_path: Path) -> None:
        for folder in ("a", "b"):
            (tmp_path / folder).mkdir()
            shutil.copy(checkpoint_of(run), tmp_path / folder / "same.pth")
        result = ddpmctl("evaluate", tmp_path / "a", tmp_path / "b", "--steps", 2, "--grid", tmp_path / "grids")
        assert result.exit_code == 0, result.output
        made = {path.name for path in (tmp_path / "grids").iterdir()}
        assert made == {f"{folder}-same_{name}.png" for folder in "ab" for name in ("test", "new_test", "heldout")}
        assert "a-same" in result.stdout

    def test_conditions_of_ones_own(self, run: Path, tmp_path: Path) -> None:
        (tmp_path / "mine.json").write_text(json.dumps([["red cube"], ["blue sphere", "gray cylinder"]]))
        result = ddpmctl("evaluate", checkpoint_of(run), "--conditions", tmp_path / "mine.json", "--json", "-")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["checkpoints"][0]["scores"]["mine"]["labels"] == 3


class TestDenoiseGrid:
    def test_rows_columns_x0_and_gif(self, run: Path, tmp_path: Path) -> None:
        sizes = {}
        for name, options in {"one": (), "two": ("--labels", "gray cylinder"), "x0": ("--x0",), "few": ("--columns", 3)}.items():
            result = ddpmctl("denoise-grid", run, "--labels", "red cube,blue sphere", "-o", tmp_path / f"{name}.png", *options, "--gif", tmp_path / "a.gif")
            assert result.exit_code == 0, result.output
            sizes[name] = size(tmp_path / f"{name}.png")
        row = 128 + 6
        assert sizes["two"][1] == sizes["x0"][1] == sizes["one"][1] + row
        assert sizes["one"][0] == sizes["few"][0] + 4 * row  # 7 moments of 6 steps against 3
        with Image.open(tmp_path / "a.gif") as gif:
            assert gif.n_frames == 7

    def test_it_goes_from_noise_to_what_sample_makes(self, run: Path, tmp_path: Path) -> None:
        common = ("--labels", "red cube", "--precision", "fp32")
        assert ddpmctl("denoise-grid", run, *common, "--columns", 2, "-o", tmp_path / "g.png").exit_code == 0
        assert ddpmctl("sample", run, *common, "-o", tmp_path / "out").exit_code == 0
        sheet = pixels(tmp_path / "g.png")
        last = sheet[-134:-6, -134:-6][::2, ::2]
        first = sheet[-134:-6, -268:-140][::2, ::2]
        assert np.array_equal(last, pixels(tmp_path / "out" / "000-red-cube-seed0-000.png"))
        assert 60 < first.std() < 110  # unit normal noise on the scale of 127.5, clipped


class TestCompare:
    @pytest.fixture
    def report_folders(self, tmp_path: Path) -> tuple[Path, Path]:
        """Two folders whose only record is their file names, with the report's figures at 400 and 399."""
        folders = []
        recorded = {"gelu": [(395, 0.5, 0.55), (400, 0.5555555555555556, 0.6190476190476191)], "relu": [(394, 0.6, 0.5), (399, 0.5416666, 0.619)]}
        for name, rows in recorded.items():
            folders.append(tmp_path / name)
            folders[-1].mkdir()
            for epoch, test, new_test in rows:
                (folders[-1] / f"epoch{epoch}_{test}_{new_test}.pth").write_bytes(b"weights are not looked at")
        return folders[0], folders[1]

    def test_report_style_folders(self, report_folders: tuple[Path, Path], tmp_path: Path) -> None:
        result = ddpmctl("compare", *report_folders, "--at-epoch", 400, "--last", 2, "-o", tmp_path / "c.png")
        assert result.exit_code == 0, result.output
        test_table = result.stdout.split("accuracy on new_test")[0]
        gelu, relu = (next(line for line in test_table.splitlines() if re.match(rf"\W*{name}", line)) for name in ("gelu", "relu"))
        assert [float(x) for x in re.findall(r"\d\.\d{4}", gelu)] == pytest.approx([0.5556, 0.5556, 0.5556, 0.5278, 0.0393])
        assert [float(x) for x in re.findall(r"\d\.\d{4}", relu)] == pytest.approx([0.5417, 0.5417, 0.6, 0.5708, 0.0412])
        assert "0.5417 (399)" in relu
        assert "0.6000 (394)" in relu
        assert "single draws" in result.stderr
        assert size(tmp_path / "c.png")[0] > 900

    def test_settings_that_differ_and_no_others(self, run: Path, tmp_path: Path) -> None:
        other = train(tmp_path, "--epochs", 1, "--lr", "0.0005", "--seed", 3, scenes=2)
        result = ddpmctl("compare", run, other, "-o", tmp_path / "c.png")
        assert result.exit_code == 0, result.output
        settings = result.stdout.split("accuracy on test")[0]
        assert re.findall(r"^\W*(lr|epochs|seed|width|act)\b", settings, re.M) == ["epochs", "lr"]
        assert "at epoch 1" in result.stdout

    def test_refusals(self, run: Path, tmp_path: Path) -> None:
        for arguments, expected in (((run,), "two or more"), ((run, run), "named twice"), ((run, tmp_path), "no .pth checkpoint")):
            result = ddpmctl("compare", *arguments, "-o", tmp_path / "c.png")
            assert result.exit_code == 2
            assert expected in result.stderr
        assert not (tmp_path / "c.png").exists()


def test_data_verify_names_all_problems_and_exits_3(tmp_path: Path) -> None:
    data = tmp_path / "data"
    assert ddpmctl("data", "render", data, "--scenes", 2, "--size", "32x24").exit_code == 0
    (data / "iclevr" / "CLEVR_train_000000_1.png").unlink()
    (data / "iclevr" / "CLEVR_train_000001_1.png").write_bytes(b"torn")
    (data / "iclevr" / "stray.png").write_bytes(b"")
    result = ddpmctl("data", "verify", data)
    assert result.exit_code == 3
    for name in ("CLEVR_train_000000_1.png", "CLEVR_train_000001_1.png", "stray.png"):
        assert name in result.stdout
    assert "3 problems" in result.stderr
