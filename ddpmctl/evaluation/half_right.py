"""Check a classifier on images that are half right, on which it should be unsure: between two shapes, blurred, or half transparent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from ddpmctl.benchmark.half_right import exchanged_scenes
from ddpmctl.evaluation.classifiers import Classifier

SCENES = 300
SURE = 0.9
BLURS = (1.0, 2.0, 3.0)  # standard deviations in pixels


@dataclass(frozen=True)
class HalfRight:
    """The answers to one kind of image.

    Attributes:
        name: the kind.
        sure: the share of images in which one of the two shapes has a probability above ``SURE``.
        one_of_two: the share in which exactly one of the two shapes is found.
        images: their number.
    """

    name: str
    sure: float
    one_of_two: float
    images: int


def check_half_right(classifier: Classifier, scenes: int = SCENES, *, seed: int = 0) -> list[HalfRight]:
    """Return the answers about the last object of each scene: as it is, mixed with another shape in its place, blurred, and half transparent.

    The two shapes have the same colour. Scenes that already show the other shape in this colour are left out.
    """
    drawn = exchanged_scenes(scenes, seed=seed)
    without, whole, exchanged = (_centred(frames) for frames in (drawn.without, drawn.whole, drawn.exchanged))
    found = []
    for name, images in _kinds(whole, exchanged, without):
        outputs = classifier(images).numpy()
        one, other = (outputs[np.arange(len(outputs)), classes] for classes in (drawn.first, drawn.second))
        found.append(HalfRight(name, float((np.maximum(one, other) > SURE).mean()), float(((one > 0.5) ^ (other > 0.5)).mean()), len(outputs)))
    return found


def _kinds(whole: Tensor, exchanged: Tensor, without: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "as it is", whole
    for share in (0.25, 0.5):
        yield f"{100 * share:.0f} % of another shape", torch.lerp(whole, exchanged, share)
    for deviation in BLURS:
        yield f"blurred, {deviation:g} pixels", gaussian_blur(whole, [13, 13], [deviation, deviation])
    for opacity in (0.5, 0.25):
        yield f"{100 * opacity:.0f} % opaque", torch.lerp(without, whole, opacity)


def _centred(frames: np.ndarray) -> Tensor:
    """Return uint8 frames (N, H, W, 3) as float32 (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
