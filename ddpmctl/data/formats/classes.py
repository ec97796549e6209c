"""One folder for each class, as torchvision's ``ImageFolder`` reads them."""

from __future__ import annotations

from pathlib import Path

from ddpmctl.data.declared import Declared, images_below, listing
from ddpmctl.data.folders import Problem
from ddpmctl.data.source import DataSource
from ddpmctl.errors import show
from ddpmctl.registry import FORMATS
from ddpmctl.task import LabelSet


@FORMATS.register("classes")
class ClassFolders:
    """one folder for each class, with images at any depth."""

    @staticmethod
    def recognises(root: Path) -> bool:
        """Return whether there are two or more folders with images, and no image beside them."""
        names = images_below(root) if root.is_dir() else []
        return len({name.partition("/")[0] for name in names}) > 1 and all("/" in name for name in names)

    @staticmethod
    def scan(source: DataSource) -> tuple[Declared, list[Problem]]:
        """Return the images, each with the name of its folder."""
        root = source.path
        assert root is not None
        names = images_below(root)
        problems, digest = listing(root, names)
        problems += [Problem(str(root / name), f"{show(name)} is in no folder of a class; move it into one") for name in names if "/" not in name]
        labels: dict[str, LabelSet] = {name: (name.partition("/")[0],) for name in names if "/" in name}
        classes = tuple(sorted({label for one in labels.values() for label in one}))
        return Declared("classes", root, labels, classes, digest, {}), problems
