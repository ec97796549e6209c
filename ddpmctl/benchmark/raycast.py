"""The renderer: scenes to images in the style of i-CLEVR.

Each object is ray-cast once for all frames of its scene. Light is linear; objects are composited over the floor from back to
front, and the result is converted to sRGB with a little sensor grain.
"""

from __future__ import annotations

import collections
import functools
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from ddpmctl.benchmark import geometry
from ddpmctl.benchmark.geometry import Camera, Vector
from ddpmctl.benchmark.lighting import ALBEDO, Points, light
from ddpmctl.benchmark.scenes import GRAIN_TILE, OBJECTS, Scenes, scene_windows
from ddpmctl.iclevr import COLOURS

SUPERSAMPLE = 3  # rays per pixel and axis for objects; the smooth floor needs one
CHUNK_PIXELS = 8 * 64 * 64  # of one frame; fits the CPU cache
GRAIN = 0.033  # of the grey level at 320x240, in the dark


def render(scenes: Scenes, *, width: int = 64, height: int = 64) -> Iterator[np.ndarray]:
    """Yield the scenes' images in order, in chunks: uint8 (n, 3, height, width, 3).

    Frame f shows the first f + 1 objects. The view is 4:3; other sizes squeeze it. Pixels do not depend on the chunks.
    """
    step = max(1, CHUNK_PIXELS // (width * height))
    parts = (scenes[first : first + step] for first in range(0, len(scenes), step))
    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        waiting: collections.deque[Future[np.ndarray]] = collections.deque()
        for part in parts:
            waiting.append(pool.submit(_render_part, part, width, height))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _render_part(scenes: Scenes, width: int, height: int) -> np.ndarray:
    canvas = _floor(scenes, width, height)  # (n, F, 3, height, width) linear light
    _lay_objects(canvas, scenes)
    return _develop(canvas, scenes.grains)


def _floor(scenes: Scenes, width: int, height: int) -> np.ndarray:
    """Return the lit and shadowed floor of each frame."""
    n = len(scenes)
    camera = Camera.at(scenes.eyes)
    start = np.zeros(n, dtype=np.int64)
    x, y, z = camera.rays(geometry.pixel_columns(start, width, width), geometry.pixel_rows(start, height, height))
    eye = camera.eye[:, :, None, None]
    t = -eye[:, 2] / np.minimum(z, -0.02)  # the horizon is above the view
    at = (eye[:, 0] + t * x).reshape(n, -1), (eye[:, 1] + t * y).reshape(n, -1), np.zeros((n, 1), dtype=np.float32)
    flat = np.zeros((1, 1), dtype=np.float32)
    points = Points(at, (flat, flat, flat + 1), np.arange(n), np.full(n, OBJECTS))
    return light(scenes, points).reshape(OBJECTS, 3, n, height, width).transpose(2, 0, 1, 3, 4).copy()


def _lay_objects(canvas: np.ndarray, scenes: Scenes) -> None:
    """Composite the objects over the floor, back to front; in place."""
    height, width = canvas.shape[-2:]
    windows = scene_windows(scenes, width=width, height=height, supersample=SUPERSAMPLE)
    met = np.isfinite(windows.distance)
    sent = np.zeros((OBJECTS, 3, *met.shape), dtype=np.float32)
    sent[:, :, met] = _object_light(scenes, windows, met)
    colour = _shrink(sent)
    clear = 1 - _shrink(met.astype(np.float32))
    offset = np.concatenate([scenes.positions, np.zeros((len(scenes), OBJECTS, 1))], axis=-1) - scenes.eyes[:, None]
    order = np.argsort(-(offset**2).sum(-1), axis=1, kind="stable")
    rows, columns = clear.shape[1:]
    for scene, objects in enumerate(order):
        for which in objects:
            lane = OBJECTS * scene + which
            there = np.arange(OBJECTS) >= which
            top, left = windows.top[lane], windows.left[lane]
            view = canvas[scene, :, :, top : top + rows, left : left + columns]
            view[there] = view[there] * clear[lane] + colour[there, :, lane]


def _object_light(scenes: Scenes, windows: geometry.Windows, met: np.ndarray) -> np.ndarray:
    """Return the reflected light at the samples that hit an object, (F, 3, samples)."""
    lane = np.nonzero(met)[0]
    scene, owner = np.divmod(lane, OBJECTS)
    distance = windows.distance[met]
    x, y, z = (start[lane, 0, 0] + distance * ray[met] for start, ray in zip(windows.eye, windows.ray, strict=True))
    kind = (scenes.classes // len(COLOURS))[scene, owner]
    nx, ny, nz = (np.empty_like(x) for _ in range(3))
    for shape in (geometry.CUBE, geometry.SPHERE, geometry.CYLINDER):
        here = np.flatnonzero(kind == shape)
        nx[here], ny[here], nz[here] = geometry.surface_normal(shape, (x[here], y[here], z[here]))
    cos = np.cos(scenes.rotations).astype(np.float32)[scene, owner]
    sin = np.sin(scenes.rotations).astype(np.float32)[scene, owner]
    place = scenes.positions.astype(np.float32)[scene, owner]
    at = (cos * x - sin * y + place[:, 0], sin * x + cos * y + place[:, 1], z)
    normal = (cos * nx - sin * ny, sin * nx + cos * ny, nz)
    points = Points(_upright(at), _upright(normal), scene, owner)
    albedo = ALBEDO[scenes.classes[scene, owner] % len(COLOURS)]
    sent: np.ndarray = light(scenes, points)[..., 0] * albedo.T
    return sent


def _upright(vector: Vector) -> Vector:
    """Make each point its own lane: (samples,) to (samples, 1)."""
    return vector[0][:, None], vector[1][:, None], vector[2][:, None]


def _shrink(samples: np.ndarray) -> np.ndarray:
    """Average the samples of each pixel, (..., h * s, w * s) to (..., h, w), in a fixed order."""
    total = np.zeros_like(samples[..., ::SUPERSAMPLE, ::SUPERSAMPLE])
    for row in range(SUPERSAMPLE):
        for column in range(SUPERSAMPLE):
            total += samples[..., row::SUPERSAMPLE, column::SUPERSAMPLE]
    return total * np.float32(1 / SUPERSAMPLE**2)


def _develop(canvas: np.ndarray, grains: np.ndarray) -> np.ndarray:
    """Convert linear light to sRGB with sensor grain, uint8 (n, F, height, width, 3)."""
    height, width = canvas.shape[-2:]
    pattern = _grain_pattern()
    strength = np.float32(GRAIN * (width * height / (320 * 240)) ** 0.5)
    rows, columns = grains[:, :1] + np.arange(height), grains[:, 1:] + np.arange(width)
    grain = pattern[(rows % GRAIN_TILE)[:, :, None], (columns % GRAIN_TILE)[:, None, :]] * strength
    root = np.sqrt(np.minimum(canvas, 1)) * np.float32(len(_srgb_table()) - 1)
    level = _srgb_table()[root.astype(np.int32)]
    level += level * grain[:, None, None] * (1 - 3 * np.minimum(canvas, np.float32(0.28)))  # less grain in bright areas, as in real frames
    return np.ascontiguousarray(np.clip(level + np.float32(0.5), 0, 255).astype(np.uint8).transpose(0, 1, 3, 4, 2))


@functools.cache
def _grain_pattern() -> np.ndarray:
    """Return the pattern of unit noise that every image takes its grain from."""
    return np.random.Generator(np.random.Philox(key=0)).standard_normal((GRAIN_TILE, GRAIN_TILE)).astype(np.float32)


@functools.cache
def _srgb_table() -> np.ndarray:
    """Return grey levels 0-255, indexed by the square root of linear light (IEC 61966-2-1)."""
    linear = (np.arange(4096) / 4095) ** 2
    return (255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)).astype(np.float32)
