"""The lab's folder, the decoded cache, verify and render: what they promise, on real files."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddpmctl.data import benchmark, lab
from ddpmctl.data.cache import cache_folder
from ddpmctl.data.dataset import Dataset, Notice, Progress, load_conditions, load_dataset
from ddpmctl.data.images import decode_image
from ddpmctl.data.lab import read_json
from ddpmctl.data.labels import CLASSES, INDEX, multi_hot
from ddpmctl.data.verify import Problem, Summary, verify_folder
from ddpmctl.data.writer import write_benchmark
from ddpmctl.errors import DataError, UsageError
from ddpmctl.files import atomic_write, sha256_file

TRAIN = {
    "CLEVR_train_000000_0.png": ["red cube"],
    "CLEVR_train_000000_1.png": ["red cube", "blue sphere"],
    "CLEVR_train_000001_0.png": ["cyan cylinder"],
}


posix = pytest.mark.skipif(os.name != "posix", reason="Windows makes no pipes, and links only for administrators")


def finish(events: Generator[Any, None, Any]) -> tuple[list[Any], Any]:
    seen = []
    while True:
        try:
            seen.append(next(events))
        except StopIteration as stop:
            return seen, stop.value


def load(folder: Path | None, **settings: Any) -> Dataset:
    return finish(load_dataset(folder, **settings))[1]


def picture(index: int, size: tuple[int, int] = (80, 60)) -> Image.Image:
    pixels = np.random.default_rng(index).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def make_folder(folder: Path, *, place: str = "iclevr") -> Path:
    (folder / place).mkdir(parents=True, exist_ok=True)
    write_json(folder / "objects.json", INDEX)
    write_json(folder / "train.json", TRAIN)
    write_json(folder / "test.json", [["red cube"], ["gray cube", "red cube"]])
    write_json(folder / "new_test.json", [["blue sphere", "red cube"]])
    for index, name in enumerate(TRAIN):
        picture(index).save(folder / place / name)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DDPMCTL_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "lab")


def problem_of(folder: Path) -> str:
    """Return the message for a folder that must be refused: one line, by both ways of loading where the images do not matter."""
    with pytest.raises(DataError) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- loading ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [".", "iclevr", "images"])
def test_images_are_found_in_each_of_the_three_places(tmp_path: Path, place: str) -> None:
    data = load(make_folder(tmp_path / "lab", place=place))
    assert data.images.shape == (3, 3, 64, 64)
    assert data.images.dtype == np.uint8
    for index, image in enumerate(data.images):
        expected = np.asarray(picture(index).resize((64, 64), Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(image.transpose(1, 2, 0), expected)
    np.testing.assert_array_equal(data.labels, multi_hot(list(TRAIN.values())))
    assert data.conditions == {"test": [("red cube",), ("gray cube", "red cube")], "new_test": [("blue sphere", "red cube")]}
    assert data.root == tmp_path / "lab"


@posix
def test_the_images_may_lie_in_a_linked_folder_and_in_sub_folders(folder: Path, tmp_path: Path) -> None:
    (folder / "iclevr").rename(tmp_path / "big-disk")
    (folder / "iclevr").symlink_to(tmp_path / "big-disk")
    (tmp_path / "big-disk" / "more").mkdir()
    picture(7).save(tmp_path / "big-disk" / "more" / "x.png")
    write_json(folder / "train.json", {**TRAIN, "more/x.png": ["red cube"]})
    assert len(load(folder).images) == 4


def test_heldout_is_read_where_present(folder: Path) -> None:
    write_json(folder / "heldout.json", [["yellow cylinder"]])
    assert load(folder).conditions["heldout"] == [("yellow cylinder",)]


def test_progress_ends_at_the_total_and_a_hit_has_none(folder: Path) -> None:
    first, data = finish(load_dataset(folder))
    assert first[-1] == Progress("decoding", 3, 3)
    again, same = finish(load_dataset(folder))
    assert again == []
    np.testing.assert_array_equal(same.images, data.images)
    assert same.key == data.key


def test_the_key_tells_of_the_content_and_not_of_the_place(folder: Path, tmp_path: Path) -> None:
    before = load(folder).key
    copy = shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    assert load(copy).key == before
    picture(9).save(copy / "iclevr" / "CLEVR_train_000000_0.png")
    assert load(copy).key != before


def test_conditions_need_no_images(folder: Path) -> None:
    shutil.rmtree(folder / "iclevr")
    found = load_conditions(folder)
    assert found.conditions["test"] == [("red cube",), ("gray cube", "red cube")]
    assert frozenset({"blue sphere", "red cube"}) in found.trained_sets
    assert (found.seen("test"), found.seen("new_test")) == (1, 1)


# --- image modes -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("size", [(64, 64), (320, 240), (37, 91), (20, 20)])
def test_every_png_mode_becomes_the_labs_rgb(tmp_path: Path, mode: str, size: tuple[int, int]) -> None:
    original = picture(1, size).convert(mode)
    original.save(tmp_path / "x.png")
    expected = np.asarray(original.convert("RGB").resize((64, 64), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(decode_image(tmp_path / "x.png").transpose(1, 2, 0), expected)


def test_resize_equals_torchvisions(tmp_path: Path) -> None:
    from torchvision import transforms

    picture(1, (320, 240)).save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        expected = np.asarray(transforms.Resize((64, 64))(image.convert("RGB")))
    np.testing.assert_array_equal(decode_image(tmp_path / "x.png").transpose(1, 2, 0), expected)


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64).round().astype(np.uint16)
    Image.fromarray(np.tile(ramp, (64, 1))).save(tmp_path / "x.png")
    np.testing.assert_array_equal(decode_image(tmp_path / "x.png")[0, 0], (ramp / 257).round().astype(np.uint8))


def test_palette_with_transparency_is_quiet(tmp_path: Path) -> None:
    image = picture(1).convert("P")
    image.save(tmp_path / "x.png", transparency=bytes(range(256)))
    assert decode_image(tmp_path / "x.png").shape == (3, 64, 64)


def test_jpeg_is_read_whatever_its_suffix(tmp_path: Path) -> None:
    picture(1).save(tmp_path / "x.png", format="JPEG")
    assert decode_image(tmp_path / "x.png").shape == (3, 64, 64)


def png_header(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


def test_bad_images_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    picture(1).save(path)
    whole = path.read_bytes()
    picture(1).save(tmp_path / "x.gif")
    idat = b"\0\0\0\0IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    cases = {
        "neither a PNG nor a JPEG": [b"", b"hello", (tmp_path / "x.gif").read_bytes()],
        "cannot be decoded": [whole[: len(whole) // 2], whole[:-100]],
        "pixels": [png_header(60000, 60000) + idat, png_header(10000, 10000) + idat],
    }
    for words, contents in cases.items():
        for content in contents:
            path.write_bytes(content)
            with pytest.raises(DataError, match=words) as caught:
                decode_image(path)
            assert str(caught.value).startswith(f"{path}: ")


# --- folders and files that are refused ------------------------------------------------------------------------------------------


def test_no_folder_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "none", tmp_path / "file"):
        with pytest.raises(UsageError, match=r"--data .*no such folder"):
            load(path)
        with pytest.raises(UsageError, match="--data"):
            load_conditions(path)


def test_a_folder_without_train_json_hears_of_the_layout(folder: Path) -> None:
    (folder / "train.json").unlink()
    (folder / "test.json").unlink()
    message = problem_of(folder)
    assert "train.json, test.json missing" in message
    assert "iclevr/" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"a": 1, "a": 2}', "'a' stands there twice"),
        (b"[[NaN]]", "NaN is no JSON number"),
        (b"[[-Infinity]]", "Infinity is no JSON number"),
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
def test_json_must_be_a_regular_file_of_a_sane_size(tmp_path: Path) -> None:
    with open(tmp_path / "large.json", "wb") as file:
        file.truncate(lab.MAX_JSON_BYTES + 1)
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    for name, words in {"large": "over 64 MiB", "pipe": "not a regular file", "folder": "not a regular file", "none": "no such file"}.items():
        with pytest.raises(DataError, match=words):
            read_json(tmp_path / f"{name}.json")


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf[1]")
    assert read_json(tmp_path / "x.json") == [1]


SWAPPED = {**INDEX, "red cube": 2, "blue cube": 1}


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
        ("train.json", {"a.png": ["red cube", "red cube"]}, "stands there twice"),
        ("train.json", {"/etc/a.png": ["red cube"]}, "relative"),
        ("train.json", {"C:a.png": ["red cube"]}, "relative"),
        ("train.json", {"x\\a.png": ["red cube"]}, "relative"),
        ("train.json", {"../a.png": ["red cube"]}, "leads out of the folder"),
        ("train.json", {"x/../../a.png": ["red cube"]}, "leads out of the folder"),
        ("train.json", {"a\0.png": ["red cube"]}, "character"),
        ("train.json", {"a\n.png": ["red cube"]}, "character"),
        ("train.json", {"\ud800.png": ["red cube"]}, "character"),
        ("train.json", {"": ["red cube"]}, "empty part"),
        ("train.json", {"x//a.png": ["red cube"]}, "empty part"),
        ("test.json", {}, "must be a list"),
        ("test.json", [], "holds no condition"),
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
def test_links_out_of_the_folder_and_other_things_than_files_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    picture(1).save(tmp_path / "outside" / "a.png")
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


# --- the cache -------------------------------------------------------------------------------------------------------------------


def entry(cache: Path) -> Path:
    (path,) = cache.glob("*.npy")
    return path


def test_a_changed_folder_is_decoded_anew(folder: Path, cache: Path) -> None:
    load(folder)
    kept = entry(cache)
    inode = kept.stat().st_ino
    load(folder)
    assert entry(cache).stat().st_ino == inode
    changed = picture(9)
    changed.save(folder / "iclevr" / "CLEVR_train_000001_0.png")
    data = load(folder)
    np.testing.assert_array_equal(data.images[2].transpose(1, 2, 0), np.asarray(changed.resize((64, 64), Image.Resampling.BILINEAR)))
    assert len(list(cache.glob("*.npy"))) == 2


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a flipped byte": lambda path: flip(path, -100),
    "a flipped header": lambda path: flip(path, 20),
    "cut short": lambda path: os.truncate(path, path.stat().st_size - 7),
    "too long": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "empty": lambda path: os.truncate(path, 0),
    "gone": lambda path: path.unlink(),
    "no sum": lambda path: path.with_suffix(".json").unlink(),
    "a broken sum": lambda path: path.with_suffix(".json").write_text("{"),
    "another sum": lambda path: path.with_suffix(".json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_rebuilt(folder: Path, cache: Path, damage: str) -> None:
    before = load(folder)
    DAMAGE[damage](entry(cache))
    events, after = finish(load_dataset(folder))
    assert Progress("decoding", 3, 3) in events
    np.testing.assert_array_equal(after.images, before.images)
    assert finish(load_dataset(folder))[0] == []
    assert {path.suffix for path in cache.iterdir()} == {".npy", ".json"}


def test_without_a_cache_the_data_load_and_a_notice_says_so(folder: Path, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    events, data = finish(load_dataset(folder))
    assert len(data.images) == 3
    (notice,) = (event for event in events if isinstance(event, Notice))
    assert str(cache) in notice.text
    assert "DDPMCTL_CACHE_DIR" in notice.text


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("DDPMCTL_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "ddpmctl"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder().is_relative_to(tmp_path / "home")


def test_two_processes_may_build_one_entry_at_once(folder: Path, cache: Path) -> None:
    code = """
