"""A task: what data ask of networks and classifiers."""

from __future__ import annotations

import ast
import itertools
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ddpmctl
from ddpmctl.checkpoints.format import load_checkpoint, save_checkpoint
from ddpmctl.config import Config
from ddpmctl.data.conditions import HELD_OUT, TEST, conditions_of
from ddpmctl.errors import DataError, UsageError
from ddpmctl.iclevr import ICLEVR
from ddpmctl.label_lists import parse_labels
from ddpmctl.registry import NETWORKS
from ddpmctl.task import SIZES, Task, require_same_task
from ddpmctl.training.trainer import make_network

ROOT = Path(ddpmctl.__file__).parent
ODD = Task(("door, red", "окно", "煙突", "Wet Leaves", "a-b"), 32, ("test", "heldout"))
KNOW_ICLEVR = ("iclevr.py", "benchmark", "data/formats/lab.py", "data/folders.py")  # the layout and the renderer


def knows(tree: ast.Module) -> list[str]:
    """Return what a module says about i-CLEVR beyond the name of its task."""
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module="ddpmctl.iclevr"):
                found += [alias.name for alias in node.names if alias.name != "ICLEVR"]
            case ast.Constant(value=24):
                found.append(f"24 in line {node.lineno}")
            case ast.Tuple(elts=[ast.Constant(value=3), ast.Constant(value=64), ast.Constant(value=64)]):
                found.append(f"(3, 64, 64) in line {node.lineno}")
    return found


def test_only_the_layout_and_the_renderer_know_the_classes_and_the_size_of_i_clevr() -> None:
    assert knows(ast.parse("from ddpmctl.iclevr import COLOURS\nx = 24\ny = (3, 64, 64)")) == ["COLOURS", "24 in line 2", "(3, 64, 64) in line 3"]
    modules = {str(file.relative_to(ROOT)): file for file in ROOT.rglob("*.py") if not str(file.relative_to(ROOT)).startswith(KNOW_ICLEVR)}
    assert len(modules) > 100
    found = {name: said for name, file in modules.items() if (said := knows(ast.parse(file.read_text(encoding="utf-8"))))}
    found.pop("cli/terminal.py")  # the hours of a day
    assert found == {}


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("окно", "окно"),
        ("ОКНО", "окно"),
        ("wet leaf", None),
        ("leaves-wet", "Wet Leaves"),
        ("b a", "a-b"),
        ("door red", None),
        ("Door, red", "door, red"),
        ("", None),
    ],
)
def test_labels_of_any_task_are_read_as_people_write_them(text: str, label: str | None) -> None:
    if label is None:
        with pytest.raises(UsageError, match="unknown label"):
            ODD.parse_label(text)
    else:
        assert ODD.parse_label(text) == label


def test_names_with_commas_stand_in_quotes_or_alone() -> None:
    assert parse_labels(['"door, red",окно', "door, red", 'окно; "door, red"'], ODD) == [("door, red", "окно"), ("door, red",), ("окно", "door, red")]
    with pytest.raises(UsageError, match="stands wholly in quotes"):
        parse_labels(['окно "door, red"'], ODD)
    with pytest.raises(UsageError, match="images without labels"):
        parse_labels(["red cube"], Task((), 32, ("test",)))


@pytest.mark.parametrize(
    "change",
    [
        {"size": 65}, {"size": True}, {"size": "64"}, {"classes": ["a", "a"]}, {"classes": [" a"]}, {"classes": [""]}, {"classes": ["a\nb"]}, {"classes": [1]},
        {"classes": "ab"}, {"classes": ["x"] * 1001}, {"classes": ["x" * 201]}, {"scored": []}, {"scored": ["../x"]}, {"scored": ["a", "b", "c"]},
        {"aspects": ["colour", "shape"]}, {"aspects": ["colour"]}, {"more": 1},
    ],
)  # fmt: skip
def test_a_task_from_an_unknown_file_is_checked(change: dict[str, object]) -> None:
    assert Task.from_dict(ODD.to_dict()) == ODD
    assert Task.from_dict(ICLEVR.to_dict()) == ICLEVR
    with pytest.raises(ValueError, match=r"."):
        Task.from_dict({**ODD.to_dict(), **change})


