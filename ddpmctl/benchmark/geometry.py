"""The camera, the three solids, and ray intersection.

Units are Blender's, as in CLEVR: the floor is z = 0, objects are about one unit across. Image coordinates (u, v) are in image
widths from the centre, u to the right and v up; the view is 4:3, so u is in [-1/2, 1/2] and v in [-3/8, 3/8].
Intersections are computed in the solid's frame: base at the origin, a cube's faces along the axes.
Pixels use only +, -, *, / and sqrt, whose results do not depend on the other elements of an array.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CUBE, SPHERE, CYLINDER = range(3)  # class number // 8, see labels.SHAPES
RADIUS = 0.58  # of sphere and cylinder, and of a cube base's circumscribed circle
HALF_SIDE = np.float32(RADIUS / 2**0.5)
HALF_HEIGHT = np.array([HALF_SIDE, RADIUS, RADIUS], dtype=np.float32)  # by shape
FOCAL = 35 / 32  # Blender's default lens and sensor: 49.1 degrees horizontally
ASPECT = 3 / 4
WINDOW = 0.25  # image widths; the nearest solids are 0.22 wide

Vector = tuple[np.ndarray, np.ndarray, np.ndarray]  # x, y and z of many points, of equal shapes


@dataclass(frozen=True)
class Camera:
    """Pinhole cameras that look at the origin: float32 arrays, (..., 3) each."""

    eye: np.ndarray
    forward: np.ndarray
    right: np.ndarray
    up: np.ndarray

    @classmethod
    def at(cls, eye: np.ndarray) -> Camera:
        """Return the cameras at these positions, (..., 3)."""
        forward = -eye / np.linalg.norm(eye, axis=-1, keepdims=True)
        right = np.stack([forward[..., 1], -forward[..., 0], np.zeros_like(forward[..., 0])], axis=-1)
        right /= np.linalg.norm(right, axis=-1, keepdims=True)
        up = np.cross(right, forward)
        return cls(*(axis.astype(np.float32) for axis in (eye, forward, right, up)))

    def __getitem__(self, index: np.ndarray) -> Camera:
        """Return the cameras at these indices; repeats are allowed."""
        return Camera(self.eye[index], self.forward[index], self.right[index], self.up[index])

    def project(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return u, v and the depth along the view axis of points, (..., 3)."""
        offset = points - self.eye
        depth = (offset * self.forward).sum(-1)
        return FOCAL * (offset * self.right).sum(-1) / depth, FOCAL * (offset * self.up).sum(-1) / depth, depth

    def turned(self, position: np.ndarray, rotation: np.ndarray) -> Camera:
        """Return the cameras in the frames of objects at `position` (m, 2), rotated by `rotation` (m,) radians about z."""
        cos, sin = np.cos(rotation)[:, None], np.sin(rotation)[:, None]

        def turn(vector: np.ndarray) -> np.ndarray:
            x, y, z = vector[:, :1], vector[:, 1:2], vector[:, 2:]
            return np.concatenate([cos * x + sin * y, cos * y - sin * x, z], axis=1).astype(np.float32)

        shift = np.concatenate([position, np.zeros_like(position[:, :1])], axis=1)
        return Camera(turn(self.eye - shift), turn(self.forward), turn(self.right), turn(self.up))

    def rays(self, u: np.ndarray, v: np.ndarray) -> Vector:
        """Return the ray directions through columns `u` (m, w) and rows `v` (m, h): x, y and z, (m, h, w) each."""
        down = [self.forward[:, i, None] + v / FOCAL * self.up[:, i, None] for i in range(3)]
        across = [u / FOCAL * self.right[:, i, None] for i in range(3)]
        x, y, z = ((row[:, :, None] + column[:, None, :]).astype(np.float32) for row, column in zip(down, across, strict=True))
        return x, y, z


@dataclass(frozen=True)
class Solids:
    """Objects on the floor, one per lane."""

    shapes: np.ndarray  # (m,) int64: CUBE, SPHERE or CYLINDER
    positions: np.ndarray  # (m, 2), x and y of the base's centre
    rotations: np.ndarray  # (m,) radians about z


