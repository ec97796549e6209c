"""CLEVR's own form (Johnson et al. 2017): scenes/*.json with the objects of each image, and images/."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ddpmctl.data.declared import Declared
from ddpmctl.data.folders import MAX_PROBLEMS, Problem, parse_json, read_bytes, unsafe_name
from ddpmctl.data.source import DataSource
from ddpmctl.errors import show
from ddpmctl.registry import FORMATS
from ddpmctl.task import LabelSet

COLUMNS = ("color", "shape")  # of an object, that make its label by default
MOST_BYTES = 2**30


@FORMATS.register("clevr")
class Clevr:
    """CLEVR's scenes/*.json; an object's label is its color and shape, or what --label-column names."""

    @staticmethod
    def recognises(root: Path) -> bool:
        """Return whether there is a file of scenes."""
        return root.is_dir() and bool(_files(root))

    @staticmethod
    def scan(source: DataSource) -> tuple[Declared, list[Problem]]:
        """Return the images and the labels of their objects; of images with two objects of one label, the label counts once."""
        root, columns = source.path, source.label_column or COLUMNS
        assert root is not None
        labels: dict[str, LabelSet] = {}
        problems: list[Problem] = []
        digest, repeated, total = hashlib.sha256("/".join(columns).encode()), 0, 0
        for file in _files(root):
            raw = read_bytes(file, MOST_BYTES)
            digest.update(raw)
            content = parse_json(raw, file)
            scenes = content.get("scenes") if isinstance(content, dict) else None
            if not isinstance(scenes, list):
                problems.append(Problem(str(file), 'must be an object with a list "scenes"'))
                continue
            for number, scene in enumerate(scenes, start=1):
                name, objects, wrong = _scene(root, scene, columns)
                wrong = f"the image {show(name)} is listed twice" if not wrong and name in labels else wrong
                if wrong and len(problems) < MAX_PROBLEMS:
                    problems.append(Problem(str(file), f"scene {number} of {len(scenes)}: {wrong}"))
                if wrong:
                    continue
                total += 1
                twice = len(set(objects)) < len(objects)
                repeated += twice
                if not twice or source.repeated == "keep":
                    labels[name] = tuple(sorted(set(objects)))
        what = "they are left out" if source.repeated == "drop" else "such a label counts once; --repeated drop leaves these images out"
        notes = (f"{repeated:,} of {total:,} images show two or more objects of one label: {what}",) if repeated else ()
        classes = tuple(sorted({label for one in labels.values() for label in one}))
        two_words = columns == COLUMNS and all(len(name.split(" ")) == 2 for name in classes)
        return Declared("clevr", root, labels, classes, digest.hexdigest(), {}, notes, columns if two_words else ()), problems


def _files(root: Path) -> list[Path]:
    return sorted(file for file in (root / "scenes").glob("*.json") if file.is_file() and not file.name.startswith("."))


def _scene(root: Path, scene: Any, columns: tuple[str, ...]) -> tuple[str, list[str], str]:
    """Return a scene's image, the labels of its objects, and what is wrong with it."""
    name = scene.get("image_filename") if isinstance(scene, dict) else None
    if not isinstance(name, str) or not name:
        return "", [], "has no image_filename"
    if wrong := unsafe_name(name):
        return name, [], f"the file name {show(name)} {wrong}"
    objects = scene.get("objects")
    if not isinstance(objects, list) or not all(isinstance(one, dict) for one in objects):
        return name, [], "has no list of objects"
    for one in objects:
        for column in columns:
            if not isinstance(one.get(column), str) or not one[column]:
                return name, [], f"an object has no {column}"
    split = scene.get("split")
    within = f"images/{split}/{name}"
    inside = isinstance(split, str) and not unsafe_name(within) and (root / within).is_file()
    return within if inside else f"images/{name}", [" ".join(one[column] for column in columns) for one in objects], ""
