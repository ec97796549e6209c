"""The built-in classifier, the lab's format, scores, and classifier training."""

from __future__ import annotations

import importlib.resources
import math
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ddpmctl.device import ComputeDevice
from ddpmctl.errors import DataError, UsageError
from ddpmctl.evaluation.classifier_file import BUILT_IN
from ddpmctl.evaluation.classifier_training import NETWORKS, ClassifierStep, ClassifierTrained, augment, check_classifier, train_classifier
from ddpmctl.evaluation.classifiers import Classifier, CompactClassifier, classifier_from, load_classifier
from ddpmctl.evaluation.half_right import check_half_right
from ddpmctl.evaluation.scores import Score, pooled, score, top_k_hits
from ddpmctl.progress import Progress

CPU = ComputeDevice(torch.device("cpu"), "fp32")


@pytest.fixture(scope="module")
def built_in() -> Classifier:
    return load_classifier()


def lab_network(seed: int = 0) -> nn.Module:
    from torchvision.models import resnet18

    torch.manual_seed(seed)
    net = resnet18(weights=None)
    net.fc = nn.Sequential(nn.Linear(512, 24), nn.Sigmoid())
    return net.eval()


@pytest.fixture(scope="module")
def lab_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lab") / "checkpoint.pth"
    torch.save({"model": lab_network().state_dict()}, path)
    return path


def random_images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class TestBuiltIn:
    def test_is_small(self) -> None:
        file = importlib.resources.files("ddpmctl.evaluation") / "assets" / "compact.pt"
        assert len(file.read_bytes()) <= 3_000_000

    def test_recognises_the_objects_of_new_renders(self, built_in: Classifier) -> None:
        scores = check_classifier(built_in, 700, seed=1)
        together = pooled(list(scores.values()))
        assert set(scores) == {1, 2, 3}
        assert together.images == 2_100
        assert together.labels == 700 * (1 + 2 + 3)
        assert together.accuracy >= 0.995
        assert together.exact_match >= 0.985
        assert scores[3].accuracy >= 0.99

    def test_finds_no_objects_in_noise_or_grey(self, built_in: Classifier) -> None:
        assert built_in(torch.zeros(2, 3, 64, 64)).max() < 0.5

    def test_outputs_are_probabilities(self, built_in: Classifier) -> None:
        outputs = built_in(random_images(3))
        assert outputs.shape == (3, 24)
        assert outputs.dtype == torch.float32
        assert not outputs.requires_grad
        assert ((outputs >= 0) & (outputs <= 1)).all()
        assert built_in(random_images(0)).shape == (0, 24)

    def test_outputs_do_not_depend_on_the_batch_or_autocast(self, built_in: Classifier) -> None:
        images = random_images(70)
        whole = built_in(images)
        torch.testing.assert_close(torch.cat([built_in(part) for part in images.split(9)]), whole, rtol=0, atol=1e-6)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(built_in(images), whole)
        assert torch.equal(built_in(images.double()), whole)

    def test_a_network_in_training_is_used_in_evaluation_mode(self) -> None:
        torch.manual_seed(0)
        net = CompactClassifier()
        net(random_images(8))  # moves the running statistics away from 0 and 1
        images = random_images(4, seed=1)
        outputs = classifier_from(net)(images)
        assert net.training
        with torch.no_grad():
            torch.testing.assert_close(outputs, net.eval()(images).sigmoid(), rtol=1e-4, atol=1e-6)


