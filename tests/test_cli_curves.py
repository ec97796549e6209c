"""compare --recorded on folders that hold only file names: what their curves tell."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .conftest import ddpmctl
from .simulated_curves import curves

EPOCHS = range(5, 305, 5)


def folder(parent: Path, name: str, test: Sequence[float], new_test: Sequence[float], epochs: Sequence[int] = EPOCHS) -> Path:
    """Make a folder of files named after accuracies, counted in labels of the lab's files."""
    (parent / name).mkdir()
    for epoch, one, other in zip(epochs, test, new_test, strict=True):
        (parent / name / f"epoch{epoch}_{round(72 * one) / 72}_{round(84 * other) / 84}.pth").write_bytes(b"weights are not read")
    return parent / name


def arm(parent: Path, name: str, seed: int, level: float | Sequence[float]) -> Path:
    """Make a folder whose accuracies are around a level, with a standard deviation of 4 points."""
    test, new_test = np.asarray(level) + 0.04 * curves(np.random.default_rng(seed), 2, len(EPOCHS), 0.5)
    return folder(parent, name, test, new_test)


def compared(tmp_path: Path, *folders: Path) -> tuple[str, dict[str, Any], list[dict[str, str]]]:
    """Compare folders; return what is on the screen, in the JSON and in the CSV."""
    asked = ("compare", *folders, "--recorded", "-o", tmp_path / "c.png", "--json", tmp_path / "c.json", "--csv", tmp_path / "c.csv")
    result = ddpmctl(*asked)
    assert result.exit_code == 0, result.output
    with (tmp_path / "c.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return result.stdout, json.loads((tmp_path / "c.json").read_text(), parse_constant=pytest.fail), rows


def pair_on(found: dict[str, Any], conditions: str) -> dict[str, Any]:
    (pair,) = (pair for pair in found["pairs"] if pair["conditions"] == conditions)
    return dict(pair)


def test_a_difference_is_told_with_its_interval_and_its_limits(tmp_path: Path) -> None:
    screen, found, rows = compared(tmp_path, arm(tmp_path, "relu", 1, 0.5), arm(tmp_path, "gelu", 2, 0.6))
    for conditions in ("test", "new_test", "pooled"):
        pair = pair_on(found, conditions)
        assert -0.16 < pair["low"] < pair["estimate"] < pair["high"] < -0.04
        assert pair["told"]
        assert pair["epochs"] == list(EPOCHS)
    scores = {one["name"]: one["scores"] for one in found["arms"]}
    gaps = {file: np.mean(scores["relu"][file]) - np.mean(scores["gelu"][file]) for file in ("test", "new_test")}
    assert [pair_on(found, file)["estimate"] for file in gaps] == pytest.approx(list(gaps.values()))
    pooled = pair_on(found, "pooled")
    assert pooled["estimate"] == pytest.approx(np.mean(list(gaps.values())))

    told, seeds, *_ = found["sentences"]
    assert told.startswith(f"gelu is better than relu by {-100 * pooled['estimate']:.1f} points on test and new_test over the 60 epochs that both recorded")
    assert f"95 % interval {-100 * pooled['high']:+.1f} to {-100 * pooled['low']:+.1f}" in told
    assert "does not change significantly" in told
    assert "one training run with one seed" in seeds
    assert all(sentence in screen for sentence in found["sentences"])

    assert [row["conditions"] for row in rows] == ["test", "new_test", "pooled"]
    assert [float(row["estimate"]) for row in rows] == [pair["estimate"] for pair in found["pairs"]]
    assert (rows[2]["epochs"], rows[2]["first_epoch"], rows[2]["last_epoch"]) == ("60", "5", "300")
    assert float(rows[2]["change_high"]) == pooled["change"]["high"]


def test_curves_around_the_same_level_are_not_told_apart(tmp_path: Path) -> None:
    _, found, _ = compared(tmp_path, arm(tmp_path, "a", 3, 0.6), arm(tmp_path, "b", 4, 0.6))
    assert not any(pair["told"] or pair["change"]["told"] for pair in found["pairs"])
    assert found["sentences"][0].startswith("No significant difference between a and b on test and new_test over the 60 epochs that both recorded, 5 to 300: ")


def test_a_difference_that_grows_is_told_to_change(tmp_path: Path) -> None:
    _, found, _ = compared(tmp_path, arm(tmp_path, "fast", 5, np.linspace(0.5, 0.8, 60)), arm(tmp_path, "slow", 6, 0.5))
    pair = pair_on(found, "pooled")
    assert pair["told"]
    assert pair["change"]["told"]
    assert 0.1 < pair["change"]["estimate"] < 0.2
    assert "The difference changes in training: fast - slow is +" in found["sentences"][0]
    assert "points before epoch 155 and +" in found["sentences"][0]


def test_several_pairs_are_adjusted_for_each_other(tmp_path: Path) -> None:
    screen, found, rows = compared(tmp_path, arm(tmp_path, "a", 7, 0.6), arm(tmp_path, "b", 8, 0.57), arm(tmp_path, "c", 9, 0.6))
    assert len(rows) == len(found["pairs"]) == 9
    for conditions in ("test", "new_test", "pooled"):
        family = [pair for pair in found["pairs"] if pair["conditions"] == conditions]
        for part in (family, [pair["change"] for pair in family]):
            least = min(part, key=lambda one: one["p"])
            assert least["p_adjusted"] == pytest.approx(min(1, 3 * least["p"]))
    assert "a - b, test" in screen
    assert "The p-values are adjusted for the number of pairs" in screen
    assert len([sentence for sentence in found["sentences"] if " - " in sentence]) == 3


@pytest.mark.parametrize(("others", "shared"), [(range(1, 301, 5), 0), (range(250, 550, 5), 11), (range(300, 600, 5), 1)])
def test_too_few_common_epochs_are_said(tmp_path: Path, others: range, shared: int) -> None:
    level = [0.5] * len(others)
    screen, found, rows = compared(tmp_path, arm(tmp_path, "a", 10, 0.9), folder(tmp_path, "b", level, level, others))
    pair = pair_on(found, "pooled")
    assert len(pair["epochs"]) == shared
    assert (pair["low"], pair["p"], pair["told"], pair["change"]["estimate"]) == (None, None, None, None)
    assert (rows[2]["low"], rows[2]["first_epoch"]) == ("", str(min(pair["epochs"], default="")))
    expected = f"a is ahead by {100 * (pair['estimate'] or 0):.1f} points, but an interval needs 20 or more epochs" if shared else "no epoch in common"
    assert expected in found["sentences"][0]
    assert found["sentences"][0] in screen


def test_epochs_that_look_selected_are_said(tmp_path: Path) -> None:
    best = folder(tmp_path, "best", [0.3, 0.42, 0.5, 0.5, 0.61, 0.65], [0.4, 0.3, 0.5, 0.45, 0.5, 0.6], [5, 10, 25, 30, 75, 140])
    _, found, _ = compared(tmp_path, best, arm(tmp_path, "all", 11, 0.6))
    assert {one["name"]: one["selected"] for one in found["arms"]} == {"best": True, "all": False}
    assert "The epochs of best look selected" in found["sentences"][-1]
    assert "accuracy on test never falls" in found["sentences"][-1]


def test_recorded_scores_of_runs_are_complete_and_have_settings(run: Path, tmp_path: Path) -> None:
    _, found, rows = compared(tmp_path, run, folder(tmp_path, "names", [0.5, 0.5], [0.5, 0.5], [1, 2]))
    assert found["arms"][0]["epochs"] == [1, 2]
    assert pair_on(found, "test")["reason"] == "an interval needs 20 or more epochs that both recorded, and there are 2"
    assert [row["epochs"] for row in rows] == ["2", "2", "2"]
