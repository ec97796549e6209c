"""Denoising trajectories as an image grid or a GIF."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from ddpmctl.grids import draw_sheet, save_gif, save_image
from ddpmctl.sampling.trajectory import RecordedFrame, Trajectory

T = TypeVar("T")
LONGEST_GIF = 60  # frames, to limit the file size


def save_denoise_grid(path: Path, times: Sequence[int], trajectories: Sequence[Trajectory], *, columns: int, with_x0: bool = False) -> Path:
    """Write ``columns`` evenly spaced frames of each trajectory as one PNG.

    Args:
        path: the PNG file.
        times: t of each frame, from T to 0.
        trajectories: one per row.
        columns: frames to show, including the first and the last.
        with_x0: add a row with x0_hat under each row.
    """
    shown = _evenly(range(len(times)), columns)
    rows, names, notes = [], [], []
    for trajectory in trajectories:
        below = [trajectory.notes[index] for index in shown]
        rows.append([trajectory.x_t[index] for index in shown])
        names.append(trajectory.title)
        notes.append([""] * len(shown) if with_x0 else below)
        if with_x0:
            rows.append([_white(trajectory.x_t[0]) if (clean := trajectory.x0_hat[index]) is None else clean for index in shown])
            names.append("x0_hat")
            notes.append(below)
    captions = notes if any(map(any, notes)) else None
    sheet = draw_sheet(rows, captions=captions, row_titles=names, column_titles=[f"t = {times[index]}" for index in shown])
    return save_image(path, sheet)


def save_denoise_gif(path: Path, frames: Sequence[RecordedFrame], titles: Sequence[str], *, with_x0: bool = False) -> Path:
    """Write the frames as a GIF, one column per label set."""
    sheets = []
    for frame in _evenly(frames, LONGEST_GIF):
        rows = [list(frame.x_t), *([list(_white(frame.x_t) if frame.x0_hat is None else frame.x0_hat)] if with_x0 else [])]
        captions = [[""] * len(titles)] * (len(rows) - 1) + [list(titles)]
        sheets.append(draw_sheet(rows, captions=captions))
    return save_gif(path, sheets)


def _evenly(items: Sequence[T], count: int) -> list[T]:
    positions = np.linspace(0, len(items) - 1, min(count, len(items)))
    return [items[round(position)] for position in positions]


def _white(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return np.full_like(image, 255)