@dataclass(frozen=True)
class Windows:
    """For each lane, the image window that contains its solid, and the ray distances in it."""

    left: np.ndarray  # (m,) int64, first column
    top: np.ndarray  # (m,) int64, first row
    eye: Vector  # (m, 1, 1) each, in the solid's frame
    ray: Vector  # (m, rows, columns) each, in the solid's frame, through the sample centres
    distance: np.ndarray  # (m, rows, columns) float32, in ray lengths; infinite where the ray misses the solid

    def pixels(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the index arrays of the windows in an image array (m, height, width), for one sample per pixel."""
        lanes, rows, columns = self.distance.shape
        down, across = self.top[:, None] + np.arange(rows), self.left[:, None] + np.arange(columns)
        return np.arange(lanes)[:, None, None], down[:, :, None], across[:, None, :]


def cast_windows(camera: Camera, solids: Solids, *, width: int, height: int, supersample: int = 1) -> Windows:
    """Cast `supersample`^2 rays per pixel through a window around each solid; camera and solids have m lanes."""
    columns, rows = window_size(width, height)
    middle = np.concatenate([solids.positions, HALF_HEIGHT[solids.shapes, None]], axis=1)
    u, v, _ = camera.project(middle)
    left = np.clip(np.rint((u + 0.5) * width - columns / 2).astype(np.int64), 0, width - columns)
    top = np.clip(np.rint((0.5 - v / ASPECT) * height - rows / 2).astype(np.int64), 0, height - rows)
    local = camera.turned(solids.positions, solids.rotations)
    ray = local.rays(
        pixel_columns(left * supersample, columns * supersample, width * supersample), pixel_rows(top * supersample, rows * supersample, height * supersample)
    )
    eye = (local.eye[:, 0, None, None], local.eye[:, 1, None, None], local.eye[:, 2, None, None])
    distance = np.empty_like(ray[0])
    for shape in (CUBE, SPHERE, CYLINDER):
        lanes = np.flatnonzero(solids.shapes == shape)
        distance[lanes] = hit_distance(shape, _pick(eye, lanes), _pick(ray, lanes))
    return Windows(left, top, eye, ray, distance)


def window_size(width: int, height: int) -> tuple[int, int]:
    """Return the columns and rows, in pixels, that are enough for any solid of the benchmark."""
    return min(width, int(np.ceil(WINDOW * width)) + 1), min(height, int(np.ceil(WINDOW / ASPECT * height)) + 1)


def _pick(vector: Vector, lanes: np.ndarray) -> Vector:
    return vector[0][lanes], vector[1][lanes], vector[2][lanes]


def pixel_columns(first: np.ndarray, count: int, width: int) -> np.ndarray:
    """Return u at the centres of `count` columns from `first` (m,) in an image of `width` columns, (m, count)."""
    return (((first[:, None] + np.arange(count)) + 0.5) / width - 0.5).astype(np.float32)


def pixel_rows(first: np.ndarray, count: int, height: int) -> np.ndarray:
    """Return v at the centres of `count` rows from `first` (m,) in an image of `height` rows, (m, count)."""
    return ((0.5 - ((first[:, None] + np.arange(count)) + 0.5) / height) * ASPECT).astype(np.float32)


def hit_distance(shape: int, eye: Vector, ray: Vector) -> np.ndarray:
    """Return the distance to the solid in ray lengths; infinite where the ray misses it."""
    half = HALF_HEIGHT[shape]
    spans = {
        CUBE: lambda: [_slab_span(eye[0], ray[0], HALF_SIDE), _slab_span(eye[1], ray[1], HALF_SIDE), _slab_span(eye[2] - half, ray[2], half)],
        SPHERE: lambda: [_sphere_span(eye, ray)],
        CYLINDER: lambda: [_circle_span(eye, ray), _slab_span(eye[2] - half, ray[2], half)],
    }[shape]()
    near, far = spans[0]
    for enter, leave in spans[1:]:
        near, far = np.maximum(near, enter), np.minimum(far, leave)
    return np.where(near < far, near, np.float32(np.inf))


def surface_normal(shape: int, point: Vector) -> Vector:
    """Return the outward unit normal at surface points, in the solid's frame."""
    x, y, z = point
    if shape == SPHERE:
        return x / RADIUS, y / RADIUS, z / RADIUS - 1
    top = z > 2 * HALF_HEIGHT[shape] - 1e-3
    if shape == CYLINDER:
        return np.where(top, 0, x / RADIUS), np.where(top, 0, y / RADIUS), top.astype(np.float32)
    along_x = ~top & (np.abs(x) > np.abs(y))
    along_y = ~top & ~along_x
    return np.where(along_x, np.sign(x), 0), np.where(along_y, np.sign(y), 0), top.astype(np.float32)


def _slab_span(eye: np.ndarray, ray: np.ndarray, half: np.float32) -> tuple[np.ndarray, np.ndarray]:
    inverse = 1 / np.where(np.abs(ray) < 1e-6, np.float32(1e-6), ray)
    middle, reach = -eye * inverse, np.abs(inverse) * half
    return middle - reach, middle + reach


def _circle_span(eye: Vector, ray: Vector) -> tuple[np.ndarray, np.ndarray]:
    a = ray[0] * ray[0] + ray[1] * ray[1]
    b = -(eye[0] * ray[0] + eye[1] * ray[1])
    return _roots(a, b, eye[0] * eye[0] + eye[1] * eye[1] - np.float32(RADIUS**2))


def _sphere_span(eye: Vector, ray: Vector) -> tuple[np.ndarray, np.ndarray]:
    height = eye[2] - np.float32(RADIUS)
    a = ray[0] * ray[0] + ray[1] * ray[1] + ray[2] * ray[2]
    b = -(eye[0] * ray[0] + eye[1] * ray[1] + height * ray[2])
    return _roots(a, b, eye[0] * eye[0] + eye[1] * eye[1] + height * height - np.float32(RADIUS**2))


def _roots(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Solve a t^2 - 2 b t + c = 0; return an empty span if there is no real root."""
    square = b * b - a * c
    root = np.sqrt(np.maximum(square, 0))
    return (b - root) / a, np.where(square > 0, (b + root) / a, -np.float32(np.inf))
