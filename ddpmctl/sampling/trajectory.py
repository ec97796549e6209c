"""Trajectories: every frame from pure noise to the finished images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ddpmctl.progress import Progress
from ddpmctl.sampling.pipeline import Painter, Progressing, Request, to_uint8


@dataclass(frozen=True)
class Moment:
    """One moment of sampling: uint8 pictures (rows, H, W, 3) of x_t, and of x0_hat where there is one yet."""

    t: int
    x_t: npt.NDArray[np.uint8]
    x0_hat: npt.NDArray[np.uint8] | None


@dataclass(frozen=True)
class Way:
    """The way of one picture from noise to image.

    Attributes:
        title: what stands left of it.
        x_t: uint8 pictures (H, W, 3), from t = T to t = 0.
        x0_hat: the same of x0_hat, None at the moment of pure noise.
        notes: a text for each moment, such as a classifier's confidence in x0_hat; a comma begins a new line.
    """

    title: str
    x_t: Sequence[npt.NDArray[np.uint8]]
    x0_hat: Sequence[npt.NDArray[np.uint8] | None]
    notes: Sequence[str]


def record(painter: Painter, requests: Sequence[Request]) -> Progressing[list[Moment]]:
    """Yield progress and return every moment of one batch, from pure noise to the finished pictures."""
    moments: list[Moment] = []
    yield Progress("sampling", 0, painter.steps)
    for frame in painter.frames(requests):
        x_t, x0_hat = (to_uint8(images).permute(0, 2, 3, 1).contiguous().numpy() for images in (frame.x_t, frame.x0_hat))
        moments.append(Moment(frame.t, x_t, None if frame.pure_noise else x0_hat))
        yield Progress("sampling", len(moments) - 1, painter.steps)
    return moments
