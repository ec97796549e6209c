"""The embedded benchmark: labels, scenes and pixels."""

from __future__ import annotations

import collections
import json
import subprocess
import sys
from importlib import resources

import numpy as np
import pytest

from ddpmctl.benchmark import embedded
from ddpmctl.benchmark.lighting import PALETTE
from ddpmctl.benchmark.raycast import render
from ddpmctl.benchmark.scenes import Scenes, depth_maps, draw_scenes
from ddpmctl.iclevr import CLASSES, COLOURS, INDEX

N = 40


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return draw_scenes(N)


@pytest.fixture(scope="module")
def images(scenes: Scenes) -> np.ndarray:
    return draw(scenes)  # (N, 3, 64, 64, 3)


def draw(scenes: Scenes, **size: int) -> np.ndarray:
    return np.concatenate(list(render(scenes, **size)))


def sets_of(label_lists) -> set[frozenset[str]]:
    return {frozenset(labels) for labels in label_lists}


def silhouettes(scenes: Scenes) -> np.ndarray:
    """Distance of each object along each pixel's ray at 64x64 by brute force, infinite where missed: (N, 3, 64, 64).

    Independent of the renderer's geometry: rays are marched through the solids' definitions in small steps.
    """
    out = np.full((len(scenes), 3, 64, 64), np.inf)
    u, v = np.meshgrid((np.arange(64) + 0.5) / 64 - 0.5, (0.5 - (np.arange(64) + 0.5) / 64) * 0.75)
    for i in range(len(scenes)):
        eye = scenes.eyes[i]
        forward = -eye / np.linalg.norm(eye)
        right = np.cross(forward, [0, 0, 1])
        right /= np.linalg.norm(right)
        ray = forward + (u[..., None] * right + v[..., None] * np.cross(right, forward)) * 32 / 35
        for t in np.arange(5, 16, 0.02)[::-1]:
            at = eye + t * ray
            for k in range(3):
                x, y = np.moveaxis(at[..., :2] - scenes.positions[i, k], -1, 0)
                z, r, turn = at[..., 2], 0.58, scenes.rotations[i, k]
                shape = CLASSES[scenes.classes[i, k]].split()[1]
                if shape == "sphere":
                    inside = x**2 + y**2 + (z - r) ** 2 < r**2
                elif shape == "cylinder":
                    inside = (x**2 + y**2 < r**2) & (z > 0) & (z < 2 * r)
                else:
                    a, b, half = np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x, r / 2**0.5
                    inside = (np.maximum(abs(a), abs(b)) < half) & (z > 0) & (z < 2 * half)
                out[i, k][inside] = t
    return out


# Labels


def test_full_benchmark_has_the_labs_label_statistics() -> None:
    labels = embedded.train_labels(embedded.SCENES)
    assert len(labels) == 18_009
    assert all(len(set(names)) == len(names) for names in labels.values())
    by_size = collections.defaultdict(set)
    for names in labels.values():
        by_size[len(names)].add(frozenset(names))
    assert {size: len(sets) for size, sets in by_size.items()} == {1: 24, 2: 276, 3: 1888}


def test_each_frame_adds_one_label_to_the_last() -> None:
    labels = embedded.train_labels(50)
    assert list(labels) == embedded.image_names(50)
    assert list(labels)[:4] == ["CLEVR_train_000000_0.png", "CLEVR_train_000000_1.png", "CLEVR_train_000000_2.png", "CLEVR_train_000001_0.png"]
    for scene in zip(*[iter(labels.values())] * 3, strict=True):
        assert [len(names) for names in scene] == [1, 2, 3]
        assert scene[1][:1] == scene[0]
        assert scene[2][:2] == scene[1]


def test_held_out_conditions_are_new_and_balanced() -> None:
    conditions = embedded.conditions()
    held_out = sets_of(conditions["heldout"])
    assert len(held_out) == len(conditions["heldout"]) == 32
    assert not held_out & sets_of(embedded.train_labels(embedded.SCENES).values())
    assert not held_out & sets_of(conditions["test"] + conditions["new_test"])
    counts = collections.Counter(name for names in conditions["heldout"] for name in names)
    assert counts == dict.fromkeys(CLASSES, 4)


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_only_one_lab_condition_never_occurs_in_training(seed: int) -> None:
    conditions = embedded.conditions()
    lab = sets_of(conditions["test"] + conditions["new_test"])
    train = sets_of(embedded.train_labels(embedded.SCENES, seed=seed).values())
    assert lab - train == {frozenset({"cyan cube", "green cylinder", "blue cube"})}


def test_lab_conditions_are_the_labs_files() -> None:
    for name, objects in (("test", 72), ("new_test", 84)):
        sets = embedded.conditions()[name]
        assert list(map(list, sets)) == json.loads(resources.files("ddpmctl.benchmark").joinpath("assets", f"{name}.json").read_text())
        assert len(sets) == 32
        assert sum(map(len, sets)) == objects


def test_any_triple_includes_triples_that_training_does_not_have() -> None:
    classes = np.sort(draw_scenes(2200, triples="any").classes, axis=1)
    assert len(np.unique(classes, axis=0)) == 2024


# Scenes and pixels are functions of (seed, index)


def test_smaller_benchmark_is_a_prefix_in_labels_and_pixels(images: np.ndarray) -> None:
    small, large = embedded.train_labels(7), embedded.train_labels(300)
    assert list(small.items()) == list(large.items())[:21]
    assert np.array_equal(np.concatenate(list(embedded.render_benchmark(7))), images[:7].reshape(-1, 64, 64, 3))


def test_a_scene_does_not_depend_on_the_start_index() -> None:
    whole = draw_scenes(600)
    for start, count in ((0, 1), (255, 3), (511, 89)):
        part = draw_scenes(count, start=start)
        for name in vars(whole):
            assert np.array_equal(getattr(part, name), getattr(whole, name)[start : start + count]), name