class TestFiles:
    def test_lab_file_gives_the_outputs_of_the_lab_code(self, lab_file: Path) -> None:
        images = random_images(5)
        with torch.no_grad():
            expected = lab_network()(images)
        evaluator = load_classifier(lab_file)
        assert evaluator.name == str(lab_file)
        torch.testing.assert_close(evaluator(images), expected, rtol=1e-5, atol=1e-6)

    def test_lab_file_is_found_in_the_data_folder(self, lab_file: Path, tmp_path: Path, built_in: Classifier) -> None:
        assert load_classifier(root=lab_file.parent).name == str(lab_file)
        assert load_classifier(root=tmp_path).sha256 == built_in.sha256
        assert built_in.name == BUILT_IN

    def test_a_named_file_overrides_the_data_folder(self, lab_file: Path, tmp_path: Path) -> None:
        other = tmp_path / "other.pth"
        torch.save({"model": lab_network(1).state_dict()}, other)
        assert load_classifier(other, root=lab_file.parent).name == str(other)

    def test_missing_file_is_a_usage_error(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="no such file"):
            load_classifier(tmp_path / "none.pth")

    @pytest.mark.parametrize(
        "kind", ["text", "cut", "empty", "list", "no weights", "shapes", "extra", "nan", "too large", "negative", "not tensors", "pickle", "folder"]
    )
    def test_unusable_file_is_named_in_one_line(self, kind: str, lab_file: Path, tmp_path: Path) -> None:
        path = tmp_path / "file.pth"
        state = lab_network().state_dict()
        contents = {
            "list": [1, 2],
            "no weights": {"format": "ddpmctl evaluator 1"},
            "shapes": {"model": {**state, "fc.0.weight": torch.zeros(10, 512)}},
            "extra": {"model": {**state, "layer9": torch.zeros(1)}},
            "too large": {"model": {**state, "fc.0.bias": torch.full((24,), 1e300, dtype=torch.float64)}},
            "negative": {"model": {**state, "bn1.running_var": torch.full((64,), -1.0)}},
            "nan": {"model": {**state, "fc.0.bias": torch.full((24,), float("nan"))}},
            "not tensors": {"model": dict.fromkeys(state, 1)},
            "pickle": {"model": random.Random(0)},
        }
        if kind == "folder":
            path.mkdir()
        elif kind in contents:
            torch.save(contents[kind], path)
        else:
            path.write_bytes({"text": b"{}", "cut": lab_file.read_bytes()[:100_000], "empty": b""}[kind])
        with pytest.raises(DataError) as caught:
            load_classifier(path)
        assert str(caught.value).startswith(str(path))
        assert "\n" not in str(caught.value)


def lab_accuracy(out: Tensor, onehot: Tensor) -> float:
    """The lab's accuracy code."""
    acc = 0
    total = 0
    for i in range(out.size(0)):
        k = int(onehot[i].sum().item())
        total += k
        _outv, outi = out[i].topk(k)
        _lv, li = onehot[i].topk(k)
        for j in outi:
            if j in li:
                acc += 1
    return acc / total


class TestScores:
    @pytest.mark.parametrize("seed", range(8))
    @pytest.mark.parametrize("levels", [None, 4])  # few levels: ties
    def test_accuracy_is_the_labs_to_the_last_digit(self, seed: int, levels: int | None) -> None:
        stream = torch.Generator().manual_seed(seed)
        out = torch.rand(50, 24, generator=stream)
        out = out if levels is None else (out * levels).floor() / levels
        onehot = torch.zeros(50, 24)
        for row in onehot:
            row[torch.randperm(24, generator=stream)[: int(torch.randint(0, 4, (), generator=stream))]] = 1  # 0 to 3 objects
        assert (onehot.sum(1) == 0).any()
        found = score(out, onehot)
        assert found.accuracy == lab_accuracy(out, onehot)
        assert found.hits == sum(top_k_hits(out, onehot))
        assert found.labels == int(onehot.sum())

    def test_hits_are_counted_per_image(self) -> None:
        out = torch.zeros(3, 24)
        out[0, [1, 2]] = 0.9
        out[1, [1, 5, 6]] = torch.tensor([0.9, 0.8, 0.7])
        onehot = torch.zeros(3, 24)
        onehot[0, [1, 2]] = 1
        onehot[1, [1, 6]] = 1
        assert top_k_hits(out, onehot) == [2, 1, 0]

    def test_exact_match_needs_every_object_and_no_other(self) -> None:
        wanted = torch.zeros(6, 24)
        wanted[:5, [0, 9]] = 1
        out = torch.full((6, 24), 0.1)
        out[0, [0, 9]] = 0.9  # right
        out[1, [0, 9, 3]] = 0.9  # one too many, which the lab's accuracy does not always count as an error
        out[2, 0] = 0.9  # one too few
        out[3, [0, 3]] = 0.9  # one wrong
        out[4, [0, 9]] = torch.tensor([0.9, 0.5])  # at the threshold is not above it
        assert score(out[:5], wanted[:5]) == Score(hits=score(out[:5], wanted[:5]).hits, labels=10, exact=1, images=5)
        assert score(out[5:], wanted[5:]) == Score(hits=0, labels=0, exact=1, images=1)  # nothing requested, nothing shown

    def test_pooling_adds_counts(self) -> None:
        parts = [Score(1, 2, 0, 1), Score(3, 3, 1, 1)]
        assert pooled(parts) == Score(4, 5, 1, 2)
        assert pooled(parts).accuracy == 0.8

    def test_ratios_without_images_are_nan(self) -> None:
        assert math.isnan(Score(0, 0, 0, 0).accuracy)
        assert math.isnan(Score(0, 0, 0, 0).exact_match)


