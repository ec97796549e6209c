"""The course's hand-in: ``sample --layout lab``, and ``evaluate --images`` for images that any program made."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddpmctl.data.dataset import load_conditions

from .conftest import ddpmctl, size
from .survival.test_untrusted_data import REFUSED
from .test_cli_commands import checkpoint_of, pixels
from .test_docs import ROOT, command_lines

FIXED = ("--precision", "fp32", "--seed", 3)


@pytest.fixture(scope="module")
def images(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the images of test and new_test, each in a folder of its own; tests must not change it."""
    folder = tmp_path_factory.mktemp("images")
    for name in ("test", "new_test"):
        made = ddpmctl("sample", checkpoint_of(run), "--conditions", name, "--layout", "lab", *FIXED, "-o", folder / name)
        assert made.exit_code == 0, made.output
    return folder


@pytest.fixture
def folder(images: Path, tmp_path: Path) -> Path:
    """A copy of the images of test, to be damaged."""
    return Path(shutil.copytree(images / "test", tmp_path / "mine"))


def cards(page: Path) -> list[tuple[np.ndarray, list[tuple[str, str]]]]:
    """Return the images of a page's galleries, each with its marks: (kind, label)."""
    found = re.findall(r'<div class="card[^>]*>.*?base64,([^"]*)".*?<ul>(.*?)</ul>', page.read_text(encoding="utf-8"), re.DOTALL)
    return [
        (np.array(Image.open(io.BytesIO(base64.b64decode(image)))), re.findall(r'<li class="(\w+)"><span>. ([\w ]+)</span>', marks)) for image, marks in found
    ]


def scores_of(*arguments: object) -> dict[str, Any]:
    result = ddpmctl("evaluate", "--images", *arguments, "--json", "-")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)["scores"]
    return found


