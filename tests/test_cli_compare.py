"""compare through the real command line: recorded scores, and the verdict."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import pytest

from .conftest import ddpmctl, size, train


class TestRecorded:
    @pytest.fixture
    def report_folders(self, tmp_path: Path) -> tuple[Path, Path]:
        """Two folders with scores only in the file names, with the report's figures at 400 and 399."""
        folders = []
        recorded = {"gelu": [(395, 0.5, 0.55), (400, 0.5555555555555556, 0.6190476190476191)], "relu": [(394, 0.6, 0.5), (399, 0.5416666, 0.619)]}
        for name, rows in recorded.items():
            folders.append(tmp_path / name)
            folders[-1].mkdir()
            for epoch, test, new_test in rows:
                (folders[-1] / f"epoch{epoch}_{test}_{new_test}.pth").write_bytes(b"weights are not read")
        return folders[0], folders[1]

    def test_report_style_folders(self, report_folders: tuple[Path, Path], tmp_path: Path) -> None:
        result = ddpmctl("compare", *report_folders, "--at-epoch", 400, "--last", 2, "--recorded", "-o", tmp_path / "c.png")
        assert result.exit_code == 0, result.output
        test_table = result.stdout.split("accuracy on new_test")[0]
        gelu, relu = (next(line for line in test_table.splitlines() if re.match(rf"\W*{name}", line)) for name in ("gelu", "relu"))
        assert [float(x) for x in re.findall(r"\d\.\d{4}", gelu)] == pytest.approx([0.5556, 0.5556, 0.5556, 0.5278, 0.0393])
        assert [float(x) for x in re.findall(r"\d\.\d{4}", relu)] == pytest.approx([0.5417, 0.5417, 0.6, 0.5708, 0.0412])
        assert "0.5417 (399)" in relu
        assert "0.6000 (394)" in relu
        assert "single draws" in result.stderr
        assert size(tmp_path / "c.png")[0] > 900

    def test_only_settings_that_differ_are_listed(self, run: Path, tmp_path: Path) -> None:
        other = train(tmp_path, "--epochs", 1, "--lr", "0.0005", "--seed", 3, scenes=2)
        result = ddpmctl("compare", run, other, "--recorded", "-o", tmp_path / "c.png")
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


@pytest.fixture(scope="module")
def crossed(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, int], Path]:
    """Two activations by two schedules, the linear ones with two training seeds."""
    folder = tmp_path_factory.mktemp("crossed")
    cells = [(act, schedule, 0) for act in ("gelu", "relu") for schedule in ("linear", "cosine")] + [("gelu", "linear", 1), ("relu", "linear", 1)]
    return {(act, schedule, seed): train(folder, "--epochs", 1, "--act", act, "--schedule", schedule, "--seed", seed) for act, schedule, seed in cells}


