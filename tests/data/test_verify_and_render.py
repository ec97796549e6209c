"""``data verify`` and ``data render`` on real files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpmctl.benchmark import embedded as benchmark
from ddpmctl.benchmark.writer import write_benchmark
from ddpmctl.data.dataset import load_conditions, load_dataset
from ddpmctl.data.folders import Problem
from ddpmctl.data.source import DataSource
from ddpmctl.data.verify import Summary, verify_folder
from ddpmctl.errors import DataError, UsageError
from ddpmctl.progress import Progress

from .conftest import SWAPPED, TRAIN, entry, finish, flip, load, make_image, write_json

# Verify


def verify(folder: Path) -> tuple[dict[str, str], Summary]:
    events, summary = finish(verify_folder(DataSource(folder)))
    problems = [event for event in events if isinstance(event, Problem)]
    assert summary.problems == len(problems)
    return {Path(problem.path).relative_to(folder).as_posix() + ": " + problem.what: problem.path for problem in problems}, summary


def test_verify_finds_no_problem_in_a_valid_folder(folder: Path) -> None:
    problems, summary = verify(folder)
    assert problems == {}
    assert (summary.images, summary.scenes, summary.label_sets) == (3, 2, 3)
    assert summary.conditions["test"].objects == 3


def test_verify_names_every_problem_in_one_pass(folder: Path) -> None:
    images = folder / "iclevr"
    first, second, third = TRAIN
    (images / first).unlink()
    (images / second).write_bytes((images / second).read_bytes()[:-100])
    make_image(5).save(images / "stray.png")
    make_image(6).save(folder / "stray.jpg")
    make_image(7).save(images / "crc.png")
    flip(images / "crc.png", -14)  # the checksum of the last IDAT chunk: the pixels still decode
    make_image(8).save(images / "mislabelled.png")
    write_json(
        folder / "train.json",
        {**TRAIN, "crc.png": ["red cube"], "mislabelled.png": ["red cubs", "blue cub"], "../x.png": ["red cube"], "gone.png": ["red cube"]},
    )
    write_json(folder / "objects.json", SWAPPED)
    write_json(folder / "test.json", [[], ["red cube"], ["pink cube"]])
    (folder / "new_test.json").write_text("{")
    problems, summary = verify(folder)
    expected = [
        "objects.json: 'red cube' is 2",
        "objects.json: 'blue cube' is 1",
        "train.json: image 'mislabelled.png': label 1",
        "train.json: image 'mislabelled.png': label 2",
        "train.json: image '../x.png'",
        "test.json: condition 1 of 3",
        "test.json: condition 3 of 3",
        "new_test.json: is not valid JSON",
        f"iclevr/{first}: missing",
        "iclevr/gone.png: missing",
        "iclevr/stray.png: is not declared",
        "stray.jpg: is not declared",
        f"iclevr/{second}: cannot be decoded",
        "iclevr/crc.png: cannot be decoded",
    ]
    named = [next((what for what in problems if what.startswith(start)), f"not named: {start}") for start in expected]
    assert sorted(named) == sorted(problems)
    assert third not in "".join(problems)
    assert summary.conditions["test"].conditions == 1


def test_verify_continues_without_train_json(folder: Path) -> None:
    (folder / "train.json").unlink()
    (folder / "test.json").write_text("[]")
    problems, _ = verify(folder)
    assert [text.split(":")[0] for text in problems] == ["train.json", "test.json"]


# Render


def test_render_verify_and_load_agree_with_the_embedded_benchmark(tmp_path: Path) -> None:
    target = tmp_path / "made" / "here"
    events, _ = finish(write_benchmark(target, scenes=4, width=64, height=64))
    assert events[-1] == Progress("writing", 12, 12)
    problems, summary = verify(target)
    assert problems == {}
    assert (summary.images, summary.scenes) == (12, 4)
    on_disk, embedded = load(target), load(None, scenes=4)
    np.testing.assert_array_equal(on_disk.images, embedded.images)
    np.testing.assert_array_equal(on_disk.labels, embedded.labels)
    assert on_disk.conditions == embedded.conditions
    assert on_disk.key == embedded.key
    assert load_conditions(target).key == load_conditions(None, scenes=4).key
    assert embedded.name == "embedded benchmark (4 scenes)"
    assert embedded.root is None


def test_the_embedded_benchmark_is_rendered_once(cache: Path) -> None:
    first, data = finish(load_dataset(None, scenes=2))
    assert first[-1] == Progress("rendering", 6, 6)
    again, same = finish(load_dataset(None, scenes=2))
    assert again == []
    assert entry(cache).with_suffix(".json").is_file()
    np.testing.assert_array_equal(same.images, data.images)


def test_render_in_another_size(tmp_path: Path) -> None:
    finish(write_benchmark(tmp_path / "x", scenes=1, width=48, height=32))
    with Image.open(tmp_path / "x" / "iclevr" / benchmark.image_names(1)[0]) as image:
        assert image.size == (48, 32)


def test_render_refuses_what_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    (tmp_path / "file").touch()
    cases = [
        (tmp_path / "full", {}, "not an empty folder"),
        (tmp_path / "file", {}, "not an empty folder"),
        (tmp_path / "file" / "below", {}, "cannot write here"),
        (tmp_path / "new", {"scenes": 0}, "--scenes 0"),
        (tmp_path / "new", {"scenes": benchmark.SCENES + 1}, "--scenes"),
        (tmp_path / "new", {"width": 4}, "--width 4"),
        (tmp_path / "new", {"height": 10**6}, "--height"),
    ]
    for target, settings, words in cases:
        with pytest.raises(UsageError, match=words):
            finish(write_benchmark(target, **{"scenes": 1, "width": 64, "height": 64, **settings}))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "mine.txt"]
    with pytest.raises(UsageError, match="--scenes 0"):
        load(None, scenes=0)


@pytest.mark.parametrize("cut", [1, 4, 8, 12, 13, 16, 20])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_an_image_that_lacks_its_last_bytes_is_a_problem_and_not_trained_on(suffix: str, cut: int, folder: Path) -> None:
    path = folder / "iclevr" / next(iter(TRAIN))
    make_image(0).save(path, "JPEG" if suffix == "jpg" else "PNG")
    assert verify(folder)[0] == {}
    path.write_bytes(path.read_bytes()[:-cut])
    (problem,) = verify(folder)[0]
    assert "truncated" in problem
    with pytest.raises(DataError, match="truncated"):
        load(folder)


@pytest.mark.parametrize("extra", [1, 1000, 60_000])
def test_bytes_after_the_end_of_a_png_are_no_problem(extra: int, folder: Path) -> None:
    path = folder / "iclevr" / next(iter(TRAIN))
    path.write_bytes(path.read_bytes() + b"x" * extra)
    assert verify(folder)[0] == {}
    load(folder)
