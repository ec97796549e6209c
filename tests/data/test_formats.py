"""Data sets as people have them: every format, what it refuses, and conversion."""

from __future__ import annotations

import csv
import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpmctl.data.dataset import load_conditions
from ddpmctl.data.declared import read_declared, scan_declared
from ddpmctl.data.images import decode_image
from ddpmctl.data.source import DataSource
from ddpmctl.errors import DataError, UsageError
from ddpmctl.registry import FORMATS

from ..conftest import ddpmctl
from .conftest import load, make_image, posix

LABELS = {"a/1.png": ["rot, rund", "окно"], "2.jpg": ["окно"], "a/3.png": [], "4.png": ["煙突", "rot, rund"]}
SIZE = (20, 12)


def png(index: int) -> bytes:
    buffer = io.BytesIO()
    make_image(index, SIZE).save(buffer, "PNG")
    return buffer.getvalue()


def put(root: Path, names: list[str]) -> None:
    for index, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(index))


def metadata(root: Path) -> None:
    put(root, list(LABELS))
    lines = [json.dumps({"file_name": name, "labels": labels}, ensure_ascii=False) for name, labels in LABELS.items()]
    (root / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")


def metadata_csv(root: Path) -> None:
    put(root, list(LABELS))
    with (root / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("file_name", "labels"), *((name, json.dumps(labels)) for name, labels in LABELS.items())])


def classes(root: Path) -> None:
    put(root, ["dog/1.png", "dog/deep/2.png", "cat, wild/1.png"])


def plain(root: Path) -> None:
    put(root, ["1.png", "more/2.png"])


def dataset_json(labels: object) -> str:
    return json.dumps({"labels": labels})


EDM = [["00/1.png", 11], ["00/2.png", 2], ["00/3.png", 0]]


def edm(root: Path) -> None:
    put(root, [name for name, _ in EDM])
    (root / "dataset.json").write_text(dataset_json(EDM))


def edm_zip(root: Path) -> None:
    with zipfile.ZipFile(root, "w") as archive:
        archive.writestr("dataset.json", dataset_json([["00/1.png", [0, 1, 1]], ["00/2.png", [1, 0, 0]]]))
        for index, name in enumerate(("00/1.png", "00/2.png")):
            archive.writestr(name, png(index))


def clevr(root: Path) -> None:
    put(root / "images" / "train", ["x_0.png", "x_1.png"])
    objects = [
        {"color": "red", "shape": "cube", "size": "large"},
        {"color": "red", "shape": "cube", "size": "small"},
        {"color": "blue", "shape": "sphere", "size": "small"},
    ]
    scenes = [{"split": "train", "image_filename": "x_0.png", "objects": objects}, {"split": "train", "image_filename": "x_1.png", "objects": objects[1:]}]
    (root / "scenes").mkdir()
    (root / "scenes" / "CLEVR_train_scenes.json").write_text(json.dumps({"info": {}, "scenes": scenes}))


NUMBERED = tuple(f"class {number:02d}" for number in range(12))
MADE: dict[str, tuple[Callable[[Path], None], str, tuple[str, ...], list[tuple[str, ...]]]] = {
    "metadata.jsonl": (metadata, "metadata", ("rot, rund", "окно", "煙突"), [("rot, rund", "окно"), ("окно",), (), ("煙突", "rot, rund")]),
    "metadata.csv": (metadata_csv, "metadata", ("rot, rund", "окно", "煙突"), [("rot, rund", "окно"), ("окно",), (), ("煙突", "rot, rund")]),
    "classes": (classes, "classes", ("cat, wild", "dog"), [("cat, wild",), ("dog",), ("dog",)]),
    "plain": (plain, "plain", (), [(), ()]),
    "edm": (edm, "edm", NUMBERED, [("class 11",), ("class 02",), ("class 00",)]),
    "edm.zip": (edm_zip, "edm", ("class 0", "class 1", "class 2"), [("class 1", "class 2"), ("class 0",)]),
    "clevr": (clevr, "clevr", ("blue sphere", "red cube"), [("blue sphere", "red cube"), ("blue sphere", "red cube")]),
}


