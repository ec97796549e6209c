"""Invalid folders and files are refused by name and in one line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ddpmctl.data import folders as lab
from ddpmctl.data.dataset import load_conditions
from ddpmctl.data.folders import read_json
from ddpmctl.errors import DataError, UsageError
from ddpmctl.iclevr import CLASSES, INDEX

from .conftest import SWAPPED, TRAIN, load, make_image, posix, problem_of, write_json


def test_a_missing_folder_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "none", tmp_path / "file"):
        with pytest.raises(UsageError, match=r"--data .*no such folder"):
            load(path)
        with pytest.raises(UsageError, match="--data"):
            load_conditions(path)


def test_without_train_json_the_error_explains_the_layout(folder: Path) -> None:
    (folder / "train.json").unlink()
    (folder / "test.json").unlink()
    message = problem_of(folder)
    assert "train.json, test.json missing" in message
    assert "iclevr/" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"a": 1, "a": 2}', "'a' is listed twice"),
        (b"[[NaN]]", "NaN is not a JSON number"),
        (b"[[-Infinity]]", "Infinity is not a JSON number"),
        (b"[[1e999]]", "too large"),
        (b"[" * 200_000, "nested too deeply"),
        (b'["\xff"]', "not UTF-8"),
        (b"[", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"[" + b"1" * 5000 + b"]", "not valid JSON"),
    ],
)
def test_json_is_read_strictly(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@posix
def test_json_must_be_a_regular_file_below_the_size_limit(tmp_path: Path) -> None:
    with open(tmp_path / "large.json", "wb") as file:
        file.truncate(lab.MAX_JSON_BYTES + 1)
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    for name, words in {"large": "over 64 MiB", "pipe": "not a regular file", "folder": "not a regular file", "none": "no such file"}.items():
        with pytest.raises(DataError, match=words):
            read_json(tmp_path / f"{name}.json")


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf[1]")
    assert read_json(tmp_path / "x.json") == [1]


@pytest.mark.parametrize(
    ("file", "value", "words"),
    [
        ("objects.json", [], "must be an object"),
        ("objects.json", SWAPPED, "'red cube' is 2, but its number is 1"),
        ("objects.json", {name: INDEX[name] for name in CLASSES[:-1]}, "'yellow cylinder' is missing"),
        ("objects.json", {**INDEX, "red cub": 24}, "'red cub' is not one of the lab's 24 classes: did you mean 'red cube'"),
        ("objects.json", {**INDEX, "gray cube": False}, "'gray cube' is False"),
        ("train.json", [], "must be an object"),
        ("train.json", {}, "declares no image"),
        ("train.json", {"a.png": "red cube"}, "image 'a.png': must have a list of labels, not a string"),
        ("train.json", {"a.png": []}, "image 'a.png': the list of labels is empty"),
        ("train.json", {"a.png": ["red cube", 3]}, "image 'a.png': label 2 must be a string, not a number"),
        ("train.json", {"a.png": ["red cubs"]}, "image 'a.png': label 1, 'red cubs', is not in objects.json: did you mean 'red cube'"),
        ("train.json", {"a.png": ["red cube", "red cube"]}, "is listed twice"),
        ("train.json", {"/etc/a.png": ["red cube"]}, "relative"),
        ("train.json", {"C:a.png": ["red cube"]}, "relative"),
        ("train.json", {"x\\a.png": ["red cube"]}, "relative"),
        ("train.json", {"../a.png": ["red cube"]}, "is outside of the folder"),
        ("train.json", {"x/../../a.png": ["red cube"]}, "is outside of the folder"),
        ("train.json", {"a\0.png": ["red cube"]}, "character"),
        ("train.json", {"a\n.png": ["red cube"]}, "character"),
        ("train.json", {"\ud800.png": ["red cube"]}, "character"),
        ("train.json", {"": ["red cube"]}, "empty part"),
        ("train.json", {"x//a.png": ["red cube"]}, "empty part"),
        ("test.json", {}, "must be a list"),
        ("test.json", [], "has no condition"),
        ("new_test.json", [["red cube"], []], "condition 2 of 2: the list of labels is empty"),
        ("new_test.json", [["red cube"], ["pink cube"]], "condition 2 of 2: label 1, 'pink cube', is not in objects.json: did you mean"),
        ("heldout.json", [["red cube", ["blue cube"]]], "condition 1 of 1: label 2 must be a string, not a list"),
        ("heldout.json", ["red cube"], "condition 1 of 1: must have a list of labels"),
    ],
)
def test_bad_contents_are_named(folder: Path, file: str, value: object, words: str) -> None:
    write_json(folder / file, value)
    message = problem_of(folder)
    assert message.startswith(str(folder / file))
    assert words in message
    assert f"ddpmctl data verify {folder}" in message
    with pytest.raises(DataError):
        load_conditions(folder)


def test_missing_images_are_counted(folder: Path) -> None:
    first, second, _ = TRAIN
    (folder / "iclevr" / first).unlink()
    (folder / "iclevr" / second).unlink()
    message = problem_of(folder)
    assert message.startswith(f"{folder / 'iclevr' / first}: missing (and 1 other problem)")
    assert f"ddpmctl data verify {folder}" in message


def test_broken_images_are_counted(folder: Path) -> None:
    for name in TRAIN:
        path = folder / "iclevr" / name
        path.write_bytes(path.read_bytes()[:500])
    message = problem_of(folder)
    assert message.startswith(f"{folder / 'iclevr' / next(iter(TRAIN))}: cannot be decoded")
    assert "(and 2 other problems)" in message


@posix
def test_links_out_of_the_folder_and_special_files_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    make_image(1).save(tmp_path / "outside" / "a.png")
    images = folder / "iclevr"
    (images / "link.png").symlink_to(tmp_path / "outside" / "a.png")
    (images / "door").symlink_to(tmp_path / "outside")
    (images / "folder.png").mkdir()
    os.mkfifo(images / "pipe.png")
    for name, words in {"link.png": "leads out", "door/a.png": "leads out", "folder.png": "not a regular file", "pipe.png": "not a regular file"}.items():
        write_json(folder / "train.json", {**TRAIN, name: ["red cube"]})
        message = problem_of(folder)
        assert message.startswith(f"{images / name}: ")
        assert words in message
    (images / "inside.png").symlink_to(images / "CLEVR_train_000000_0.png")
    write_json(folder / "train.json", {**TRAIN, "inside.png": ["red cube"]})
    assert len(load(folder).images) == 4
