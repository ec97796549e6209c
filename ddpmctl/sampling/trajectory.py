"""Trajectories: every frame from pure noise to the finished images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ddpmctl.progress import Progress
from ddpmctl.sampling.pipeline import ImageRequest, Progressing, SamplingPipeline, to_uint8


@dataclass(frozen=True)
class RecordedFrame:
    """One moment of sampling: uint8 pictures (rows, H, W, 3) of x_t, and of x0_hat where there is one yet."""

    t: int
    x_t: npt.NDArray[np.uint8]
    x0_hat: npt.NDArray[np.uint8] | None


@dataclass(frozen=True)
class Trajectory:
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


def record(pipeline: SamplingPipeline, requests: Sequence[ImageRequest]) -> Progressing[list[RecordedFrame]]:
    """Yield progress and return every moment of one batch, from pure noise to the finished pictures."""
    frames: list[RecordedFrame] = []
    yield Progress("sampling", 0, pipeline.steps)
    for frame in pipeline.frames(requests):
        x_t, x0_hat = (to_uint8(images).permute(0, 2, 3, 1).contiguous().numpy() for images in (frame.x_t, frame.x0_hat))
        frames.append(RecordedFrame(frame.t, x_t, None if frame.pure_noise else x0_hat))
        yield Progress("sampling", len(frames) - 1, pipeline.steps)
    return frames