@pytest.fixture(params=MADE)
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    root = tmp_path / request.param
    if not request.param.endswith(".zip"):
        root.mkdir()
    MADE[request.param][0](root)
    return request.param, root


def test_every_format_is_recognised_and_read_in_order(made: tuple[str, Path], cache: Path) -> None:
    name, root = made
    _, form, labels, sets = MADE[name]
    declared = read_declared(DataSource(root))
    assert (declared.format, declared.classes, list(declared.labels.values())) == (form, labels, sets)
    data = load(DataSource(root, size=32, hold_out=0))
    assert data.images.shape == (len(sets), 3, 32, 32)
    assert data.task.classes == labels
    assert data.task.size == 32
    np.testing.assert_array_equal(data.labels, data.task.multi_hot(sets))
    for index, image in enumerate(declared.find()[0]):
        np.testing.assert_array_equal(data.images[index], decode_image(image.path, size=32))
    assert load_conditions(DataSource(root, size=32, hold_out=0)).conditions == data.conditions
    said = ddpmctl("data", "verify", root)
    assert said.exit_code == 0
    assert f"{form}: {len(sets)} images" in said.stdout
    assert "no problems" in said.stdout


def test_every_format_has_a_test() -> None:
    assert {form for _, form, *_ in MADE.values()} | {"lab"} == set(FORMATS.names())


def test_conversion_keeps_images_and_labels(made: tuple[str, Path], tmp_path: Path) -> None:
    _, root = made
    out = tmp_path / "out"
    assert ddpmctl("data", "convert", root, out).exit_code == 0
    before, after = read_declared(DataSource(root)), read_declared(DataSource(out, format="metadata"))
    assert after.labels == before.labels
    for image in before.find()[0]:
        content = image.path.read_bytes() if isinstance(image.path, Path) else image.path.read(10**6)
        assert (out / image.name).read_bytes() == content
    assert "is not an empty folder" in ddpmctl("data", "convert", root, out).stderr


def test_folders_of_classes_need_one_label_an_image(tmp_path: Path) -> None:
    for name in ("many", "one"):
        (tmp_path / name).mkdir()
    metadata(tmp_path / "many")
    refused = ddpmctl("data", "convert", tmp_path / "many", tmp_path / "out", "--format", "classes")
    assert refused.exit_code == 3
    assert "has 2 labels" in refused.stderr
    assert not (tmp_path / "out").exists()
    edm(tmp_path / "one")
    assert ddpmctl("data", "convert", tmp_path / "one", tmp_path / "out", "--format", "classes").exit_code == 0
    names = ["class 00/00-3.png", "class 02/00-2.png", "class 11/00-1.png"]
    assert read_declared(DataSource(tmp_path / "out")).labels == {name: (name.partition("/")[0],) for name in names}


