"""Weights, images and scores equal those recorded with version 0.2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from . import behaviour

pytestmark = pytest.mark.slow

RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "behaviour-0.2.json").read_text(encoding="utf-8"))
EXACT = behaviour.environment() == RECORDED["environment"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return behaviour.record(tmp_path_factory.mktemp("unchanged"))


@pytest.mark.parametrize("recipe", behaviour.RECIPES)
def test_training_writes_the_same_log_and_the_same_structure_of_state(recipe: str, found: dict[str, Any]) -> None:
    now, before = found["trained"][recipe], RECORDED["trained"][recipe]
    for part in ("outline", "sources"):
        assert now[part] == before[part]
    assert [set(row) for row in now["metrics"]] == [set(row) for row in before["metrics"]]
    assert [row.get("loss") for row in now["metrics"]] == [row.get("loss") and pytest.approx(row["loss"], rel=1e-3) for row in before["metrics"]]


@pytest.mark.skipif(not EXACT, reason=f"bits were recorded on {RECORDED['environment']}")
class TestTheSameBits:
    @pytest.mark.parametrize("recipe", behaviour.RECIPES)
    def test_weights_ema_and_optimizer_after_30_steps(self, recipe: str, found: dict[str, Any]) -> None:
        assert found["trained"][recipe] == RECORDED["trained"][recipe]

    @pytest.mark.parametrize("sampler", behaviour.SAMPLERS)
    def test_eight_images_of_each_sampler(self, sampler: str, found: dict[str, Any]) -> None:
        assert len(found["sampled"][sampler]) == 8
        assert found["sampled"][sampler] == RECORDED["sampled"][sampler]

    @pytest.mark.parametrize("command", ["evaluated", "compared"])
    def test_the_json_of_a_command(self, command: str, found: dict[str, Any]) -> None:
        assert found[command] == RECORDED[command]
