"""Images without labels, for an unconditional model."""

from __future__ import annotations

from pathlib import Path

from ddpmctl.data.declared import Declared, images_below, listing
from ddpmctl.data.folders import Problem
from ddpmctl.data.source import DataSource
from ddpmctl.registry import FORMATS


@FORMATS.register("plain")
class Plain:
    """images without labels, at any depth."""

    @staticmethod
    def recognises(root: Path) -> bool:
        """Return whether there is an image."""
        return root.is_dir() and bool(images_below(root))

    @staticmethod
    def scan(source: DataSource) -> tuple[Declared, list[Problem]]:
        """Return the images."""
        root = source.path
        assert root is not None
        names = images_below(root)
        problems, digest = listing(root, names)
        return Declared("plain", root, dict.fromkeys(names, ()), (), digest, {}), problems
