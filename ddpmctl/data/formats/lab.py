"""The lab's layout: objects.json, train.json, and the conditions in test.json, new_test.json and perhaps heldout.json."""

from __future__ import annotations

from pathlib import Path

from ddpmctl.data.declared import Declared
from ddpmctl.data.folders import Problem, scan_lab
from ddpmctl.data.source import DataSource
from ddpmctl.iclevr import ICLEVR
from ddpmctl.registry import FORMATS


@FORMATS.register("lab")
class Lab:
    """the lab's layout of i-CLEVR: objects.json, train.json, test.json, new_test.json."""

    @staticmethod
    def recognises(root: Path) -> bool:
        """Return whether one of its files is there, so that the others are missed by name."""
        return root.is_dir() and any((root / name).exists() for name in ("objects.json", "train.json", "new_test.json"))

    @staticmethod
    def scan(source: DataSource) -> tuple[Declared, list[Problem]]:
        """Return the contents of the JSON files, and all problems."""
        assert source.path is not None
        lab, problems = scan_lab(source.path)
        return Declared("lab", source.path, lab.labels, ICLEVR.classes, lab.train_digest, lab.conditions, aspects=ICLEVR.aspects), problems
