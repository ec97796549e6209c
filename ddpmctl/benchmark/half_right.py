"""Scenes to mix: with and without their last object, and with another shape in its place."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from ddpmctl.benchmark.raycast import render
from ddpmctl.benchmark.scenes import OBJECTS, Scenes, draw_scenes
from ddpmctl.iclevr import CLASSES, COLOURS, SHAPES

HALF_SEEDS = 4 * 2**32  # other scenes than those of training and of the other check


@dataclass(frozen=True)
class Exchanged:
    """Scenes whose last object can be exchanged for one of the same colour.

    Attributes:
        first, second: class numbers of the last object and of the one in its place, (N,).
        without, whole, exchanged: uint8 (N, height, width, 3).
    """

    first: np.ndarray
    second: np.ndarray
    without: np.ndarray
    whole: np.ndarray
    exchanged: np.ndarray


def exchanged_scenes(scenes: int, *, seed: int) -> Exchanged:
    """Return up to ``scenes`` scenes; those that already show the other shape in this colour are left out."""
    drawn = draw_scenes(scenes, seed=HALF_SEEDS + seed % HALF_SEEDS, triples="any")
    first = drawn.classes[:, -1]
    second = (first + len(COLOURS) * np.random.default_rng(seed).integers(1, len(SHAPES), len(drawn))) % len(CLASSES)
    kept = (drawn.classes[:, :-1] != second[:, None]).all(1)
    drawn, first, second = drawn[kept], first[kept], second[kept]
    other = dataclasses.replace(drawn, classes=np.column_stack([drawn.classes[:, :-1], second]))
    frames = _frames(drawn)
    return Exchanged(first, second, frames[:, OBJECTS - 2], frames[:, OBJECTS - 1], _frames(other)[:, OBJECTS - 1])


def _frames(scenes: Scenes) -> np.ndarray:
    """Return all frames, uint8 (N, 3, height, width, 3)."""
    return np.concatenate(list(render(scenes)))
