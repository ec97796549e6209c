"""How definite the faces of sampled cubes are.

Where a network denoises a cube towards the mean of all its rotations, the two faces run into each other, and the cube looks like a cylinder. Scores of
classes do not see it. So a network learns to tell the rotation of rendered cubes, as a point on a circle: of an image that shows a mixture of rotations,
it answers with a point inside of the circle.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpmctl.benchmark.raycast import render
from ddpmctl.benchmark.scenes import draw_scenes
from ddpmctl.checkpoints.format import load_checkpoint
from ddpmctl.config import Config
from ddpmctl.device import make_compute_device
from ddpmctl.evaluation.classifiers import Block, ConvNorm
from ddpmctl.evaluation.evaluate import pipeline_for
from ddpmctl.iclevr import CLASSES, COLOURS, SHAPES
from ddpmctl.sampling.pipeline import sample_images
from ddpmctl.sampling.requests import requests_for
from tests.benchmarks.data import finish

SEED = 8 * 2**32  # other scenes than those of training and of other measurements
SIDE = 20  # of a crop around a cube, in pixels
SATURATED = 40  # largest less smallest colour of a pixel that shows a coloured object, in grey levels
LEAST_PIXELS = 40  # of a cube whose faces can be told at 64x64
Figures = dict[str, Any]


class RotationNet(nn.Module):
    """Crops (B, 3, SIDE, SIDE) in [-1, 1] -> (cos 4r, sin 4r), (B, 2); r is a cube's rotation about the vertical, from the direction of the camera."""

    def __init__(self) -> None:
        """Initialise at random."""
        super().__init__()
        features = nn.Sequential(ConvNorm(3, 32, 3), nn.ReLU(), Block(32, 48), Block(48, 64, 2), Block(64, 96, 2), nn.Flatten())
        self.layers = nn.Sequential(features, nn.Linear(96 * (SIDE // 4) ** 2, 128), nn.ReLU(), nn.Linear(128, 2))

    def forward(self, crops: Tensor) -> Tensor:
        """Return the points."""
        points: Tensor = self.layers(crops)
        return points


def faces(checkpoints: Sequence[str], count: int, steps: int, scenes: int) -> Figures:
    """Train the network for ``steps`` steps on the cubes of ``scenes`` renders; return how definite the rotation of sampled cubes is.

    That is the mean distance of the network's points from the centre, at most 1, over single coloured cubes of at least ``LEAST_PIXELS`` pixels. *renders*
    is that of other renders, and *right* the mean cosine between their points and the true ones.
    """
    net = _trained(*_cubes(scenes, SEED)[:2], steps)
    images, truth, classes = _cubes(5 * count, SEED + 1)  # 7 of 24 scenes begin with a coloured cube
    images, truth, classes = images[:count], truth[:count], classes[:count]
    found: Figures = {"count": count, "renders": _definite(net, images), "right": float((F.normalize(_points(net, images)) * truth).sum(1).mean())}
    for path in checkpoints:
        pipeline = pipeline_for(load_checkpoint(Path(path)), {}, make_compute_device(Config().device))
        made = finish(sample_images(pipeline, requests_for("faces", [(CLASSES[index],) for index in classes.tolist()], seed=0)))
        found[Path(path).stem] = _definite(net, made)
    return found


def _cubes(scenes: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Render the scenes whose first object is a coloured cube, with this object only: images (N, 3, 64, 64), points (N, 2) and class numbers (N,)."""
    drawn = draw_scenes(scenes, seed=seed, triples="any")
    first = drawn.classes[:, 0]
    drawn = drawn[np.flatnonzero((first // len(COLOURS) == SHAPES.index("cube")) & (first % len(COLOURS) != COLOURS.index("gray")))]
    images = np.concatenate([part[:, 0] for part in render(drawn)]).transpose(0, 3, 1, 2)
    camera = drawn.eyes[:, :2] - drawn.positions[:, 0]
    angle = torch.from_numpy(4 * (drawn.rotations[:, 0] - np.arctan2(camera[:, 1], camera[:, 0]))).float()
    return torch.from_numpy(np.ascontiguousarray(images)), torch.stack((angle.cos(), angle.sin()), 1), torch.from_numpy(drawn.classes[:, 0])


def _trained(images: Tensor, points: Tensor, steps: int) -> RotationNet:
    crops, rng = _crops(images), torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = RotationNet().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.02)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (step + 1) / 100) * (1 - step / steps)
        chosen = torch.randint(len(crops), (64,), generator=rng)
        noise = 0.02 * torch.rand((64, 1, 1, 1), generator=rng) * torch.randn((64, 3, SIDE, SIDE), generator=rng)  # so that noise in samples matters little
        moved = torch.roll(crops[chosen], torch.randint(-1, 2, (2,), generator=rng).tolist(), (2, 3))
        loss = F.mse_loss(net(moved + noise), points[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


def _definite(net: RotationNet, images: Tensor) -> float:
    points = _points(net, images)[_saturated(images).sum((1, 2)) >= LEAST_PIXELS]
    return float(points.norm(dim=1).clamp(max=1).mean()) if len(points) else float("nan")


def _points(net: RotationNet, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.cat([net(part) for part in _crops(images).split(128)])


def _crops(images: Tensor) -> Tensor:
    """Cut out the surroundings of each image's saturated pixels, (N, 3, SIDE, SIDE) in [-1, 1]."""
    inside, place, half = _saturated(images), torch.arange(images.shape[-1]), SIDE // 2
    count = inside.sum((1, 2)).clamp(min=1)
    rows, columns = ((inside.sum(axis) * place).sum(1).div(count).round().long().tolist() for axis in (2, 1))
    padded = F.pad(images.float() / 127.5 - 1, (half, half, half, half), mode="replicate")
    return torch.stack([one[:, row : row + SIDE, column : column + SIDE] for one, row, column in zip(padded, rows, columns, strict=True)])


def _saturated(images: Tensor) -> Tensor:
    return images.amax(1).int() - images.amin(1).int() > SATURATED