class TestVerdict:
    @pytest.mark.slow
    def test_training_seeds_are_replicates_of_one_arm(self, crossed: dict[tuple[str, str, int], Path], tmp_path: Path) -> None:
        runs = [crossed[act, "linear", seed] for act in ("gelu", "relu") for seed in (0, 1)]
        outputs = {name: tmp_path / f"v.{name}" for name in ("json", "csv", "latex", "html")}
        written = [part for name, file in outputs.items() for part in (f"--{name}", file)]
        result = ddpmctl("compare", *runs, "--repeats", 2, *written, "-o", tmp_path / "c.png")
        assert result.exit_code == 0, result.output
        found = json.loads(outputs["json"].read_text())
        assert {arm["name"]: len(arm["checkpoints"]) for arm in found["arms"]} == {"act=gelu": 2, "act=relu": 2}
        (pair,) = found["pairs"]
        gelu, relu = (arm["pooled"]["estimate"] for arm in found["arms"])
        assert pair["estimate"] == pytest.approx(gelu - relu)
        assert pair["low"] <= pair["estimate"] <= pair["high"]
        assert pair["spread"]["seeds_df"] == 2
        assert found["sentences"][0] in result.stdout.replace("\n", " ") or found["sentences"][0] in " ".join(result.stdout.split())
        with outputs["csv"].open() as file:
            assert [row["points"] for row in csv.DictReader(file)] == [f"{100 * pair['estimate']:+.1f}"]
        assert outputs["latex"].read_text().count(r"\begin{tabular}") == 3
        assert "act=gelu" in outputs["html"].read_text()
        assert size(tmp_path / "c-verdict.png")[0] > 1000
        assert (tmp_path / "c-verdict.svg").read_text().startswith("<?xml")

    def test_held_out_conditions_are_a_separate_family(self, crossed: dict[tuple[str, str, int], Path], tmp_path: Path) -> None:
        runs = [crossed["gelu", "linear", 0], crossed["relu", "linear", 0], crossed["relu", "cosine", 0]]
        outputs = {name: tmp_path / f"v.{name}" for name in ("json", "latex", "html")}
        written = [part for name, file in outputs.items() for part in (f"--{name}", file)]
        result = ddpmctl("compare", *runs, "--repeats", 2, "--anyway", *written, "-o", tmp_path / "c.png")
        assert result.exit_code == 0, result.output
        found = json.loads(outputs["json"].read_text())
        scores = [arm["scores"]["heldout"]["estimate"] for arm in found["arms"]]
        assert [pair["name"] for pair in found["heldout"]] == [pair["name"] for pair in found["pairs"]]
        gaps = [scores[i] - scores[j] for i, j in ((0, 1), (0, 2), (1, 2))]
        assert [pair["estimate"] for pair in found["heldout"]] == pytest.approx(gaps)
        assert found["files"] == ["test", "new_test"]
        for family in ("pairs", "heldout"):  # Holm: the smallest of three p-values counts three times
            least = min(found[family], key=lambda pair: pair["p"])
            assert least["p_adjusted"] == pytest.approx(min(1, 3 * least["p"]))
        title = "differences, points of accuracy on heldout"
        assert title in " ".join(result.stdout.split())
        assert all(title in outputs[name].read_text() for name in ("latex", "html"))
        assert (tmp_path / "c-verdict.svg").read_text().count("heldout") == 1 + 3  # in the legend, and in the names of the three differences

    def test_pooled_held_out_conditions_are_no_family(self, crossed: dict[tuple[str, str, int], Path], tmp_path: Path) -> None:
        (tmp_path / "heldout.json").write_text(json.dumps([["red cube"]]))
        pair = (crossed["gelu", "linear", 0], crossed["relu", "linear", 0])
        asked = ("compare", *pair, "--repeats", 2, "--conditions", tmp_path / "heldout.json", "-o", tmp_path / "c.png", "--json", tmp_path / "v.json")
        result = ddpmctl(*asked)
        assert result.exit_code == 0, result.output
        found = json.loads((tmp_path / "v.json").read_text(), parse_constant=pytest.fail)
        assert (found["files"], found["heldout"]) == (["heldout"], [])
        assert found["pairs"][0]["low"] is None  # one condition gives no interval

    def test_two_crossed_settings_have_main_effects_and_an_interaction(self, crossed: dict[tuple[str, str, int], Path], tmp_path: Path) -> None:
        runs = [crossed[act, schedule, 0] for act in ("gelu", "relu") for schedule in ("linear", "cosine")]
        result = ddpmctl("compare", *runs, "--repeats", 1, "--json", tmp_path / "v.json", "-o", tmp_path / "c.png")
        assert result.exit_code == 0, result.output
        found = json.loads((tmp_path / "v.json").read_text())
        assert len(found["pairs"]) == 6
        scores = {(arm["settings"]["act"], arm["settings"]["schedule"]): arm["pooled"]["estimate"] for arm in found["arms"]}
        act, schedule, interaction = (effect["estimate"] for effect in found["effects"])
        cells = [scores[key] for key in (("gelu", "cosine"), ("gelu", "linear"), ("relu", "cosine"), ("relu", "linear"))]
        assert act == pytest.approx((cells[0] + cells[1] - cells[2] - cells[3]) / 2)
        assert schedule == pytest.approx((cells[0] - cells[1] + cells[2] - cells[3]) / 2)
        assert interaction == pytest.approx(cells[0] - cells[1] - cells[2] + cells[3])
        assert "another training seed" in " ".join(result.stdout.split())

    def test_a_checkpoint_is_sampled_once(self, crossed: dict[tuple[str, str, int], Path], tmp_path: Path) -> None:
        pair = (crossed["gelu", "linear", 0], crossed["relu", "linear", 0])
        asked = ("compare", *pair, "--repeats", 2, "--seed", 5, "-o", tmp_path / "c.png")
        assert "sampling" in ddpmctl(*asked).stderr
        assert "sampling" not in ddpmctl(*asked).stderr
        evaluated = ddpmctl("evaluate", pair[0], "--repeats", 2, "--seed", 5)
        assert "1 of 1 from cached results" in evaluated.stdout

    def test_a_condition_file_replaces_those_of_the_data(self, crossed: dict[tuple[str, str, int], Path], tmp_path: Path) -> None:
        (tmp_path / "mine.json").write_text(json.dumps([["red cube"], ["blue sphere", "gray cylinder"]]))
        pair = (crossed["gelu", "linear", 0], crossed["relu", "linear", 0])
        asked = ("compare", *pair, "--repeats", 2, "--conditions", tmp_path / "mine.json", "-o", tmp_path / "c.png", "--json", tmp_path / "v.json")
        result = ddpmctl(*asked)
        assert result.exit_code == 0, result.output
        verdict = json.loads((tmp_path / "v.json").read_text())
        assert verdict["files"] == ["mine"]
        assert list(verdict["arms"][0]["scores"]) == ["mine"]

    def test_images_of_different_sampler_settings_are_compared_only_with_anyway(self, crossed: dict[tuple[str, str, int], Path], tmp_path: Path) -> None:
        other = train(tmp_path, "--epochs", 1, "--act", "relu", "--sampler", "ddim", "--steps", 3)
        asked = ("compare", crossed["gelu", "linear", 0], other, "--repeats", 1, "-o", tmp_path / "c.png")
        refused = ddpmctl(*asked)
        assert refused.exit_code == 2
        assert "sampler ddpm against ddim" in refused.stderr
        assert "sampling" not in refused.stderr  # refused before sampling
        recorded = ddpmctl(*asked, "--recorded")
        assert recorded.exit_code == 2
        assert "sampler ddpm against ddim" in recorded.stderr
        assert ddpmctl(*asked, "--anyway").exit_code == 0
        assert ddpmctl(*asked, "--sampler", "ddim", "--steps", 3).exit_code == 0

    def test_checkpoint_files_are_enough_for_a_verdict(self, crossed: dict[tuple[str, str, int], Path], tmp_path: Path) -> None:
        """Files outside of a run and without scores in their names: replicates are found by the recorded settings."""
        files = []
        for act in ("gelu", "relu"):
            for seed in (0, 1):
                (found,) = (crossed[act, "linear", seed] / "checkpoints").glob("*.pth")
                files.append(shutil.copy(found, tmp_path / f"{act}{seed}.pth"))
        result = ddpmctl("compare", *files, "--repeats", 2, "--json", tmp_path / "v.json", "-o", tmp_path / "c.png")
        assert result.exit_code == 0, result.output
        arms = json.loads((tmp_path / "v.json").read_text())["arms"]
        assert {arm["name"]: len(arm["checkpoints"]) for arm in arms} == {"act=gelu": 2, "act=relu": 2}
        assert "no table of what was recorded" in result.stderr

    def test_if_no_weights_load_recorded_scores_are_shown_without_a_verdict(self, tmp_path: Path) -> None:
        for name in ("gelu", "relu"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "epoch5_0.5_0.6.pth").write_bytes(b"torn")
        result = ddpmctl("compare", tmp_path / "gelu", tmp_path / "relu", "-o", tmp_path / "c.png")
        assert result.exit_code == 0, result.output
        assert "no verdict: the weights of fewer than two arms load" in result.stderr
        assert "0.6000" in result.stdout

    def test_runs_that_differ_only_in_their_seed_are_one_arm(self, crossed: dict[tuple[str, str, int], Path], tmp_path: Path) -> None:
        pair = (crossed["gelu", "linear", 0], crossed["gelu", "linear", 1])
        result = ddpmctl("compare", *pair, "--repeats", 1, "-o", tmp_path / "c.png", "--csv", tmp_path / "v.csv")
        assert result.exit_code == 0, result.output
        assert f"no verdict: the runs differ only in the seed; not written: {tmp_path / 'v.csv'}" in result.stderr
        assert not (tmp_path / "v.csv").exists()

    def test_outputs_of_the_verdict_are_refused_with_recorded(self, crossed: dict[tuple[str, str, int], Path], tmp_path: Path) -> None:
        pair = (crossed["gelu", "linear", 0], crossed["relu", "linear", 0])
        result = ddpmctl("compare", *pair, "--recorded", "--html", tmp_path / "v.html", "-o", tmp_path / "c.png")
        assert result.exit_code == 2
        assert re.search(r"--html.*--recorded", result.stderr)


@pytest.mark.slow
def test_runs_that_differ_only_in_their_seed_are_one_line_with_a_band(tmp_path: Path) -> None:
    from ddpmctl.comparison.recorded import compare_recorded
    from ddpmctl.report.figures import replicates, save_comparison_figure

    trained = (("relu", 0), ("relu", 1), ("relu", 2), ("gelu", 0))
    runs = [train(tmp_path / f"{act}{seed}", "--epochs", 2, "--act", act, "--seed", seed, scenes=1) for act, seed in trained]
    comparison = compare_recorded(runs)
    groups = replicates(comparison)
    assert [(title, len(arms)) for title, arms in groups.items()] == [("act=relu (3 seeds: mean and range)", 3), (comparison.arms[3].name, 1)]
    file = save_comparison_figure(tmp_path / "c.png", comparison)
    drawn = file.with_suffix(".svg").read_text()
    assert drawn.count("FillBetweenPolyCollection") == 3 or drawn.count("PolyCollection_") == 3