def test_pixels_do_not_depend_on_the_batch(scenes: Scenes, images: np.ndarray) -> None:
    assert np.array_equal(draw(scenes), images)
    assert np.array_equal(np.concatenate([draw(scenes[i : i + 1]) for i in range(9)]), images[:9])
    assert np.array_equal(np.concatenate([draw(scenes[3:16]), draw(scenes[16:21])]), images[3:21])


def test_scene_drawing_agrees_with_the_labels(scenes: Scenes) -> None:
    last = list(embedded.train_labels(N).values())[2::3]
    assert [[INDEX[name] for name in names] for names in last] == scenes.classes.tolist()


def test_seeds_differ(scenes: Scenes) -> None:
    other = draw_scenes(N, seed=1)
    assert not np.array_equal(other.classes, scenes.classes)
    assert not np.isclose(other.positions, scenes.positions).any()
    keys = {embedded.fingerprint(n, seed=s) for n in (1, 2, 12) for s in (0, 1, 2)}
    assert len(keys) == 9
    assert embedded.fingerprint(12) == embedded.fingerprint(12, seed=0)


# Images


def test_images_are_uint8_and_well_exposed(images: np.ndarray) -> None:
    assert images.dtype == np.uint8
    assert images.shape == (N, 3, 64, 64, 3)
    assert 95 < images[:, :, :12].mean() < 115  # the real frames' dark top: 105
    assert 115 < images[:, :, 40:].mean() < 150  # and their lit floor: 133
    assert images.max() < 255


def test_wide_images_show_the_same_view(scenes: Scenes, images: np.ndarray) -> None:
    wide = draw(scenes[:2], width=320, height=240)
    assert wide.shape == (2, 3, 240, 320, 3)
    coarse = wide.reshape(2, 3, 16, 15, 16, 20, 3).mean((3, 5))
    assert np.abs(coarse - images[:2].reshape(2, 3, 16, 4, 16, 4, 3).mean((3, 5))).max() < 4


def test_objects_do_not_touch(scenes: Scenes) -> None:
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (np.linalg.norm(scenes.positions[:, a] - scenes.positions[:, b], axis=-1) > 2 * 0.58).all()


def test_every_object_is_visible_and_in_view() -> None:
    scenes = draw_scenes(300)[np.arange(0, 300, 25)]
    depth = silhouettes(scenes)
    alone = np.isfinite(depth)
    visible = alone & (depth == depth.min(axis=1, keepdims=True))
    slack = 2  # pixels on the outline, where marching and solving may differ
    assert (visible.sum((2, 3)) >= 12 - slack).all()
    assert (visible.sum((2, 3)) >= alone.sum((2, 3)) / 3 - slack).all()
    assert not alone[:, :, [0, -1]].any()
    assert not alone[..., [0, -1]].any()


def test_a_frame_only_changes_where_its_object_is(scenes: Scenes, images: np.ndarray) -> None:
    some = np.arange(0, N, 8)
    alone = np.isfinite(silhouettes(scenes[some]))
    for frame in (1, 2):
        before, after = images[some, frame - 1].astype(int), images[some, frame].astype(int)
        change = np.abs(after - before).max(-1)
        new = alone[:, frame]
        for i in range(len(some)):
            assert np.median(change[i][new[i]]) > 15
        assert (after - before)[~new].max() <= after.max() * 0.8  # no burnt fringe
        far = ~dilate(new, 14)
        assert change[far].max() <= 12  # at most the end of a shadow
        assert (change[far] == 0).mean() > 0.85


def dilate(mask: np.ndarray, steps: int) -> np.ndarray:
    for _ in range(steps):
        mask = mask.copy()
        mask[:, 1:] |= mask[:, :-1]
        mask[:, :-1] |= mask[:, 1:]
        mask[:, :, 1:] |= mask[:, :, :-1]
        mask[:, :, :-1] |= mask[:, :, 1:]
    return mask


def test_the_eight_colours_have_different_mean_colours() -> None:
    scenes = draw_scenes(240, seed=3)
    images = draw(scenes)[:, 0].astype(float)
    mask = np.isfinite(depth_maps(scenes, 64, 64)[:, 0])
    colour = np.stack([image[own].mean(0) for image, own in zip(images, mask, strict=True)])
    linear = (colour / 255) ** 2.2
    direction = linear / np.linalg.norm(linear, axis=1, keepdims=True)
    palette = PALETTE / np.linalg.norm(PALETTE, axis=1, keepdims=True)
    nearest = (direction @ palette.T).argmax(1)
    assert (nearest == scenes.classes[:, 0] % len(COLOURS)).mean() > 0.99


def test_the_three_shapes_have_different_outlines() -> None:
    scenes = draw_scenes(240, seed=3)
    mask = np.isfinite(depth_maps(scenes, 320, 240)[:, 0])
    height, width = mask.any(2).sum(1), mask.any(1).sum(1)
    fill = mask.sum((1, 2)) / (height * width)
    kind = scenes.classes[:, 0] // len(COLOURS)
    assert (np.abs(fill - np.pi / 4) < 0.03)[kind == 1].all()  # seen aslant, a sphere's outline is nearly a circle
    assert (height / width)[kind == 2].min() > (height / width)[kind == 1].max()  # cylinders show their tops
    assert mask.sum((1, 2))[kind == 0].mean() < 0.9 * mask.sum((1, 2))[kind == 2].mean()


def test_labels_do_not_load_torch() -> None:
    code = "import sys; from ddpmctl.benchmark import embedded, scenes; embedded.train_labels(3); scenes.draw_scenes(3); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
