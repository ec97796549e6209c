"""Moved to ``iclevr.py`` and ``task.py``."""

from ddpmctl.iclevr import CLASSES, COLOURS, ICLEVR, INDEX, SHAPES
from ddpmctl.task import LabelSet

multi_hot, parse_label, class_index = ICLEVR.multi_hot, ICLEVR.parse_label, ICLEVR.class_index
__all__ = ["CLASSES", "COLOURS", "INDEX", "SHAPES", "LabelSet", "class_index", "multi_hot", "parse_label"]
