"""Trajectories: all frames from pure noise to the final images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ddpmctl.progress import Progress
from ddpmctl.sampling.pipeline import ImageRequest, Progressing, SamplingPipeline, to_uint8


@dataclass(frozen=True)
class RecordedFrame:
    """One frame: x_t and x0_hat as uint8 images (B, H, W, 3); x0_hat is None for pure noise."""

    t: int
    x_t: npt.NDArray[np.uint8]
    x0_hat: npt.NDArray[np.uint8] | None


@dataclass(frozen=True)
class Trajectory:
    """The frames of one image from noise (t = T) to t = 0.

    Attributes:
        title: the row title.
        x_t: uint8 images (H, W, 3).
        x0_hat: uint8 images (H, W, 3), None for pure noise.
        notes: a caption for each frame; a comma starts a new line.
    """

    title: str
    x_t: Sequence[npt.NDArray[np.uint8]]
    x0_hat: Sequence[npt.NDArray[np.uint8] | None]
    notes: Sequence[str]


def record(pipeline: SamplingPipeline, requests: Sequence[ImageRequest]) -> Progressing[list[RecordedFrame]]:
    """Yield progress and return all frames of one batch, from the noise of the requests; with several particles, ``choose`` comes first."""
    frames: list[RecordedFrame] = []
    yield Progress("sampling", 0, pipeline.steps)
    for frame in pipeline.frames(requests):
        x_t, x0_hat = (to_uint8(images).permute(0, 2, 3, 1).contiguous().numpy() for images in (frame.x_t, frame.x0_hat))
        frames.append(RecordedFrame(frame.t, x_t, None if frame.pure_noise else x0_hat))
        yield Progress("sampling", len(frames) - 1, pipeline.steps)
    return frames
