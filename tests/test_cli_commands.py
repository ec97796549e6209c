"""sample, evaluate, denoise-grid and data, through the real command line."""

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

from ddpmctl.checkpoints.format import load_checkpoint

from .conftest import TINY, ddpmctl, size


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def checkpoint_of(run: Path, epoch: int = 2) -> Path:
    return next((run / "checkpoints").glob(f"epoch{epoch}_*.pth"))


@pytest.mark.slow
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
    def test_images_and_a_captioned_grid(self, run: Path, tmp_path: Path) -> None:
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
        assert "dpm++2m, 3 steps, guidance 2: 6 network calls per image" in result.stderr

    def test_images_depend_on_the_seed_and_not_on_the_count(self, run: Path, tmp_path: Path) -> None:
        for name, options in {"a": ("-n", 1), "b": ("-n", 3), "c": ("-n", 1, "--seed", 1)}.items():
            assert ddpmctl("sample", run, "--labels", "red cube", "-o", tmp_path / name, *options).exit_code == 0
        a, b = (pixels(tmp_path / name / "000-red-cube-seed0-000.png").astype(int) for name in "ab")
        assert np.abs(a - b).max() <= 1  # rounding to 8 bits may differ where float32 differs in its last digits
        assert np.abs(a - pixels(tmp_path / "c" / "000-red-cube-seed1-000.png")).max() > 20

    def test_the_default_is_the_best_checkpoint_of_the_newest_run(self, run: Path, tmp_path: Path) -> None:
        result = ddpmctl("sample", "--runs-dir", run.parent, "--labels", "red cube", "-o", tmp_path)
        assert result.exit_code == 0, result.output
        best = json.loads((run / "best.json").read_text())["checkpoint"]
        assert f"checkpoint: {run / best}" in result.stderr

    @pytest.mark.parametrize("prefix", ["", "nn_model."])
    def test_a_foreign_state_dict(self, prefix: str, run: Path, tmp_path: Path) -> None:
        own = load_checkpoint(checkpoint_of(run))
        torch.save({prefix + name: value for name, value in own.weights.items()}, tmp_path / "foreign.pth")
        options = ("--labels", "red cube", "--steps", 3, "--sampler", "ddim", "--precision", "fp32")
        foreign = ddpmctl("sample", tmp_path / "foreign.pth", *options, "--assume", "timesteps=3", "-o", tmp_path / "foreign")
        assert foreign.exit_code == 0, foreign.output
        assert "carries no settings" in foreign.stderr
        assert ddpmctl("sample", own.path, *options, "-o", tmp_path / "own").exit_code == 0
        assert np.array_equal(*(pixels(tmp_path / name / "grid.png") for name in ("foreign", "own")))


