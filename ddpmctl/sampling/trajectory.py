"""Trajectories: all frames from pure noise to the final images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ddpmctl.diffusion.samplers import Frame
from ddpmctl.diffusion.schedules import Schedule
from ddpmctl.progress import Progress
from ddpmctl.sampling.pipeline import Progressing, SamplingPipeline, to_uint8
from ddpmctl.sampling.requests import ImageRequest

# The log SNR between which images appear in x_t: below, objects are lost in the noise; above, the noise is less than 4 of 256 grey levels.
APPEARING = (-3.0, 7.0)


@dataclass(frozen=True)
class RecordedFrame:
    """One frame: x_t and x0_hat as uint8 images (B, H, W, 3); x0_hat is None for pure noise. ``log_snr`` is that of x_t."""

    t: int
    log_snr: float
    x_t: npt.NDArray[np.uint8]
    x0_hat: npt.NDArray[np.uint8] | None


@dataclass(frozen=True)
class Trajectory:
    """The frames of one image from noise (t = T) to t = 0.

    Attributes:
        title: the row title, in one or several lines.
        x_t: uint8 images (H, W, 3).
        x0_hat: uint8 images (H, W, 3), None for pure noise.
        notes: a caption for each frame, in one or several lines.
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
        frames.append(as_recorded(frame, pipeline.diffusion.schedule))
        yield Progress("sampling", len(frames) - 1, pipeline.steps)
    return frames


def as_recorded(frame: Frame, schedule: Schedule) -> RecordedFrame:
    """Return a frame as uint8 images on the CPU."""
    x_t, x0_hat = (to_uint8(images).permute(0, 2, 3, 1).contiguous().numpy() for images in (frame.x_t, frame.x0_hat))
    return RecordedFrame(frame.t, float(schedule.log_snr[frame.t]), x_t, None if frame.pure_noise else x0_hat)


def spread(frames: Sequence[RecordedFrame], count: int) -> list[int]:
    """Return the indices of ``count`` frames to show: the first, the last, and others evenly spaced in log SNR where images appear in x_t.

    Most steps of most samplers lie where x_t is noise to the eye, or already clean. Even steps in log SNR are even steps in what can be seen. They
    depend on the schedule and the steps alone, so that figures of other checkpoints and seeds have the same columns; the change of x0_hat
    would have been another measure, but most of it happens while x_t still is noise.
    """
    last, places = len(frames) - 1, np.clip([frame.log_snr for frame in frames], *APPEARING)
    count = min(count, len(frames))
    chosen = [0]
    for number, goal in enumerate(np.linspace(*APPEARING, count)[1:-1], start=1):
        nearest = int(np.abs(places - goal).argmin())
        chosen.append(min(max(nearest, chosen[-1] + 1), last - (count - 1 - number)))  # none twice, and enough left for the others
    return [*chosen, last]
