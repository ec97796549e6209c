"""Lighting: three lamps with soft shadows, and ambient light.

The lamps are CLEVR's key, fill and back lamp; their strengths and the ambient light were fitted to the floor of a real frame (rms
error below two grey levels, including its grain). Light is linear, as reflected by a surface with the floor's albedo.
Points use only +, -, *, / and sqrt, whose results do not depend on the other elements of an array.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ddpmctl.benchmark.geometry import CUBE, CYLINDER, HALF_HEIGHT, HALF_SIDE, RADIUS, SPHERE, Vector
from ddpmctl.benchmark.scenes import OBJECTS, Scenes
from ddpmctl.iclevr import COLOURS

PALETTE = np.array(  # CLEVR's colours, in the order of labels.COLOURS; CLEVR uses them as linear light
    [[87, 87, 87], [173, 35, 35], [42, 75, 215], [29, 105, 20], [129, 74, 25], [129, 38, 192], [41, 208, 208], [255, 238, 51]]
)
FLOOR_ALBEDO = 0.8
ALBEDO = (PALETTE / (255 * FLOOR_ALBEDO)).astype(np.float32)  # (8, 3), relative to the floor
LAMP_COLOURS = np.array([[4.38, 4.06, 3.51], [1.25, 1.36, 1.68], [2.29, 2.24, 2.30]], dtype=np.float32)
LAMP_RADIUS = np.float32(0.4)  # makes the shadows soft
AMBIENT = np.array([0.1355, 0.1353, 0.1346], dtype=np.float32)
BOUNCE = np.float32(0.9)  # light from an obstacle, relative to the ambient light that it blocks
ONE, HALF = np.float32(1), np.float32(0.5)


@dataclass(frozen=True)
class Points:
    """Surface points, P per lane; a lane belongs to one object of a scene, or to its floor."""

    at: Vector  # (lanes, P) each
    normal: Vector  # (lanes, P) or (1, 1) each
    scene: np.ndarray  # (lanes,) index into the scenes
    owner: np.ndarray  # (lanes,) object index in the scene, OBJECTS for the floor


@dataclass(frozen=True)
class Obstacle:
    """An object of one shape that may block the light of some lanes."""

    rows: np.ndarray  # (r,) the lanes
    shape: int
    place: Vector  # (r, 1) each, the centre of the object's base
    turn: tuple[np.ndarray, np.ndarray]  # (r, 1) each, cosine and sine of its rotation
    offset: Vector  # (r, P) each, x and y from the point to the centre of the object's base, z the point's height
    normal: Vector  # (r, P) or (1, 1) each, of the points
    albedo: np.ndarray  # (3, r, 1)


def light(scenes: Scenes, points: Points) -> np.ndarray:
    """Return the light reflected with the floor's albedo, in each frame: (3, 3, lanes, P) float32."""
    out = np.zeros((OBJECTS, 3, len(points.scene), points.at[0].shape[1]), dtype=np.float32)
    obstacles = [_obstacles(scenes, points, k) for k in range(OBJECTS)]
    lamps, powers = scenes.lamps.astype(np.float32)[points.scene], scenes.powers.astype(np.float32)[points.scene]
    for which, colour in enumerate(LAMP_COLOURS):
        lamp = (lamps[:, which, 0, None], lamps[:, which, 1, None], lamps[:, which, 2, None])
        arriving = _from_lamp(points, lamp) * powers[:, which, None]
        for k in range(OBJECTS):
            for obstacle in obstacles[k]:
                arriving[obstacle.rows] *= _lamp_left(obstacle, lamp)
            out[k] += arriving * colour[:, None, None]
    around, bounced = _from_surroundings(points), np.zeros_like(out[0])
    for k in range(OBJECTS):
        for obstacle in obstacles[k]:
            covered = _covered(obstacle)
            around[obstacle.rows] *= 1 - covered
            bounced[:, obstacle.rows] += BOUNCE * obstacle.albedo * (covered * (1 - covered))
        out[k] += (around + bounced) * AMBIENT[:, None, None]
    return out


def _obstacles(scenes: Scenes, points: Points, k: int) -> list[Obstacle]:
    """Return object k of each scene as obstacles by shape; an object does not block its own light."""
    shapes, colours = np.divmod(scenes.classes[:, k], len(COLOURS))
    turns = np.cos(scenes.rotations[:, k, None]).astype(np.float32), np.sin(scenes.rotations[:, k, None]).astype(np.float32)
    places = scenes.positions[:, k].astype(np.float32)
    found = []
    for shape in (CUBE, SPHERE, CYLINDER):
        rows = np.flatnonzero((shapes[points.scene] == shape) & (points.owner != k))
        if not len(rows):
            continue
        scene = points.scene[rows]
        place = (places[scene, :1], places[scene, 1:], np.zeros((len(rows), 1), dtype=np.float32))
        x, y, z = _rows(points.at, rows)
        offset = (place[0] - x, place[1] - y, z)
        turn = (turns[0][scene], turns[1][scene])
        found.append(Obstacle(rows, shape, place, turn, offset, _rows(points.normal, rows), ALBEDO[colours[scene]].T[:, :, None]))
    return found


