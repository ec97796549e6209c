"""Random scenes: three objects, a camera and three lamps.

Scene i is a pure function of (seed, i). Scenes are drawn in chunks of a fixed size, each with its own Philox streams. A scene
whose placement breaks a rule is redrawn from the stream of the next attempt.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ddpmctl.benchmark import geometry
from ddpmctl.benchmark.geometry import HALF_HEIGHT, RADIUS, Camera, Solids, Windows
from ddpmctl.benchmark.label_sets import training_triples
from ddpmctl.iclevr import CLASSES, COLOURS, INDEX

OBJECTS = 3
CHUNK = 256  # scenes per stream; a change changes the scenes of every seed
SIDE = 64  # image size in pixels for the visibility rule
MIN_VISIBLE_PIXELS = 12
MIN_VISIBLE_SHARE = 1 / 3

EYE = np.array([7.3, -6.75, 5.25])  # CLEVR's camera and lamps: key, fill, back
EYE_JITTER = 0.3
LAMPS = np.array([[6.3, -3.0, 3.9], [-4.6, -3.7, 2.6], [-1.1, 2.4, 4.7]])
LAMP_JITTER = 0.6
POWER_JITTER = 0.1
REACH = 3.0  # objects are in the square |x|, |y| < REACH
GAP = 0.25  # minimum distance between the circles around two objects' bases
GRAIN_TILE = 512  # size of the common grain pattern in pixels

Triples = Literal["benchmark", "any"]
_SEQUENCES = ("benchmark", "any", "given")
_PURPOSES = ("labels", "view", "placement")


@dataclass(frozen=True)
class Scenes:
    """Arrays over N scenes; lengths in scene units, angles in radians."""

    classes: np.ndarray  # (N, 3) int64, class numbers 0-23 in the order in which the objects are added
    positions: np.ndarray  # (N, 3, 2) float64, x and y of the base's centre
    rotations: np.ndarray  # (N, 3) float64, about z
    eyes: np.ndarray  # (N, 3) float64, camera positions
    lamps: np.ndarray  # (N, 3, 3) float64, positions of key, fill and back lamp
    powers: np.ndarray  # (N, 3) float64, relative strengths of the lamps
    grains: np.ndarray  # (N, 2) int64, offset in the common grain pattern

    def __len__(self) -> int:
        """Return the number of scenes."""
        return len(self.classes)

    def __getitem__(self, index: slice | np.ndarray) -> Scenes:
        """Return a subset of the scenes."""
        return Scenes(*(getattr(self, field.name)[index] for field in dataclasses.fields(self)))


def draw_scenes(count: int, *, seed: int = 0, start: int = 0, triples: Triples = "benchmark") -> Scenes:
    """Return scenes `start` to `start + count` of a seed's sequence.

    ``triples="benchmark"`` uses the 1,888 triples of the training set, each once in every 1,888 scenes; ``"any"`` uses all
    2,024. The order of the objects in a scene is random.
    """
    chunks = range(start // CHUNK, max(start // CHUNK + 1, -(-(start + count) // CHUNK)))
    drawn = [_draw_chunk(seed, chunk, triples) for chunk in chunks]
    first = start - chunks.start * CHUNK
    joined = Scenes(*(np.concatenate([getattr(part, field.name) for part in drawn]) for field in dataclasses.fields(Scenes)))
    return joined[first : first + count]


def draw_classes(count: int, *, seed: int = 0, start: int = 0, triples: Triples = "benchmark") -> np.ndarray:
    """Return only the class numbers of the scenes of :func:`draw_scenes`, (count, 3) int64."""
    table = _triple_table(triples)
    index = np.arange(start, start + count)
    order = np.empty((count, OBJECTS))
    which = np.empty(count, dtype=np.int64)
    for block in np.unique(index // len(table)):
        here = index // len(table) == block
        stream = _stream(seed, triples, "labels", int(block))
        shuffled = np.argsort(stream.random(len(table)), kind="stable")
        which[here] = shuffled[index[here] % len(table)]
        order[here] = stream.random((len(table), OBJECTS))[index[here] % len(table)]
    return np.take_along_axis(table[which], np.argsort(order, axis=1, kind="stable"), axis=1)


def arrange(classes: np.ndarray, *, seed: int = 0) -> Scenes:
    """Return scenes with given objects: class numbers (N, 3), different within a row; all else is drawn as in :func:`draw_scenes`.

    A scene depends on (seed, its index, its chunk's classes).
    """
    count = len(classes)
    padded = np.resize(classes, (-(-count // CHUNK) * CHUNK, OBJECTS))
    drawn = [_arranged(padded[first : first + CHUNK], seed, first // CHUNK, "given") for first in range(0, len(padded), CHUNK)]
    return Scenes(*(np.concatenate([getattr(part, field.name) for part in drawn]) for field in dataclasses.fields(Scenes)))[:count]


def visible_pixels(scenes: Scenes) -> tuple[np.ndarray, np.ndarray]:
    """Return each object's visible pixels in the last frame at 64x64, and its pixels without the others, (N, 3) each."""
    depth = depth_maps(scenes, SIDE, SIDE)
    alone = np.isfinite(depth)
    nearest = alone & (depth == depth.min(axis=1, keepdims=True))
    return nearest.sum((2, 3)), alone.sum((2, 3))


def depth_maps(scenes: Scenes, width: int, height: int) -> np.ndarray:
    """Return each object's distance along the pixel's ray, infinite where it is missed: (N, 3, height, width) float32."""
    windows = scene_windows(scenes, width=width, height=height)
    depth = np.full((len(scenes) * OBJECTS, height, width), np.inf, dtype=np.float32)
    depth[windows.pixels()] = windows.distance
    return depth.reshape(len(scenes), OBJECTS, height, width)


def scene_windows(scenes: Scenes, *, width: int, height: int, supersample: int = 1) -> Windows:
    """Return the windows of all objects of the scenes, object k of scene i in lane 3 i + k."""
    camera = Camera.at(scenes.eyes)[np.repeat(np.arange(len(scenes)), OBJECTS)]
    shapes = scenes.classes.reshape(-1) // len(COLOURS)
    solids = Solids(shapes, scenes.positions.reshape(-1, 2), scenes.rotations.reshape(-1))
    return geometry.cast_windows(camera, solids, width=width, height=height, supersample=supersample)


def _draw_chunk(seed: int, chunk: int, triples: Triples) -> Scenes:
    return _arranged(draw_classes(CHUNK, seed=seed, start=chunk * CHUNK, triples=triples), seed, chunk, triples)


def _arranged(classes: np.ndarray, seed: int, chunk: int, sequence: str) -> Scenes:
    """Draw camera and lamps of one chunk once, and the placement until every rule holds."""
    stream = _stream(seed, sequence, "view", chunk)
    scenes = Scenes(
        classes=classes,
        positions=np.zeros((CHUNK, OBJECTS, 2)),
        rotations=np.zeros((CHUNK, OBJECTS)),
        eyes=EYE + EYE_JITTER * _centred(stream, CHUNK, 3),
        lamps=LAMPS + LAMP_JITTER * _centred(stream, CHUNK, 3, 3),
        powers=1 + POWER_JITTER * _centred(stream, CHUNK, 3),
        grains=np.floor(GRAIN_TILE * stream.random((CHUNK, 2))).astype(np.int64),
    )
    pending = np.arange(CHUNK)
    for attempt in itertools.count():
        proposal = _stream(seed, sequence, "placement", chunk, attempt).random((CHUNK, OBJECTS, 3))[pending]
        scenes.positions[pending] = REACH * (2 * proposal[..., :2] - 1)
        scenes.rotations[pending] = 2 * np.pi * proposal[..., 2]
        pending = pending[~_placement_holds(scenes[pending])]
        if not len(pending):
            break
    return scenes


def _placement_holds(scenes: Scenes) -> np.ndarray:
    """Return whether a scene's objects are apart, in view, and visible enough, (N,) bool."""
    holds: np.ndarray = _apart(scenes) & _in_view(scenes)
    candidates = np.flatnonzero(holds)
    visible, alone = visible_pixels(scenes[candidates])
    holds[candidates] = ((visible >= MIN_VISIBLE_PIXELS) & (visible >= MIN_VISIBLE_SHARE * alone)).all(1)
    return holds


def _apart(scenes: Scenes) -> np.ndarray:
    gaps = [scenes.positions[:, a] - scenes.positions[:, b] for a, b in ((0, 1), (0, 2), (1, 2))]
    apart: np.ndarray = np.logical_and.reduce([(gap**2).sum(-1) > (2 * RADIUS + GAP) ** 2 for gap in gaps])
    return apart


def _in_view(scenes: Scenes) -> np.ndarray:
    camera = Camera.at(scenes.eyes[:, None])
    middle = np.concatenate([scenes.positions, HALF_HEIGHT[scenes.classes // len(COLOURS), None]], axis=-1)
    u, v, depth = camera.project(middle)
    margin = 1.3 * RADIUS * geometry.FOCAL / depth
    inside: np.ndarray = ((np.abs(u) + margin < 0.5) & (np.abs(v) + margin < geometry.ASPECT / 2)).all(1)
    return inside


def _triple_table(triples: Triples) -> np.ndarray:
    if triples == "any":
        return np.array(list(itertools.combinations(range(len(CLASSES)), OBJECTS)))
    return np.array([[INDEX[name] for name in triple] for triple in training_triples()])


def _centred(stream: np.random.Generator, *shape: int) -> np.ndarray:
    """Draw uniformly from [-1, 1)."""
    drawn: np.ndarray = 2 * stream.random(shape) - 1
    return drawn


def _stream(seed: int, sequence: str, purpose: str, block: int, attempt: int = 0) -> np.random.Generator:
    """Return the counter-based generator of one purpose and block."""
    name = 10 * _SEQUENCES.index(sequence) + _PURPOSES.index(purpose)
    return np.random.Generator(np.random.Philox(key=[seed % 2**64, name], counter=[0, 0, attempt, block]))
