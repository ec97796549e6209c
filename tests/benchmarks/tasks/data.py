"""Data sets unlike i-CLEVR: real digits, drawings of houses with several labels, scenes in CLEVR's form, and images without labels."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

# Names with commas and of other scripts, as people have them.
HOUSE = ("door, red", "окно", "煙突", "tree", "sun, yellow", "fence")
SCALE = 4  # drawn so many times as large, and reduced: smooth edges
SIDE = 64


def digits(folder: Path) -> int:
    """Write scikit-learn's 1,797 handwritten digits as one folder for each class; returns their number."""
    from sklearn.datasets import load_digits

    found = load_digits()
    for index, (pixels, digit) in enumerate(zip(found.images, found.target, strict=True)):
        place = folder / str(digit)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255 / 16).round().astype(np.uint8)).save(place / f"{index:04d}.png")
    return len(found.images)


def houses(folder: Path, count: int = 4000, seed: int = 0) -> int:
    """Write drawings of houses with up to six things, and ``metadata.jsonl``; every combination is equally frequent."""
    folder.mkdir(parents=True, exist_ok=True)
    sets = [tuple(itertools.compress(HOUSE, bits)) for bits in itertools.product((0, 1), repeat=len(HOUSE))]
    lines = []
    for index in range(count):
        labels, name = sets[index % len(sets)], f"house-{index:05d}.png"
        draw_house(labels, np.random.default_rng([seed, index])).save(folder / name)
        lines.append(json.dumps({"file_name": name, "labels": labels}, ensure_ascii=False))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return count


def draw_house(labels: tuple[str, ...], rng: np.random.Generator) -> Image.Image:
    """Return a flat drawing, 64x64: a house on a lawn, and beside it what the labels name; places and colours vary."""
    image = Image.new("RGB", (SCALE * SIDE, SCALE * SIDE), _near((176, 216, 240), rng))
    draw = ImageDraw.Draw(image)

    def box(x0: float, y0: float, x1: float, y1: float, colour: tuple[int, int, int]) -> None:
        draw.rectangle([SCALE * x0, SCALE * y0, SCALE * x1, SCALE * y1], fill=_near(colour, rng))

    def polygon(points: list[tuple[float, float]], colour: tuple[int, int, int]) -> None:
        draw.polygon([(SCALE * x, SCALE * y) for x, y in points], fill=_near(colour, rng))

    ground, left = 50 + rng.uniform(-2, 2), 22 + rng.uniform(-3, 3)
    right, top = left + 24 + rng.uniform(-2, 2), ground - 19 + rng.uniform(-2, 2)
    if "sun, yellow" in labels:
        x, y, r = rng.uniform(6, 14), rng.uniform(6, 12), rng.uniform(4, 5.5)
        draw.ellipse([SCALE * (x - r), SCALE * (y - r), SCALE * (x + r), SCALE * (y + r)], fill=_near((252, 214, 60), rng))
    box(0, ground, SIDE, SIDE, (120, 178, 84))
    if "煙突" in labels:
        x = right - 8 + rng.uniform(-1.5, 1.5)
        box(x, top - 14, x + 5, top, (96, 72, 66))
    box(left, top, right, ground, (240, 226, 190))
    polygon([(left - 3, top), ((left + right) / 2, top - 11 + rng.uniform(-1.5, 1.5)), (right + 3, top)], (150, 84, 60))
    if "door, red" in labels:
        x = left + 3 + rng.uniform(-1, 2)
        box(x, ground - 11, x + 6, ground, (200, 40, 44))
    if "окно" in labels:
        x, y = right - 10 + rng.uniform(-1.5, 1), top + 4 + rng.uniform(-1, 1.5)
        box(x, y, x + 7, y + 7, (64, 92, 140))
        box(x + 3, y, x + 4, y + 7, (250, 250, 250))
    if "tree" in labels:
        x, r = 54 + rng.uniform(-2, 3), rng.uniform(5, 6.5)
        box(x - 1.2, ground - 10, x + 1.2, ground + 2, (110, 76, 48))
        draw.ellipse([SCALE * (x - r), SCALE * (ground - 21), SCALE * (x + r), SCALE * (ground - 21 + 2 * r)], fill=_near((44, 120, 60), rng))
    if "fence" in labels:
        y = ground + 4 + rng.uniform(0, 3)
        box(0, y, SIDE, y + 1.3, (250, 250, 250))
        for x in range(2, SIDE, 6):
            box(x, y - 3, x + 1.6, y + 4.5, (250, 250, 250))
    return image.resize((SIDE, SIDE), Image.Resampling.BOX)


