"""Fidelity: closed forms, an independent implementation, and what each measure must see."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpmctl.benchmark.embedded import conditions, render_label_sets
from ddpmctl.data.dataset import load_dataset
from ddpmctl.data.reference import real_images
from ddpmctl.evaluation.classifiers import load_classifier
from ddpmctl.evaluation.fidelity import (
    Fidelity,
    PreparedReference,
    Reference,
    coverage,
    jackknife,
    kernel_distance,
    laplacian_energy,
    laplacian_pyramid,
    measure_fidelity,
    nearest,
    power_spectrum,
    sharpness,
)
from ddpmctl.evaluation.scores import score
from ddpmctl.iclevr import ICLEVR

from .conftest import TINY, ddpmctl, train
from .data.conftest import finish

SETS = conditions()["test"][:12]
REPEATS = 4


def result(task: Generator[Any, None, Any]) -> Any:
    return finish(task)[1]


def renders(seed: int) -> np.ndarray:
    images: np.ndarray = result(render_label_sets([labels for labels in SETS for _ in range(REPEATS)], seed=seed))
    return images.reshape(len(SETS), REPEATS, 3, 64, 64)


@pytest.fixture(scope="module")
def reference() -> Reference:
    dataset = result(load_dataset(None, scenes=100))
    real = result(real_images(dataset, SETS, REPEATS))
    return Reference(real.images[0], real.images[1], dataset.images, real.same_scene)


@pytest.fixture(scope="module")
def of_renders(reference: Reference) -> Fidelity:
    return measure(renders(71), reference)


def measure(samples: np.ndarray, reference: Reference) -> Fidelity:
    fidelity: Fidelity = result(measure_fidelity(samples, PreparedReference(reference, load_classifier())))
    return fidelity


def values(fidelity: Fidelity, *, floor: bool = False) -> dict[str, float]:
    return {measure.key: (measure.floor if floor else measure.samples).estimate for measure in fidelity.measures}


class TestRenderedLabelSets:
    def test_images_show_their_labels(self) -> None:
        sets = [("red cube",), ("blue sphere", "cyan cylinder"), ("red cube", "red sphere", "gray cylinder")] * 8
        images = torch.from_numpy(result(render_label_sets(sets, seed=5)))
        outputs = load_classifier()(images.float() / 127.5 - 1)
        assert score(outputs, torch.from_numpy(ICLEVR.multi_hot(sets)).float()).exact_match > 0.9

    def test_another_seed_gives_other_images(self) -> None:
        sets = [("red cube",)] * 2
        first, again, other = (result(render_label_sets(sets, seed=seed)) for seed in (1, 1, 2))
        np.testing.assert_array_equal(first, again)
        assert not (first[0] == first[1]).all()
        assert not (first == other).all()


class TestClosedForms:
    def test_laplacian_energy(self) -> None:
        ramp = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
        board = torch.from_numpy((-1.0) ** np.add.outer(np.arange(64), np.arange(64))).float().expand(1, 3, 64, 64)
        assert float(laplacian_energy(ramp)) < 1e-10
        assert float(laplacian_energy(0.25 * board)) == pytest.approx((8 * 0.25) ** 2)

    def test_a_constant_image_is_only_in_the_last_band(self) -> None:
        high, middle, rest = laplacian_pyramid(torch.full((1, 3, 64, 64), 0.3))
        assert [band.shape[-1] for band in (high, middle, rest)] == [64, 32, 16]
        assert float(torch.cat((high.flatten(), middle.flatten())).abs().max()) < 1e-6
        torch.testing.assert_close(rest, torch.full_like(rest, 0.3))

    def test_the_spectrum_of_a_wave_has_its_peak_at_its_frequency(self) -> None:
        wave = 127 + 100 * torch.cos(2 * math.pi * 9 * torch.arange(64) / 64)
        assert power_spectrum(wave.to(torch.uint8).expand(2, 3, 64, 64)).argmax() + 1 == 9

    def test_coverage_by_hand(self) -> None:
        # The third neighbours on the line 0, 1, 2, 3, 10 are 3, 2, 2, 3 and 9 away.
        line = torch.tensor([[0.0], [1.0], [2.0], [3.0], [10.0]])
        assert coverage(line, line) == 1.0
        assert coverage(torch.tensor([[5.5], [-3.5], [19.5], [18.5]]), line) == 0.5

    def test_nearest_ignores_excluded_points(self) -> None:
        points, others = torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0], [4.0, 5.0]])
        torch.testing.assert_close(nearest(points, others, None), torch.zeros(2))
        torch.testing.assert_close(nearest(points, others, torch.tensor([[0, 1], [1, 0]])), torch.tensor([41.0, 25.0]).sqrt())

    def test_the_jackknife_of_a_mean_is_the_standard_error(self) -> None:
        x = torch.randn(10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        found = jackknife(lambda kept: float(x[kept].mean()), 10)
        assert found.estimate == pytest.approx(float(x.mean()))
        assert found.high - found.estimate == pytest.approx(2.262157 * float(x.std()) / math.sqrt(10), rel=1e-5)
        assert math.isinf(jackknife(lambda kept: 1.0, 1).high)

    def test_jackknife_intervals_cover_in_19_of_20_cases(self) -> None:
        random = torch.Generator().manual_seed(1)
        drawn = torch.randn(1000, 40, generator=random)
        inside = sum(0.0 in jackknife(lambda kept, x=x: float(x[kept].mean()), 40) for x in drawn)  # type: ignore[misc]
        assert 0.93 <= inside / 1000 <= 0.97


def test_sharpness_compares_images_with_as_many_objects(reference: Reference) -> None:
    images = torch.from_numpy(reference.training.copy())
    labels = torch.zeros(len(images), 24, dtype=torch.uint8)
    for objects in range(1, 4):
        labels[objects - 1 :: 3, :objects] = 1  # frame f shows f + 1 objects
    assert sharpness(images, labels, images, labels) == pytest.approx(1, rel=1e-5)
    assert sharpness(images[2::3], labels[2::3], images, labels) == pytest.approx(1, rel=1e-5)
    assert sharpness(images[2::3], labels[::3], images, labels) > 1.5  # three objects where one was requested
    flat = torch.full_like(images[:6], 90)
    assert sharpness(flat, labels[:6], images, labels) == 0


def test_kernel_distance_equals_torchmetrics() -> None:
    from torchmetrics.image.kid import poly_mmd

    random = torch.Generator().manual_seed(0)
    a, b = (shift + torch.randn(40, 24, generator=random).double() for shift in (0.0, 0.4))
    assert kernel_distance(a, b) == pytest.approx(float(poly_mmd(a, b)), rel=1e-9)


def test_the_lab_network_has_512_features(tmp_path: Path) -> None:
    from ddpmctl.evaluation.classifiers import lab_network

    torch.manual_seed(0)
    net = lab_network().eval()
    torch.save({"model": net.state_dict()}, tmp_path / "checkpoint.pth")
    images = torch.rand(3, 3, 64, 64) * 2 - 1
    features = load_classifier(tmp_path / "checkpoint.pth").features(images)
    with torch.no_grad():
        torch.testing.assert_close(net.fc(features), net(images))  # the input of the last layer


class TestWhatEachMeasureSees:
    def test_new_renders_are_near_the_floor(self, of_renders: Fidelity) -> None:
        for measure in of_renders.measures:
            gap = abs(measure.samples.estimate - measure.floor.estimate)
            assert gap <= measure.samples.high - measure.samples.low + measure.floor.high - measure.floor.low, measure.name

    def test_intervals_end_at_the_limits_of_the_measures(self, of_renders: Fidelity) -> None:
        found = {measure.key: measure for measure in of_renders.measures}
        for measure in (found["precision"], found["recall"]):
            assert 0 <= measure.samples.low <= measure.samples.high <= 1
        assert found["kernel_distance"].floor.low < 0  # the unbiased estimate may be negative

    def test_blur(self, reference: Reference, of_renders: Fidelity) -> None:
        pixels = torch.from_numpy(renders(71)).flatten(0, 1).float()
        blurred = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(pixels, (1,) * 4, mode="replicate"), 3, 1)
        found, sharp = values(measure(as_samples(blurred), reference)), values(of_renders)
        assert found["laplacian_energy"] < 0.3 < 0.7 < sharp["laplacian_energy"]
        assert found["patch_distance_64"] > 2 * sharp["patch_distance_64"]
        assert found["patch_distance_16"] < 2 * sharp["patch_distance_16"]

    def test_the_same_image_again_and_again(self, reference: Reference, of_renders: Fidelity) -> None:
        found = values(measure(np.repeat(renders(71)[:, :1], REPEATS, axis=1), reference))
        assert found["spread"] == 0
        assert found["recall"] < 0.1 < 0.6 < values(of_renders)["recall"]
        assert values(of_renders)["spread"] > 0.8

    def test_copies_of_training_images(self, reference: Reference, of_renders: Fidelity) -> None:
        copies = reference.training[: len(SETS) * REPEATS].reshape(len(SETS), REPEATS, 3, 64, 64)
        assert values(measure(copies, reference))["nearest"] == 0
        assert values(of_renders)["nearest"] > 0.8

    def test_wrong_objects(self, reference: Reference, of_renders: Fidelity) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (len(SETS), REPEATS, 3, 64, 64), dtype=np.uint8)
        found = values(measure(noise, reference))
        assert found["precision"] == 0 < 0.8 < values(of_renders)["precision"]
        assert found["kernel_distance"] > 10 * abs(values(of_renders)["kernel_distance"])


def as_samples(pixels: Tensor) -> np.ndarray:
    return pixels.round().to(torch.uint8).numpy().reshape(len(SETS), REPEATS, 3, 64, 64)


def test_a_folder_compares_with_training_images_of_the_same_labels_but_not_of_the_same_scene(tmp_path: Path) -> None:
    data = tmp_path / "data"
    assert ddpmctl("data", "render", data, "--scenes", 12).exit_code == 0
    dataset = result(load_dataset(data))
    names = list(json.loads((data / "train.json").read_text()).values())
    wanted = [tuple(names[2]), tuple(names[3])]
    real = result(real_images(dataset, wanted, 3))
    assert real.images.shape == (2, 2, 3, 3, 64, 64)
    for number in range(2):
        pictures = real.images[:, number].reshape(6, -1)
        assert all((a != b).any() for a, b in itertools.combinations(pictures, 2)), "an image was taken twice"
    assert any((dataset.images[2] == image).all() for image in real.images[0, 0])  # the one with exactly these labels comes first
    (first,) = (i for i in range(36) if (dataset.images[i] == real.images[0, 0, 0]).all())
    assert sorted(real.same_scene[0, 0, 0]) == [first // 3 * 3 + frame for frame in range(3)]


class TestCommand:
    @pytest.mark.slow
    def test_table_json_page_and_figure(self, run: Path, tmp_path: Path) -> None:
        (tmp_path / "c.json").write_text(json.dumps([list(labels) for labels in SETS[:4]]))
        outputs = ("--html", tmp_path / "page.html", "--figures", tmp_path / "figures", "--latex", tmp_path / "t.tex")
        call = ("evaluate", next((run / "checkpoints").glob("epoch2_*.pth")), "--scenes", 4, "--conditions", tmp_path / "c.json", "--repeats", 2, "--fidelity")
        first = ddpmctl(*call, *outputs, "--json", tmp_path / "a.json", "--threads", 1)
        assert first.exit_code == 0, first.output
        assert "Laplacian energy" in first.stdout
        (row,) = json.loads((tmp_path / "a.json").read_text())["checkpoints"]
        assert row["fidelity"]["images"] == 8
        energy = row["fidelity"]["laplacian_energy"]
        assert energy["samples"]["low"] <= energy["samples"]["estimate"] <= energy["samples"]["high"]
        assert 0.3 < energy["floor"]["estimate"] < 3
        page = (tmp_path / "page.html").read_text(encoding="utf-8")
        assert page.count('alt="real: ') == 4
        assert "patch distance at 32" in page
        assert "patch distance at 32" in (tmp_path / "t.tex").read_text()
        assert (tmp_path / "figures" / "spectra.png").is_file()
        again = ddpmctl(*call, "--json", tmp_path / "b.json", "--threads", 1)
        assert "1 of 1 from cached results" in " ".join(again.stdout.split())
        assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()

    @pytest.mark.slow
    def test_one_image_per_condition_and_more_repeats_later(self, run: Path, tmp_path: Path) -> None:
        (tmp_path / "c.json").write_text(json.dumps([list(labels) for labels in SETS[:3]]))
        call = ("evaluate", next((run / "checkpoints").glob("epoch1_*.pth")), "--scenes", 4, "--conditions", tmp_path / "c.json")
        for options, images in (((), None), (("--fidelity",), 3), (("--repeats", 2), None), (("--repeats", 2, "--fidelity"), 6)):
            found = ddpmctl(*call, *options, "--json", tmp_path / "r.json", "--threads", 1)
            assert found.exit_code == 0, found.output
            (row,) = json.loads((tmp_path / "r.json").read_text())["checkpoints"]
            assert row.get("fidelity", {}).get("images") == images
            assert ("spread" in row.get("fidelity", {})) == (images == 6)

    def test_a_sweep_and_conditions_that_cannot_be_rendered_are_refused(self, run: Path, tmp_path: Path) -> None:
        refused = ddpmctl("evaluate", run, "--fidelity", "--sweep", "steps=2,3")
        assert refused.exit_code == 2
        assert "--fidelity" in refused.stderr
        (tmp_path / "four.json").write_text(json.dumps([["red cube", "blue cube", "gray cube", "cyan cube"]]))
        four = ddpmctl("evaluate", run, "--scenes", 4, "--fidelity", "--conditions", tmp_path / "four.json")
        assert four.exit_code == 2
        assert "up to 3 objects" in four.stderr
        assert "sampling" not in four.stderr, "refused before the work"


class TestCompare:
    @pytest.mark.slow
    def test_differences_of_two_arms(self, run: Path, tmp_path: Path) -> None:
        (tmp_path / "c.json").write_text(json.dumps([list(labels) for labels in SETS[:4]]))
        other = train(tmp_path / "runs", "--epochs", 1, "--act", "relu")
        call = ("compare", run, other, "--scenes", 4, "--repeats", 2, "--conditions", tmp_path / "c.json", "-o", tmp_path / "c.png", "--fidelity")
        result = ddpmctl(*call, "--json", tmp_path / "c.json.out", "--threads", 1)
        assert result.exit_code == 0, result.output
        assert "fidelity: " in result.stdout
        (pair,) = json.loads((tmp_path / "c.json.out").read_text())["fidelity"]
        energy = pair["laplacian_energy"]
        assert energy["difference"]["estimate"] == pytest.approx(energy["first"] - energy["second"])
        assert energy["difference"]["low"] <= energy["difference"]["estimate"] <= energy["difference"]["high"]

    def test_it_needs_new_images(self, run: Path) -> None:
        refused = ddpmctl("compare", run, run, "--recorded", "--fidelity")
        assert refused.exit_code == 2
        assert "--fidelity" in refused.stderr


def test_training_prints_the_sharpness_of_each_score(tmp_path: Path) -> None:
    result = ddpmctl("train", *TINY, "--scenes", 4, "--runs-dir", tmp_path, "--epochs", 2)
    found = [float(value) for value in re.findall(r"sharpness (\d+\.\d+)", result.output)]
    assert len(found) == 2
    assert all(value > 5 for value in found), "two epochs of a tiny network leave noise"