def refused(code: int, *arguments: object) -> str:
    """Return the single line of a refusal."""
    result = ddpmctl("evaluate", "--images", *arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


def test_the_layout_of_the_lab(images: Path) -> None:
    assert {path.name for path in (images / "test").iterdir()} == {*(f"{index}.png" for index in range(32)), "grid.png"}
    assert {size(images / "test" / f"{index}.png") for index in range(32)} == {(64, 64)}
    first = pixels(images / "test" / "8.png")
    sheet = pixels(images / "test" / "grid.png")
    assert sheet.shape[1] == 8 * 134 + 6
    below_first_row = sheet[6 + 128 + 6 :, 6 : 6 + 128]
    starts = [at for at in range(100) if np.array_equal(below_first_row[at : at + 128 : 2, ::2], first)]
    assert starts, "the ninth image is not the first of the second row"


def test_images_are_sampled_in_the_order_of_a_file(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps([["red cube"], ["blue sphere", "gray cylinder"]]))
    common = ("sample", checkpoint_of(run), "--conditions", tmp_path / "mine.json", *FIXED)
    assert ddpmctl(*common, "-n", 2, "--layout", "lab", "-o", tmp_path / "lab").exit_code == 0
    assert ddpmctl(*common, "-n", 2, "-o", tmp_path / "labels").exit_code == 0
    named = {"0-1.png": "000-red-cube-seed3-001.png", "1-0.png": "001-blue-sphere+gray-cylinder-seed3-000.png"}
    for lab, labels in named.items():
        assert (tmp_path / "lab" / lab).read_bytes() == (tmp_path / "labels" / labels).read_bytes()
    assert {path.name for path in (tmp_path / "lab").iterdir()} == {"0-0.png", "0-1.png", "1-0.png", "1-1.png", "grid.png"}
    scores = scores_of(tmp_path / "lab", "--conditions", tmp_path / "mine.json", "--pattern", "{index}-{copy}.png")
    assert (scores["mine"]["images"], scores["mine"]["labels"]) == (4, 6)


def test_conditions_are_those_of_the_data_folder(run: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    assert ddpmctl("data", "render", data, "--scenes", 1, "--size", "32x24").exit_code == 0
    (data / "test.json").write_text(json.dumps([["red cube"]]))
    assert ddpmctl("sample", run, "--data", data, "--conditions", "test", "--layout", "lab", "-o", tmp_path / "out").exit_code == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"0.png", "grid.png"}
    assert scores_of(tmp_path / "out", "--conditions", "test", "--data", data)["test"]["images"] == 1


def test_images_have_the_scores_of_their_checkpoint_object_by_object(run: Path, images: Path, tmp_path: Path) -> None:
    """The same hits in JSON, in all and by class, intervals, and misses; on the pages, the same images with the same marks.

    Elsewhere, float32 may depend on the batch in its last digits, and a pixel of a thousand differ by 1.
    """
    checkpoint = ("evaluate", checkpoint_of(run), *FIXED, "--json", tmp_path / "c.json", "--html", tmp_path / "c.html")
    assert ddpmctl(*checkpoint).exit_code == 0
    both = ("--images", images / "test", "--images", images / "new_test", "--conditions", "test", "--conditions", "new_test")
    result = ddpmctl("evaluate", *both, "--json", tmp_path / "i.json", "--html", tmp_path / "i.html", "--csv", tmp_path / "i.csv")
    assert result.exit_code == 0, result.output
    expected = json.loads((tmp_path / "c.json").read_text())["checkpoints"][0]["scores"]
    found = json.loads((tmp_path / "i.json").read_text())["scores"]
    assert list(found) == ["test", "new_test"]
    for name, score in found.items():
        assert score == expected[name]
    assert len(cards(tmp_path / "i.html")) == 64
    for (image, marks), (same, expected_marks) in zip(cards(tmp_path / "i.html"), cards(tmp_path / "c.html"), strict=False):  # c has heldout as well
        assert np.abs(image.astype(int) - same).max() <= 1
        assert marks == expected_marks
    with (tmp_path / "i.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["conditions"], int(row["hits"])) for row in rows] == [(name, score["hits"]) for name, score in found.items()]


def test_the_table_with_intervals_and_the_breakdown(images: Path, tmp_path: Path) -> None:
    both = ("--images", images / "test", "--images", images / "new_test", "--conditions", "test", "--conditions", "new_test")
    result = ddpmctl("evaluate", *both, "--breakdown", "--latex", tmp_path / "t.tex", "--figures", tmp_path / "figures", "--json", tmp_path / "r.json")
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    scores = json.loads((tmp_path / "r.json").read_text())["scores"]
    for score in scores.values():
        low, high = score["interval"]
        assert f"{score['accuracy']:.4f} ({low:.3f}-{high:.3f})" in text
    assert "test + new_test" in text
    assert "by class" in text
    assert r"new\_test" in (tmp_path / "t.tex").read_text()
    assert {path.suffix for path in (tmp_path / "figures").iterdir()} == {".png", ".svg"}


def test_rendered_images_are_recognised_and_compared_with_real_ones(tmp_path: Path) -> None:
    """Renders of the conditions, as any program could have made them: all objects are found, and the fidelity is that of real images."""
    from ddpmctl.benchmark.embedded import render_label_sets

    conditions = load_conditions(None).conditions["test"]
    task = render_label_sets(conditions, seed=5)
    while True:
        try:
            next(task)
        except StopIteration as stop:
            made = stop.value
            break
    for index, image in enumerate(made):
        Image.fromarray(image.transpose(1, 2, 0)).convert("RGBA").save(tmp_path / f"sample_{index}.png")  # alpha is dropped
    (tmp_path / "notes.txt").write_text("no image")
    asked = ("evaluate", "--images", tmp_path, "--pattern", "sample_{index}.png", "--conditions", "test", "--scenes", 4, "--fidelity", "--json", "-")
    result = ddpmctl(*asked)
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content["scores"]["test"]["accuracy"] > 0.98
    assert 0.7 < content["fidelity"]["laplacian_energy"]["samples"]["estimate"] < 1.4


def test_a_missing_image_is_named(folder: Path) -> None:
    (folder / "31.png").unlink()
    assert "mine/31.png: missing" in refused(3, folder, "--conditions", "test")


@pytest.mark.parametrize("name", ["32.png", "01.png", "0-0.png", "cat.JPG"])
def test_an_image_too_many_is_named(name: str, folder: Path) -> None:
    shutil.copy(folder / "0.png", folder / name)
    assert f"mine/{name}: is not the image of a condition" in refused(3, folder, "--conditions", "test")


def test_one_copy_too_few_is_named(images: Path, tmp_path: Path) -> None:
    for index in range(32):
        for copy in range(2):
            shutil.copy(images / "test" / f"{index}.png", tmp_path / f"{index}-{copy}.png")
    (tmp_path / "5-1.png").unlink()
    line = refused(3, tmp_path, "--conditions", "test", "--pattern", "{index}-{copy}.png")
    assert "5-1.png: missing" in line
    assert "2 images" in line


def test_an_image_of_another_size_is_named(folder: Path) -> None:
    Image.new("RGB", (128, 64)).save(folder / "7.png")
    line = refused(3, folder, "--conditions", "test")
    assert "mine/7.png: is 128x64 pixels" in line
    assert "64x64" in line


@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_that_is_not_an_image_is_named(kind: str, folder: Path) -> None:
    (folder / "7.png").write_bytes(REFUSED[kind]())
    assert "mine/7.png: " in refused(3, folder, "--conditions", "test")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "give --conditions test"),
        (("--conditions", "test", "--conditions", "new_test"), "one for each folder"),
        (("--conditions", "tset"), "'tset' is neither a JSON file nor one of test, new_test, heldout"),
        (("--conditions", "test", "--pattern", "{number}.png"), "--pattern '{number}.png'"),
        (("--conditions", "test", "--pattern", "a/{index}.png"), "--pattern"),
        (("--conditions", "test", "--pattern", "{index}{copy}.png"), "--pattern"),
        (("--conditions", "test", "--seed", 1, "--steps", 3), "--steps, --seed: cannot be combined with --images"),
        (("--conditions", "test", "--no-confirm"), "--no-confirm: cannot be combined with --images"),
        (("--conditions", "test", "some.pth"), "a checkpoint: cannot be combined with --images"),
        (("--conditions", "test", "--sweep", "steps=1"), "--sweep"),
    ],
)
def test_wrong_options_are_refused(arguments: tuple[object, ...], words: str, images: Path, tmp_path: Path) -> None:
    assert words in refused(2, images / "test", *arguments, "--html", tmp_path / "new" / "page.html")
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert "there is no folder" in refused(2, tmp_path / "nowhere", "--conditions", "test")