def clevr(folder: Path, count: int = 300, seed: int = 0) -> tuple[int, int]:
    """Write images of 3 to 10 coloured shapes in CLEVR's form (``images/``, ``scenes/``); returns their number, and that of images with an object twice."""
    (folder / "images" / "train").mkdir(parents=True)
    (folder / "scenes").mkdir()
    colours = {"red": (173, 35, 35), "blue": (42, 75, 215), "green": (29, 105, 20), "gray": (87, 87, 87)}
    shapes, scenes, repeated = ("cube", "sphere", "cylinder"), [], 0
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        image, objects = Image.new("RGB", (480, 320), (160, 160, 158)), []
        draw = ImageDraw.Draw(image)
        for _ in range(int(rng.integers(3, 11))):
            colour, shape = str(rng.choice(list(colours))), str(rng.choice(shapes))
            x, y, r = rng.uniform(40, 440), rng.uniform(40, 280), rng.uniform(14, 30)
            box = [x - r, y - r, x + r, y + r]
            if shape == "sphere":
                draw.ellipse(box, fill=colours[colour])
            else:
                draw.rectangle([x - r * (0.5 if shape == "cylinder" else 1), y - r, x + r * (0.5 if shape == "cylinder" else 1), y + r], fill=colours[colour])
            objects.append({"color": colour, "shape": shape, "size": "large" if r > 22 else "small", "material": "rubber", "pixel_coords": [x, y, 10.0]})
        name = f"CLEVR_train_{index:06d}.png"
        image.save(folder / "images" / "train" / name)
        repeated += len({(one["color"], one["shape"]) for one in objects}) < len(objects)
        scenes.append({"split": "train", "image_index": index, "image_filename": name, "objects": objects})
    (folder / "scenes" / "CLEVR_train_scenes.json").write_text(json.dumps({"info": {"split": "train"}, "scenes": scenes}))
    return count, repeated


def unlabelled(folder: Path, count: int = 300) -> int:
    """Write drawings of houses, each with everything, without any labels."""
    folder.mkdir(parents=True)
    for index in range(count):
        draw_house(HOUSE, np.random.default_rng([1, index])).save(folder / f"{index:04d}.png")
    return count


def many(folder: Path, count: int) -> int:
    """Write images in ten class folders: drawings of houses, each brightened or darkened in its own way; returns their number."""
    sets = list(all_sets())
    drawn = [np.asarray(draw_house(sets[index % len(sets)], np.random.default_rng([2, index])), np.int16) for index in range(500)]
    for name in range(10):
        (folder / f"class {name}").mkdir(parents=True)
    for index in range(count):
        changed = np.clip(drawn[index % 500] + np.random.default_rng([3, index]).integers(-20, 21, 3), 0, 255).astype(np.uint8)
        Image.fromarray(changed).save(folder / f"class {index % 10}" / f"{index:06d}.png", compress_level=1)
    return count


def _near(colour: tuple[int, int, int], rng: np.random.Generator) -> tuple[int, int, int]:
    """Return a colour that differs a little."""
    red, green, blue = (int(value) for value in np.clip(np.array(colour) + rng.integers(-12, 13, 3), 0, 255))
    return red, green, blue


def all_sets() -> Iterator[tuple[str, ...]]:
    """Yield the label sets of the houses that have a label."""
    for bits in itertools.product((0, 1), repeat=len(HOUSE)):
        if any(bits):
            yield tuple(itertools.compress(HOUSE, bits))