def test_labels_come_from_the_columns_that_are_named(tmp_path: Path) -> None:
    put(tmp_path, ["1.png", "2.png"])
    rows = [{"file_name": "1.png", "colour": "red", "digit": 7}, {"file_name": "2.png", "colour": None, "digit": 0}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert list(read_declared(DataSource(tmp_path, label_column=("digit",))).labels.values()) == [("7",), ("0",)]
    assert list(read_declared(DataSource(tmp_path, label_column=("colour", "digit"))).labels.values()) == [("colour=red", "digit=7"), ("digit=0",)]
    with pytest.raises(DataError, match=r"line 1: image '1.png': there is no column 'x', only 'file_name', 'colour', 'digit'"):
        read_declared(DataSource(tmp_path, label_column=("x",)))


def test_repeated_objects_are_counted_and_kept_or_dropped(tmp_path: Path) -> None:
    clevr(tmp_path)
    kept, dropped = read_declared(DataSource(tmp_path)), read_declared(DataSource(tmp_path, repeated="drop"))
    assert kept.notes[0].startswith("1 of 2 images show two or more objects of one label")
    assert list(dropped.labels) == ["images/train/x_1.png"]
    sized = read_declared(DataSource(tmp_path, label_column=("color", "shape", "size")))
    assert sized.notes == (), "no label is there twice"
    assert "red cube large" in sized.classes


WRONG: dict[str, tuple[Callable[[Path], None], Callable[[Path], object], str]] = {
    "a name that leads out": (metadata, lambda root: append(root, '{"file_name": "../x.png"}'), "'..'"),
    "an absolute name": (metadata, lambda root: append(root, '{"file_name": "/x.png"}'), "must be relative"),
    "a missing image": (metadata, lambda root: append(root, '{"file_name": "none.png"}'), "none.png: missing"),
    "an image twice": (metadata, lambda root: append(root, '{"file_name": "2.jpg"}'), "line 5: the image '2.jpg' is listed twice"),
    "a key twice": (metadata, lambda root: append(root, '{"file_name": "5.png", "file_name": "6.png"}'), "the key 'file_name' is listed twice"),
    "no JSON": (metadata, lambda root: append(root, "{"), "line 5: is not valid JSON"),
    "no object": (metadata, lambda root: append(root, "[1]"), "line 5: must be an object"),
    "a label twice": (metadata, lambda root: append(root, '{"file_name": "5.png", "labels": ["a", "a"]}'), "a label is listed twice"),
    "labels of no text": (metadata, lambda root: append(root, '{"file_name": "5.png", "labels": [1]}'), "labels must be a list of texts"),
    "a label that no class can have": (metadata, lambda root: append(root, '{"file_name": "2.png", "labels": ["a\\u0007"]}'), "cannot be the name of a class"),
    "no UTF-8": (metadata_csv, lambda root: (root / "metadata.csv").write_bytes(b"file_name\n\xff"), "is not UTF-8"),
    "too many cells": (metadata_csv, lambda root: (root / "metadata.csv").write_text("file_name\na,b"), "line 2: has more cells"),
    "no such vector": (edm, lambda root: (root / "dataset.json").write_text(dataset_json([["00/1.png", [0.5]]])), "neither a class number"),
    "a class number that is too large": (edm, lambda root: (root / "dataset.json").write_text(dataset_json([["00/1.png", 10**9]])), "neither a class number"),
    "no list of labels": (edm, lambda root: (root / "dataset.json").write_text("[]"), "must be an object with a list"),
    "no scenes": (clevr, lambda root: (root / "scenes" / "a.json").write_text("{}"), 'must be an object with a list "scenes"'),
    "an object without shape": (clevr, lambda root: scene(root, {"image_filename": "a.png", "objects": [{"color": "red"}]}), "an object has no shape"),
    "a scene that leads out": (clevr, lambda root: scene(root, {"image_filename": "../a.png", "objects": []}), "'..'"),
    "an image beside the classes": (classes, lambda root: put(root, ["x.png"]), "is in no folder of a class"),
    "an image that is none": (plain, lambda root: (root / "1.png").write_text("x"), "is neither a PNG nor a JPEG image"),
}  # fmt: skip


def append(root: Path, line: str) -> None:
    with (root / "metadata.jsonl").open("a") as file:
        file.write("\n" + line)


def scene(root: Path, value: object) -> None:
    (root / "scenes" / "a.json").write_text(json.dumps({"scenes": [value]}))


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named_in_one_line(case: str, tmp_path: Path, cache: Path) -> None:
    make, spoil, words = WRONG[case]
    make(tmp_path)
    form = read_declared(DataSource(tmp_path)).format
    spoil(tmp_path)
    said = ddpmctl("data", "verify", tmp_path, "--format", form)
    assert said.exit_code == 3
    assert words in said.stdout + said.stderr
    with pytest.raises(DataError):
        load(DataSource(tmp_path, size=32, format=form))


@posix
@pytest.mark.parametrize("make", [metadata, classes, plain, edm, clevr])
def test_links_out_of_the_folder_and_pipes_are_refused(make: Callable[[Path], None], tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    make(root)
    declared = read_declared(DataSource(root))
    image = declared.find()[0][0]
    assert isinstance(image.path, Path)
    moved = tmp_path / "outside.png"
    image.path.rename(moved)
    image.path.symlink_to(moved)
    assert "leads out of the data folder" in declared.find()[1][0].what
    image.path.unlink()
    os.mkfifo(image.path)
    assert declared.find()[1][0].what == "is not a regular file"


def zipped(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name.replace("_S_", "/").replace("_D_", "."), content)
    return path


def test_zip_files_are_not_trusted(tmp_path: Path, cache: Path) -> None:
    with zipfile.ZipFile(tmp_path / "out.zip", "w") as archive:
        archive.writestr("../x.png", png(0))
        archive.writestr("/y.png", png(0))
    _, problems = scan_declared(DataSource(tmp_path / "out.zip"))
    assert len(problems) == 2
    bomb = zipped(tmp_path / "bomb.zip", a_D_png=b"\0" * 61_000_000)
    with pytest.raises(DataError, match="has over 60 MB"):
        load(DataSource(bomb))
    whole = tmp_path / "whole.zip"
    edm_zip(whole)
    (tmp_path / "short.zip").write_bytes(whole.read_bytes()[:-30])
    with pytest.raises((DataError, UsageError)):
        load(DataSource(tmp_path / "short.zip"))
    content = bytearray(whole.read_bytes())
    content[content.find(b"IDAT") + 20] ^= 255
    (tmp_path / "flipped.zip").write_bytes(content)
    with pytest.raises(DataError, match=r"flipped.zip/00/1.png: cannot be read from the zip file \(Bad CRC-32"):
        load(DataSource(tmp_path / "flipped.zip"))


def test_an_unknown_folder_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("x")
    with pytest.raises(DataError, match=r"is in no known format; looked for objects.json"):
        read_declared(DataSource(tmp_path))
    with pytest.raises(UsageError, match="unknown format of data 'clever': did you mean 'clevr'"):
        DataSource.checked(path=tmp_path, format="clever")


def test_images_are_squeezed_cropped_or_padded(tmp_path: Path) -> None:
    wide = np.zeros((32, 64, 3), np.uint8)
    wide[:, :16], wide[:, 16:48], wide[:, 48:] = (200, 0, 0), (0, 200, 0), (0, 0, 200)
    Image.fromarray(wide).save(tmp_path / "a.png")
    squeezed, cropped, padded = (decode_image(tmp_path / "a.png", size=32, fit=fit) for fit in ("squeeze", "crop", "pad"))
    assert squeezed[:, 16, 1].tolist() == [200, 0, 0]
    assert cropped.max((1, 2)).tolist() == [0, 200, 0]
    assert padded[:, 16, 1].tolist() == [200, 0, 0]
    border = [200 / 3] * 3  # of the 96 border pixels of 32x16, a third is of each colour
    np.testing.assert_allclose(padded[:, 2, 16], border, atol=2)
    assert (padded[:, :8] == padded[:, :1, :1]).all(), "one colour above"


def test_held_out_sets_are_not_decoded(tmp_path: Path, cache: Path) -> None:
    names = [f"{index}.png" for index in range(40)]
    put(tmp_path, names)
    sets = [["a"], ["b"], ["a", "b"], ["c"], ["a", "c"], ["b", "c"], ["a", "b", "c"], []]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": name, "labels": sets[index % 8]}) for index, name in enumerate(names)))
    data = load(DataSource(tmp_path, size=32, hold_out=2))
    assert len(data.conditions["heldout"]) == 2
    assert data.task.scored == ("test", "heldout")
    assert len(data.images) == 30
    held = {frozenset(one) for one in data.conditions["heldout"]}
    assert not held & {frozenset(data.task.classes[index] for index in np.flatnonzero(row)) for row in data.labels}


def test_the_counts_of_labels(tmp_path: Path) -> None:
    metadata(tmp_path)
    said = ddpmctl("data", "labels", tmp_path, "--json", "-", "--out", tmp_path / "labels.png")
    found = json.loads(said.stdout)
    assert found["labels"] == {"rot, rund": 2, "окно": 2, "煙突": 1}
    assert found["together"] == [["rot, rund", "окно", 1], ["rot, rund", "煙突", 1]]
    assert found["labels_in_an_image"] == {"0": 1, "1": 1, "2": 2}
    assert (tmp_path / "labels.png").stat().st_size > 5000
    assert (tmp_path / "labels.svg").exists()