def test_an_unlabelled_task_has_one_column_that_is_always_zero() -> None:
    task = Task((), 32, ("test",))
    assert task.multi_hot([(), ()]).tolist() == [[0], [0]]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NETWORKS.names())
def test_every_network_is_built_for_every_size_and_number_of_classes_or_says_why_not(name: str, size: int) -> None:
    task = replace(ODD, size=size)
    config = Config().replace(net=name, width=8)
    if (name, size) == ("context-unet", 256):
        with pytest.raises(UsageError, match="context-unet works at 32, 64, 96 and 128 pixels, but not at 256"):
            make_network(config, task)
        return
    x_t, labels = torch.randn(2, *task.image_shape), torch.tensor([[1.0, 0, 1, 0, 0], [0, 0, 0, 0, 0]])
    with torch.no_grad():
        out = make_network(config, task).eval()(x_t, labels, torch.tensor([0.2, 0.9]))
    assert out.shape == x_t.shape
    assert torch.isfinite(out).all()


def test_a_checkpoint_keeps_its_task_and_fits_no_other(tmp_path: Path) -> None:
    config = Config().replace(net="unet", width=8)
    save_checkpoint(tmp_path / "own.pth", config, make_network(config, ODD).state_dict(), ODD)
    loaded = load_checkpoint(tmp_path / "own.pth")
    assert loaded.task == ODD
    assert loaded.network()(torch.zeros(1, 3, 32, 32), torch.zeros(1, 5), torch.zeros(1)).shape == (1, 3, 32, 32)
    with pytest.raises(DataError, match=r"has 5 classes, and b 24; only the first has 'door, red', 'окно', '煙突'"):
        require_same_task("a", ODD, "b", ICLEVR)
    with pytest.raises(DataError, match="is for images of 32x32 pixels, but b for 64x64"):
        require_same_task("a", ODD, "b", replace(ODD, size=64))


def test_a_checkpoint_of_i_clevr_is_written_as_earlier_versions_wrote_it(tmp_path: Path) -> None:
    config = Config().replace(net="unet", width=8)
    save_checkpoint(tmp_path / "a.pth", config, make_network(config).state_dict())
    assert set(torch.load(tmp_path / "a.pth")) == {"format", "config", "known", "weights"}
    assert load_checkpoint(tmp_path / "a.pth").task == ICLEVR


LABELS = [tuple(itertools.compress(ODD.classes, bits)) for bits in itertools.product((0, 1), repeat=5)] * 3


def test_held_out_sets_are_not_in_test_and_each_of_their_labels_is_trained() -> None:
    found = conditions_of(LABELS, 8)
    assert len(found[HELD_OUT]) == 8
    assert not {frozenset(one) for one in found[HELD_OUT]} & {frozenset(one) for one in found[TEST]}
    assert {label for one in found[HELD_OUT] for label in one} <= {label for one in found[TEST] for label in one}
    assert all(len(one) > 1 for one in found[HELD_OUT])


def test_conditions_stay_the_same_when_images_are_added_or_reordered() -> None:
    shuffled = [tuple(reversed(one)) for one in LABELS] + LABELS
    random.Random(0).shuffle(shuffled)
    assert conditions_of(shuffled, 8) == conditions_of(LABELS, 8)


def test_no_label_is_held_out_altogether() -> None:
    assert HELD_OUT not in conditions_of([("a", "b")] * 5 + [("c",)], 32), "a and b would not be trained"
    assert conditions_of([("a",), ("b",), ("b",)]) == {TEST: [("b",), ("a",)]}, "the most frequent first"
    assert conditions_of([(), ()]) == {TEST: [()] * 16}