def test_a_pattern_needs_images() -> None:
    result = ddpmctl("evaluate", "--pattern", "{index}.png")
    assert result.exit_code == 2
    assert "give both" in result.stderr


@pytest.mark.parametrize("arguments", [(), ("--labels", "red cube", "--conditions", "test")])
def test_sample_needs_either_labels_or_conditions(arguments: tuple[str, ...], run: Path, tmp_path: Path) -> None:
    result = ddpmctl("sample", run, *arguments, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "--labels" in result.stderr
    assert "--conditions" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_is_evaluated_on_named_conditions(run: Path) -> None:
    content = json.loads(ddpmctl("evaluate", checkpoint_of(run), "--conditions", "new_test", "--json", "-").stdout)
    assert list(content["checkpoints"][0]["scores"]) == ["new_test"]


def test_the_commands_of_the_page_make_what_is_handed_in(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of docs/course.md after training, on a folder in the lab's layout."""
    shutil.copytree(run, tmp_path / "runs" / "mine")
    assert ddpmctl("data", "render", tmp_path / "iclevr", "--scenes", 1, "--size", "32x24").exit_code == 0
    monkeypatch.chdir(tmp_path)
    steps = [
        shlex.split(line.replace("~/", f"{tmp_path}/"), comments=True) for line in command_lines((ROOT / "docs" / "course.md").read_text(encoding="utf-8"))
    ]
    wanted = [words[1:] for words in steps if words[1] in ("data", "sample", "denoise-grid") or "--images" in words]
    assert len(wanted) == 7
    for arguments in wanted:
        result = ddpmctl(*arguments)
        assert result.exit_code == 0, (arguments, result.output)
    for name in ("test", "new_test"):
        assert all((tmp_path / "images" / name / file).is_file() for file in ("0.png", "31.png", "grid.png"))
    assert all((tmp_path / file).is_file() for file in ("accuracy.json", "accuracy.tex", "accuracy.html", "denoise.png", "denoise.gif"))
