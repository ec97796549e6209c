"""The task of i-CLEVR: 24 object classes in the lab's order, at 64x64."""

from __future__ import annotations

from ddpmctl.task import Task

SHAPES = ("cube", "sphere", "cylinder")
COLOURS = ("gray", "red", "blue", "green", "brown", "purple", "cyan", "yellow")
CLASSES: tuple[str, ...] = tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)

ICLEVR = Task(CLASSES, 64, ("test", "new_test"), ("colour", "shape"))
"""What data sets in the lab's layout, the embedded benchmark, and checkpoints without a task are for."""

INDEX = ICLEVR.index
