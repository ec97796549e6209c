"""Loading of valid folders in the lab's layout."""

from __future__ import annotations

import os
import shutil
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpmctl.data import folders as lab
from ddpmctl.data.dataset import load_conditions, load_dataset
from ddpmctl.data.images import decode_image
from ddpmctl.data.source import DataSource
from ddpmctl.data.verify import verify_folder
from ddpmctl.errors import DataError
from ddpmctl.iclevr import ICLEVR
from ddpmctl.progress import Progress

from .conftest import TRAIN, finish, load, make_folder, make_image, posix, write_json

# Loading


@pytest.mark.parametrize("place", [".", "iclevr", "images"])
def test_images_are_found_in_each_of_the_three_folders(tmp_path: Path, place: str) -> None:
    data = load(make_folder(tmp_path / "lab", place=place))
    assert data.images.shape == (3, 3, 64, 64)
    assert data.images.dtype == np.uint8
    for index, image in enumerate(data.images):
        expected = np.asarray(make_image(index).resize((64, 64), Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(image.transpose(1, 2, 0), expected)
    np.testing.assert_array_equal(data.labels, ICLEVR.multi_hot(list(TRAIN.values())))
    assert data.conditions == {"test": [("red cube",), ("gray cube", "red cube")], "new_test": [("blue sphere", "red cube")]}
    assert data.root == tmp_path / "lab"


@posix
def test_images_may_be_in_linked_folders_and_subfolders(folder: Path, tmp_path: Path) -> None:
    (folder / "iclevr").rename(tmp_path / "big-disk")
    (folder / "iclevr").symlink_to(tmp_path / "big-disk")
    (tmp_path / "big-disk" / "more").mkdir()
    make_image(7).save(tmp_path / "big-disk" / "more" / "x.png")
    write_json(folder / "train.json", {**TRAIN, "more/x.png": ["red cube"]})
    assert len(load(folder).images) == 4


def test_heldout_is_read_if_present(folder: Path) -> None:
    write_json(folder / "heldout.json", [["yellow cylinder"]])
    assert load(folder).conditions["heldout"] == [("yellow cylinder",)]


def test_progress_ends_at_the_total_and_a_cache_hit_has_no_progress(folder: Path) -> None:
    first, data = finish(load_dataset(folder))
    assert first[-1] == Progress("decoding", 3, 3)
    again, same = finish(load_dataset(folder))
    assert again == []
    np.testing.assert_array_equal(same.images, data.images)
    assert same.key == data.key


def test_the_key_depends_on_the_content_and_not_on_the_path(folder: Path, tmp_path: Path) -> None:
    before = load(folder).key
    copy = shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    assert load(copy).key == before
    make_image(9).save(copy / "iclevr" / "CLEVR_train_000000_0.png")
    assert load(copy).key != before


def test_conditions_need_no_images(folder: Path) -> None:
    shutil.rmtree(folder / "iclevr")
    found = load_conditions(folder)
    assert found.conditions["test"] == [("red cube",), ("gray cube", "red cube")]
    assert frozenset({"blue sphere", "red cube"}) in found.trained_sets
    assert tuple(sum(frozenset(labels) in found.trained_sets for labels in found.conditions[name]) for name in ("test", "new_test")) == (1, 1)


# Image modes


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("size", [(64, 64), (320, 240), (37, 91), (20, 20)])
def test_every_png_mode_becomes_the_labs_rgb(tmp_path: Path, mode: str, size: tuple[int, int]) -> None:
    original = make_image(1, size).convert(mode)
    original.save(tmp_path / "x.png")
    expected = np.asarray(original.convert("RGB").resize((64, 64), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(decode_image(tmp_path / "x.png").transpose(1, 2, 0), expected)


def test_resize_equals_torchvisions(tmp_path: Path) -> None:
    from torchvision import transforms

    make_image(1, (320, 240)).save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        expected = np.asarray(transforms.Resize((64, 64))(image.convert("RGB")))
    np.testing.assert_array_equal(decode_image(tmp_path / "x.png").transpose(1, 2, 0), expected)


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64).round().astype(np.uint16)
    Image.fromarray(np.tile(ramp, (64, 1))).save(tmp_path / "x.png")
    np.testing.assert_array_equal(decode_image(tmp_path / "x.png")[0, 0], (ramp / 257).round().astype(np.uint8))


def test_palette_with_transparency_gives_no_warning(tmp_path: Path) -> None:
    image = make_image(1).convert("P")
    image.save(tmp_path / "x.png", transparency=bytes(range(256)))
    assert decode_image(tmp_path / "x.png").shape == (3, 64, 64)


def test_jpeg_is_read_with_any_suffix(tmp_path: Path) -> None:
    make_image(1).save(tmp_path / "x.png", format="JPEG")
    assert decode_image(tmp_path / "x.png").shape == (3, 64, 64)


def png_header(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


def test_bad_images_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    make_image(1).save(path)
    whole = path.read_bytes()
    make_image(1).save(tmp_path / "x.gif")
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


# The lab's own files


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
    assert tuple(sum(frozenset(labels) in found.trained_sets for labels in found.conditions[name]) for name in ("test", "new_test")) == (31, 32)


def test_verify_counts_the_labs_own_files() -> None:
    _, summary = finish(verify_folder(DataSource(labs_own_folder())))
    assert (summary.scenes, summary.label_sets, summary.label_sets_by_size) == (6_003, 2_188, {1: 24, 2: 276, 3: 1_888})
    test, new_test = summary.conditions["test"], summary.conditions["new_test"]
    assert (test.conditions, test.objects, test.in_training) == (32, 72, 31)
    assert (new_test.conditions, new_test.objects, new_test.in_training) == (32, 84, 32)