class TestEvaluate:
    def test_every_file_that_is_written_is_named_on_stderr(self, run: Path, tmp_path: Path) -> None:
        files = {f"--{kind}": tmp_path / f"a.{kind}" for kind in ("json", "csv", "latex", "html")}
        result = ddpmctl("evaluate", checkpoint_of(run), "--steps", 1, *(part for pair in files.items() for part in pair), "--figures", tmp_path / "figures")
        assert result.exit_code == 0, result.output
        named = result.stderr.replace("\n", " ")
        for file in (*files.values(), *(tmp_path / "figures").glob("*.png"), *(tmp_path / "figures").glob("*.svg")):
            assert file.name in named
            assert file.is_file()

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
        assert "best by pooled accuracy" in result.stdout

    def test_the_actual_number_of_steps_is_shown_and_in_the_cache_key(self, run: Path) -> None:
        asked = ("evaluate", checkpoint_of(run), "--sampler", "ddim", "--seed", 11)
        (row,) = json.loads(ddpmctl(*asked, "--steps", "auto", "--json", "-").stdout)["checkpoints"]
        assert row["sampling"]["steps"] == 3  # the model's T, which is smaller than ddim's default
        again = ddpmctl(*asked, "--steps", 3).stdout
        assert "ddim, 3 steps, guidance 0;" in again
        assert "1 of 1 from cached results" in again
        guided = ("--steps", 2, "--guidance", 2, "--guidance-to", 0.7, "--spacing", "karras")
        assert "ddim, 2 steps spaced by karras, guidance 2 for t / T from 0 to 0.7;" in ddpmctl(*asked, *guided).stdout

    def test_a_guidance_interval_saves_network_calls(self, run: Path, tmp_path: Path) -> None:
        asked = ("sample", run, "--labels", "red cube", "--sampler", "ddim", "--guidance", 2, "-o", tmp_path)
        assert "6 network calls per image" in ddpmctl(*asked).stderr
        assert "4 network calls per image" in ddpmctl(*asked, "--guidance-from", 0.5, "--guidance-to", 0.9).stderr  # t = 2 of 3

    def test_scores_agree_with_those_recorded_in_training(self, run: Path) -> None:
        result = ddpmctl("evaluate", checkpoint_of(run), "--precision", "fp32", "--json", "-")
        (row,) = json.loads(result.stdout)["checkpoints"]
        for name in ("test", "new_test"):
            assert row["scores"][name]["accuracy"] == row["recorded"][name]
        assert checkpoint_of(run).stem.split("_")[1:] == [str(row["recorded"][name]) for name in ("test", "new_test")]

    def test_cached_results_are_used_only_for_the_same_evaluation(self, run: Path, tmp_path: Path) -> None:
        copy = tmp_path / "copy.pth"
        shutil.copy(checkpoint_of(run), copy)
        ask = ("evaluate", copy, "--seed", 7)
        assert "0 of 1 from cached results" in ddpmctl(*ask).stdout
        again = ddpmctl(*ask)
        assert "1 of 1 from cached results" in again.stdout
        assert "0 of 1 from cached results" in ddpmctl(*ask, "--steps", 2).stdout
        assert "0 of 1 from cached results" in ddpmctl("evaluate", copy, "--seed", 8).stdout
        content = torch.load(copy, weights_only=True)
        content["weights"]["out.3.bias"] += 0.5
        torch.save(content, copy)
        assert "0 of 1 from cached results" in ddpmctl(*ask).stdout

    def test_the_last_device_stays_the_choice_while_it_is_there(self, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DDPMCTL_CACHE_DIR", str(tmp_path / "cache"))
        ask = ("evaluate", run, "--device", "cpu", "--steps", 2)
        assert ddpmctl(*ask).exit_code == 0
        (remembered,) = (tmp_path / "cache" / "devices").iterdir()
        remembered.write_text('["cuda", "bf16"]')
        gone = ddpmctl(*ask)
        assert gone.exit_code == 2
        assert "the last evaluation used cuda, which is not available now; run the command again to use cpu" in gone.output
        assert "2 of 2 from cached results" in ddpmctl(*ask).stdout
        remembered.write_text('["cpu", "fp64"]')  # no precision of ours: as if nothing were remembered
        assert "2 of 2 from cached results" in ddpmctl(*ask).stdout
        listed = ddpmctl("data", "cache", "list").stdout
        assert "devices" in listed

    def test_more_repeats_are_added_to_cached_results(self, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        ask = ("evaluate", checkpoint_of(run), "--seed", 21, "--precision", "fp32", "--json")
        for count, kept in ((1, "0 of 1"), (3, "0 of 1"), (2, "1 of 1"), (3, "1 of 1")):
            result = ddpmctl(*ask, tmp_path / f"{count}.json", "--repeats", count)
            assert f"{kept} from cached results" in result.stdout
        monkeypatch.setenv("DDPMCTL_CACHE_DIR", str(tmp_path / "cache"))
        ddpmctl(*ask, tmp_path / "new.json", "--repeats", 3)
        grown, new = (json.loads((tmp_path / f"{name}.json").read_text())["checkpoints"][0]["scores"] for name in ("3", "new"))
        assert grown == new
        (kept_file, *_) = (tmp_path / "cache" / "results").glob("*.npz")
        kept_file.write_bytes(kept_file.read_bytes()[:-100])
        assert "0 of 1 from cached results" in ddpmctl(*ask, tmp_path / "again.json", "--repeats", 3).stdout
        assert json.loads((tmp_path / "again.json").read_text())["checkpoints"][0]["scores"] == new

    def test_the_best_is_scored_again_on_new_noise(self, run: Path, tmp_path: Path) -> None:
        result = ddpmctl("evaluate", run, "--json", tmp_path / "r.json", "--repeats", 2)
        content = json.loads((tmp_path / "r.json").read_text())
        pooled = {
            row["path"]: sum(s["hits"] for s in row["scores"].values()) / sum(s["labels"] for s in row["scores"].values()) for row in content["checkpoints"]
        }
        selection = content["selection"]
        assert selection["chosen_by"] == pytest.approx(max(pooled.values())) == pytest.approx(pooled[selection["path"]])
        assert selection["difference"] == pytest.approx(selection["confirmed"]["estimate"] - selection["chosen_by"])
        assert selection["confirmed"]["low"] <= selection["confirmed"]["estimate"] <= selection["confirmed"]["high"]
        assert f"{selection['confirmed']['estimate']:.4f}" in result.stdout
        alone = ddpmctl("evaluate", run, "--no-confirm", "--repeats", 2, "--json", "-")
        assert json.loads(alone.stdout)["selection"] is None

    def test_intervals_breakdown_and_label_sets_in_training(self, run: Path, tmp_path: Path) -> None:
        result = ddpmctl("evaluate", checkpoint_of(run), "--breakdown", "--json", tmp_path / "r.json")
        content = json.loads((tmp_path / "r.json").read_text())
        assert content["conditions"]["heldout"] == {"count": 32, "in_training": 0}
        test = content["checkpoints"][0]["scores"]["test"]
        assert test["interval"][0] <= test["accuracy"] <= test["interval"][1]
        assert f"{test['accuracy']:.4f} ({test['interval'][0]:.3f}-{test['interval'][1]:.3f})" in " ".join(result.stdout.split())
        assert sum(part["labels"] for part in test["by"]["class"].values()) == sum(part["labels"] for part in test["by"]["shape"].values()) == 72
        for title in ("by objects", "by colours", "by class", "by colour", "by shape", "right colour, wrong shape"):
            assert title in result.stdout
        assert "label sets that occur in training" in result.stdout
        assert "heldout 0 of 32" in result.stdout

    def test_a_sweep_over_a_sampling_setting(self, run: Path, tmp_path: Path) -> None:
        asked = ("evaluate", checkpoint_of(run), "--figures", tmp_path, "--csv", tmp_path / "s.csv", "--sampler", "ddim", "--sweep")
        result = ddpmctl(*asked, "steps=1,2,3")
        assert result.exit_code == 0, result.output
        with (tmp_path / "s.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [(row["steps"], row["network calls"]) for row in rows] == [("1", "1"), ("2", "2"), ("3", "3")]
        assert {row["checkpoint"] for row in rows} == {checkpoint_of(run).name}
        assert size(tmp_path / "sweep-steps.png")[0] > 600
        with Image.open(tmp_path / "sweep-steps.png") as image:
            pixels = np.asarray(image.convert("L"))
        assert pixels[:, :2].min() == pixels[:, -2:].min() == 255, "a label runs off the figure"
        assert ddpmctl(*asked, "guidance=0,1").exit_code == 0
        with (tmp_path / "s.csv").open() as file:
            assert [(row["guidance"], row["network calls"]) for row in csv.DictReader(file)] == [("0.0", "3"), ("1.0", "6")]
        for flag, value in (("--json", tmp_path / "s.json"), ("--html", tmp_path / "s.html"), ("--grid", tmp_path / "grid")):
            refused = ddpmctl(*asked, "steps=2", flag, value)
            assert refused.exit_code == 2
            assert flag in refused.stderr
            assert not value.exists()
        (tmp_path / "broken.pth").write_bytes(b"torn")
        partly = ddpmctl(*asked, "steps=2,3", "--", tmp_path / "broken.pth")
        assert partly.exit_code == 3
        assert "1 of 2 checkpoints" in partly.stderr
        for wrong in ("steps", "sampler=ddim,ddpm", "steps=two", "steps=0"):
            refused = ddpmctl(*asked, wrong)
            assert refused.exit_code == 2
            assert "--steps" in refused.stderr or "--sweep" in refused.stderr

    def test_figures_and_latex(self, run: Path, tmp_path: Path) -> None:
        result = ddpmctl("evaluate", checkpoint_of(run), "--figures", tmp_path / "figures", "--latex", tmp_path / "t.tex")
        assert result.exit_code == 0, result.output
        names = {path.name for path in (tmp_path / "figures").iterdir()}
        assert names == {f"{name}.{kind}" for name in ("classes", "confusion", "schedules") for kind in ("png", "svg")}
        assert r"new\_test" in (tmp_path / "t.tex").read_text()

    def test_broken_files_are_listed_and_do_not_stop_the_rest(self, run: Path, tmp_path: Path) -> None:
        shutil.copy(checkpoint_of(run), tmp_path / "good.pth")
        (tmp_path / "broken.pth").write_bytes(b"torn")
        result = ddpmctl("evaluate", tmp_path, "--json", tmp_path / "r.json")
        assert result.exit_code == 3
        assert "good.pth" in result.stdout
        assert re.search(r"skipped .*broken\.pth: is not a checkpoint", result.stderr)
        content = json.loads((tmp_path / "r.json").read_text())
        assert [Path(row["path"]).name for row in content["checkpoints"]] == ["good.pth"]
        assert [Path(row["path"]).name for row in content["failed"]] == ["broken.pth"]

    def test_checkpoints_with_the_same_name_have_separate_grids(self, run: Path, tmp_path: Path) -> None:
        for folder in ("a", "b"):
            (tmp_path / folder).mkdir()
            shutil.copy(checkpoint_of(run), tmp_path / folder / "same.pth")
        result = ddpmctl("evaluate", tmp_path / "a", tmp_path / "b", "--steps", 2, "--grid", tmp_path / "grids")
        assert result.exit_code == 0, result.output
        made = {path.name for path in (tmp_path / "grids").iterdir()}
        assert made == {f"{folder}-same_{name}.png" for folder in "ab" for name in ("test", "new_test", "heldout")}
        assert "a-same" in result.stdout

    def test_user_conditions(self, run: Path, tmp_path: Path) -> None:
        (tmp_path / "mine.json").write_text(json.dumps([["red cube"], ["blue sphere", "gray cylinder"]]))
        result = ddpmctl("evaluate", checkpoint_of(run), "--conditions", tmp_path / "mine.json", "--json", "-")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["checkpoints"][0]["scores"]["mine"]["labels"] == 3


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