import sys
from pathlib import Path
from ddpmctl.data.dataset import load_dataset
sys.stdin.read()
events = load_dataset(Path(sys.argv[1]))
try:
    while True:
        print(next(events))
except StopIteration as stop:
    print("sum", int(stop.value.images.sum()))
"""
    starts = [subprocess.Popen([sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for start in starts:  # both have loaded the tool, or soon will: let go of both at once
        assert start.stdin is not None
        start.stdin.close()
        start.stdin = None
    answers = [start.communicate(timeout=60)[0] for start in starts]
    assert [start.returncode for start in starts] == [0, 0]
    events, data = finish(load_dataset(folder))
    assert events == []
    assert all(f"sum {int(data.images.sum())}" in answer and "Notice" not in answer for answer in answers)


# --- the lab's own files ---------------------------------------------------------------------------------------------------------


def labs_own_folder() -> Path:
    chosen = os.environ.get("DDPMCTL_ICLEVR") or Path(__file__).parents[2] / "shared" / "iclevr"
    if not (Path(chosen) / "train.json").is_file():
        pytest.skip("the lab's own JSON files are not here; DDPMCTL_ICLEVR names their folder")
    return Path(chosen)


def test_the_labs_own_files_are_read() -> None:
    folder = labs_own_folder()
    labels = lab.read_lab(folder).labels
    assert len(labels) == 18_009
    assert len({name.rsplit("_", 1)[0] for name in labels}) == 6_003
    found = load_conditions(folder)
    assert Counter(map(len, found.trained_sets)) == {1: 24, 2: 276, 3: 1_888}
    sizes = {name: Counter(map(len, sets)) for name, sets in found.conditions.items()}
    assert sizes == {"test": {1: 6, 2: 12, 3: 14}, "new_test": {2: 12, 3: 20}}
    assert (found.seen("test"), found.seen("new_test")) == (31, 32)


def test_verify_counts_the_labs_own_files() -> None:
    _, summary = finish(verify_folder(labs_own_folder()))
    assert (summary.scenes, summary.label_sets, summary.label_sets_by_size) == (6_003, 2_188, {1: 24, 2: 276, 3: 1_888})
    test, new_test = summary.conditions["test"], summary.conditions["new_test"]
    assert (test.conditions, test.objects, test.by_size, test.in_training) == (32, 72, {1: 6, 2: 12, 3: 14}, 31)
    assert (new_test.conditions, new_test.objects, new_test.by_size, new_test.in_training) == (32, 84, {2: 12, 3: 20}, 32)


# --- verify ----------------------------------------------------------------------------------------------------------------------


def verify(folder: Path) -> tuple[dict[str, str], Summary]:
    events, summary = finish(verify_folder(folder))
    problems = [event for event in events if isinstance(event, Problem)]
    assert summary.problems == len(problems)
    return {Path(problem.path).relative_to(folder).as_posix() + ": " + problem.what: problem.path for problem in problems}, summary


def test_verify_finds_nothing_in_a_sound_folder(folder: Path) -> None:
    problems, summary = verify(folder)
    assert problems == {}
    assert (summary.images, summary.scenes, summary.label_sets) == (3, 2, 3)
    assert summary.conditions["test"].objects == 3


def test_verify_names_every_problem_in_one_pass(folder: Path) -> None:
    images = folder / "iclevr"
    first, second, third = TRAIN
    (images / first).unlink()
    (images / second).write_bytes((images / second).read_bytes()[:-100])
    picture(5).save(images / "stray.png")
    picture(6).save(folder / "stray.jpg")
    picture(7).save(images / "crc.png")
    flip(images / "crc.png", -14)  # the checksum of the last IDAT chunk: the pixels still decode
    picture(8).save(images / "mislabelled.png")
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


def test_verify_goes_on_without_train_json(folder: Path) -> None:
    (folder / "train.json").unlink()
    (folder / "test.json").write_text("[]")
    problems, _ = verify(folder)
    assert [text.split(":")[0] for text in problems] == ["train.json", "test.json"]


# --- render ----------------------------------------------------------------------------------------------------------------------


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


# --- files -----------------------------------------------------------------------------------------------------------------------


def test_atomic_write_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    with atomic_write(path) as temporary:
        temporary.write_text("one")
        assert not path.exists()
        assert list(tmp_path.glob("*.pth")) == []
    with pytest.raises(IsADirectoryError), atomic_write(path) as temporary:
        temporary.write_bytes(b"half" + tmp_path.read_bytes())
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]
    assert sha256_file(path) == "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"


def test_atomic_write_names_the_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match=str(tmp_path / "none")), atomic_write(tmp_path / "none" / "x"):
        pass
    with pytest.raises(UsageError, match="cannot write here"), atomic_write(tmp_path / "folder") as temporary:
        temporary.write_text("a folder stands in the way")
    with pytest.raises(UsageError, match="No space left"), atomic_write(tmp_path / "x"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]


def test_a_large_entry_starts_at_once(cache: Path) -> None:
    from ddpmctl.data import cache as module

    images = np.random.default_rng(0).integers(0, 256, (6000, 3, 64, 64), dtype=np.uint8)

    def build() -> Generator[Progress, None, np.ndarray]:
        yield Progress("rendering", 0, 1)
        return images

    finish(module.cached_images("k", 6000, build))
    began = time.perf_counter()
    events, kept = finish(module.cached_images("k", 6000, build))
    assert time.perf_counter() - began < 2  # 0.1 s on a quiet machine
    assert events == []
    np.testing.assert_array_equal(kept.images, images)
