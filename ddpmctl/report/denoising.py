"""Denoising trajectories as an image grid or a GIF."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ddpmctl.grids import draw_sheet, save_gif, save_image
from ddpmctl.sampling.trajectory import RecordedFrame, Trajectory, spread

LONGEST_GIF = 60  # frames, to limit the file size


def save_denoise_grid(path: Path, times: Sequence[int], shown: Sequence[int], trajectories: Sequence[Trajectory], *, with_x0: bool = False) -> Path:
    """Write some frames of each trajectory as one PNG.

    Args:
        path: the PNG file.
        times: t of each frame, from T to 0.
        shown: the indices of the frames to show.
        trajectories: one per row.
        with_x0: add a row with x0_hat under each row, and the notes under it, which are about x0_hat.
    """
    rows, names, notes = [], [], []
    for trajectory in trajectories:
        rows.append([trajectory.x_t[index] for index in shown])
        names.append(trajectory.title)
        notes.append([""] * len(shown))
        if with_x0:
            rows.append([_white(trajectory.x_t[0]) if (clean := trajectory.x0_hat[index]) is None else clean for index in shown])
            names.append("x0_hat")
            notes.append([trajectory.notes[index] for index in shown])
    captions = notes if any(map(any, notes)) else None
    sheet = draw_sheet(rows, captions=captions, row_titles=names, column_titles=[_time(times[index]) for index in shown])
    return save_image(path, sheet)


def save_denoise_gif(path: Path, frames: Sequence[RecordedFrame], titles: Sequence[str], *, with_x0: bool = False) -> Path:
    """Write frames as a GIF: one column per label set, and the time t of each frame above them."""
    sheets = []
    for index in spread(frames, LONGEST_GIF):
        frame = frames[index]
        rows = [list(frame.x_t), *([list(_white(frame.x_t) if frame.x0_hat is None else frame.x0_hat)] if with_x0 else [])]
        captions = [[""] * len(titles)] * (len(rows) - 1) + [list(titles)]
        sheets.append(draw_sheet(rows, captions=captions, column_titles=[_time(frame.t)]))
    return save_gif(path, sheets)


def _time(t: int) -> str:
    return f"t = {t}"


def _white(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return np.full_like(image, 255)