@pytest.mark.slow
class TestRetraining:
    @pytest.mark.parametrize("network", NETWORKS)
    def test_a_few_steps_lower_the_loss_and_write_a_usable_file(self, network: str, tmp_path: Path) -> None:
        path = tmp_path / "own.pt"
        events = list(train_classifier(path, network=network, steps=60, scenes=64, batch=16, check_scenes=8, compute=CPU))
        logged = [event for event in events if isinstance(event, ClassifierStep)]
        last = events[-1]
        assert [event.step for event in logged] == [50, 60]
        assert logged[-1].loss < logged[0].loss
        assert isinstance(last, ClassifierTrained)
        assert last.scores == check_classifier(load_classifier(path), 8)
        stages = {event.stage: event for event in events if isinstance(event, Progress)}
        assert set(stages) == {"rendering", "training"}
        assert all(event.done == event.total for event in stages.values())

    def test_resnet18_is_saved_in_the_labs_format(self, tmp_path: Path) -> None:
        path = tmp_path / "second.pth"
        list(train_classifier(path, network="resnet18", steps=1, scenes=4, batch=4, check_scenes=1, compute=CPU))
        lab = lab_network()
        lab.load_state_dict(torch.load(path, weights_only=True)["model"])
        images = random_images(3)
        with torch.no_grad():
            torch.testing.assert_close(load_classifier(path)(images), lab.eval()(images), rtol=1e-4, atol=1e-5)

    def test_is_a_function_of_the_seed(self, tmp_path: Path) -> None:
        def loss(seed: int) -> float:
            events = list(train_classifier(tmp_path / "x.pt", steps=2, scenes=4, batch=8, check_scenes=1, seed=seed, compute=CPU))
            assert isinstance(events[-1], ClassifierTrained)
            return events[-1].loss

        state = torch.random.get_rng_state()
        assert loss(0) == loss(0) != loss(1)
        assert torch.equal(state, torch.random.get_rng_state())  # the global random state is unchanged

    def test_augmentation_keeps_shape_and_range(self) -> None:
        images = random_images(6)
        changed = augment(images, torch.Generator().manual_seed(0))
        assert changed.shape == images.shape
        assert changed.abs().max() <= 1
        assert torch.equal(changed, augment(images, torch.Generator().manual_seed(0)))


def test_half_right_images_lie_between_right_and_absent() -> None:
    kinds = {kind.name: kind for kind in check_half_right(load_classifier(), 100)}
    assert len({kind.images for kind in kinds.values()}) == 1
    assert kinds["as it is"].sure > 0.9 < kinds["as it is"].one_of_two
    assert kinds["25 % opaque"].sure < 0.2
    for less, more in (("blurred, 3 pixels", "blurred, 1 pixels"), ("50 % of another shape", "25 % of another shape"), ("25 % opaque", "50 % opaque")):
        assert kinds[less].sure < kinds[more].sure