def _lamp_left(obstacle: Obstacle, lamp: Vector) -> np.ndarray:
    """Return the fraction of a lamp's light that passes the obstacle, (r, P); the lamp is a disc, so shadows are soft."""
    x, y, z = (part[obstacle.rows] for part in lamp)
    toward = (x - obstacle.place[0] + obstacle.offset[0], y - obstacle.place[1] + obstacle.offset[1], z - obstacle.offset[2])
    clearance, along = _CLEARANCE[obstacle.shape](obstacle, toward)
    q = np.clip(clearance / (LAMP_RADIUS * along + np.float32(0.02)) * HALF + HALF, 0, 1)
    smooth: np.ndarray = q * q * (3 - 2 * q)
    return smooth


def _covered(obstacle: Obstacle) -> np.ndarray:
    """Return the fraction of the ambient light that a sphere of the obstacle's size blocks, (r, P)."""
    half = HALF_HEIGHT[obstacle.shape]
    x, y, z = obstacle.offset[0], obstacle.offset[1], half - obstacle.offset[2]
    square = x * x + y * y + z * z
    facing = np.maximum(x * obstacle.normal[0] + y * obstacle.normal[1] + z * obstacle.normal[2], 0)
    covered: np.ndarray = np.minimum(facing * (half * half) / (square * np.sqrt(square)), 1)
    return covered


def _from_lamp(points: Points, lamp: Vector) -> np.ndarray:
    """Lambert's law at both ends: a diffuse surface, and a flat lamp that faces the origin."""
    x, y, z = (there - here for there, here in zip(lamp, points.at, strict=True))
    square = x * x + y * y + z * z
    axis = 1 / np.sqrt(lamp[0] * lamp[0] + lamp[1] * lamp[1] + lamp[2] * lamp[2])
    leaving = (x * lamp[0] + y * lamp[1] + z * lamp[2]) * axis
    falling = x * points.normal[0] + y * points.normal[1] + z * points.normal[2]
    arriving: np.ndarray = np.maximum(leaving, 0) * np.maximum(falling, 0) / (square * square)
    return arriving


def _from_surroundings(points: Points) -> np.ndarray:
    """Return the ambient light: less from below and near the floor."""
    up = points.normal[2]
    near_floor = (ONE - up) * np.maximum(HALF - points.at[2], 0)
    return np.broadcast_to(ONE - np.float32(0.5) * near_floor, np.broadcast(points.at[0], up).shape).copy()


# Distance from an obstacle to the line from a point to the lamp (negative: blocked), and its position on that line (0 to 1).


def _past_sphere(obstacle: Obstacle, toward: Vector) -> tuple[np.ndarray, np.ndarray]:
    x, y, z = obstacle.offset[0], obstacle.offset[1], HALF_HEIGHT[SPHERE] - obstacle.offset[2]
    a, b, c = toward
    along = np.clip((x * a + y * b + z * c) / (a * a + b * b + c * c), 0, 1)
    x, y, z = x - along * a, y - along * b, z - along * c
    return np.sqrt(x * x + y * y + z * z) - np.float32(RADIUS), along


def _past_cylinder(obstacle: Obstacle, toward: Vector) -> tuple[np.ndarray, np.ndarray]:
    x, y, z = obstacle.offset
    a, b, c = toward
    over = np.clip((2 * HALF_HEIGHT[CYLINDER] - z) / c, 0, 1)  # above the obstacle from here on
    along = np.clip((x * a + y * b) / (a * a + b * b), 0, over)
    x, y = x - along * a, y - along * b
    return np.sqrt(x * x + y * y) - np.float32(RADIUS), along


def _past_cube(obstacle: Obstacle, toward: Vector) -> tuple[np.ndarray, np.ndarray]:
    """Use the separating axes of the cube's base and the part of the line below the cube's top."""
    (x, y), (a, b) = _turn(obstacle.turn, obstacle.offset), _turn(obstacle.turn, toward)
    over = np.clip((2 * HALF_HEIGHT[CUBE] - obstacle.offset[2]) / toward[2], 0, 1)
    half_a, half_b = HALF * over * a, HALF * over * b
    mid_x, mid_y = half_a - x, half_b - y
    square = a * a + b * b
    across = (np.abs(mid_x * b - mid_y * a) - HALF_SIDE * (np.abs(a) + np.abs(b))) / np.sqrt(square)
    apart_x = np.abs(mid_x) - np.abs(half_a) - HALF_SIDE
    apart_y = np.abs(mid_y) - np.abs(half_b) - HALF_SIDE
    return np.maximum(across, np.maximum(apart_x, apart_y)), np.clip((x * a + y * b) / square, 0, over)


_CLEARANCE = {CUBE: _past_cube, SPHERE: _past_sphere, CYLINDER: _past_cylinder}


def _turn(turn: tuple[np.ndarray, np.ndarray], vector: Vector) -> tuple[np.ndarray, np.ndarray]:
    cos, sin = turn
    return cos * vector[0] + sin * vector[1], cos * vector[1] - sin * vector[0]


def _rows(vector: Vector, rows: np.ndarray) -> Vector:
    x, y, z = (part if part.shape[0] == 1 else part[rows] for part in vector)
    return x, y, z
