"""The way from noise to image as a grid or a GIF."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ddpmctl.report.grids import draw_sheet, save_gif, save_sheet

LONGEST_GIF = 60  # frames; more only makes the file large


@dataclass(frozen=True)
class Moment:
    """One moment of sampling: uint8 pictures (rows, H, W, 3) of x_t, and of x0_hat where there is one yet."""

    t: int
    x_t: npt.NDArray[np.uint8]
    x0_hat: npt.NDArray[np.uint8] | None


def save_denoise_grid(path: Path, moments: Sequence[Moment], titles: Sequence[str], *, columns: int, with_x0: bool = False) -> Path:
    """Write ``columns`` of the moments, evenly spaced and with both ends, as one PNG.

    Args:
        path: the PNG file.
        moments: from t = T to t = 0.
        titles: the label sets, one a row.
        columns: moments to show, at most all of them.
        with_x0: a second row under each with x0_hat.
    """
    shown = _evenly(moments, columns)
    rows, names = _rows(shown, titles, with_x0=with_x0)
    return save_sheet(path, rows, row_titles=names, column_titles=[f"t = {moment.t}" for moment in shown])


def save_denoise_gif(path: Path, moments: Sequence[Moment], titles: Sequence[str], *, with_x0: bool = False) -> Path:
    """Write the moments as a GIF, the label sets side by side."""
    frames = []
    for moment in _evenly(moments, LONGEST_GIF):
        pictures = [list(moment.x_t)]
        if with_x0:
            pictures.append(list(_x0(moment)))
        captions = [[""] * len(titles)] * (len(pictures) - 1) + [list(titles)]
        frames.append(draw_sheet(pictures, captions=captions))
    return save_gif(path, frames)


def _evenly(moments: Sequence[Moment], count: int) -> list[Moment]:
    positions = np.linspace(0, len(moments) - 1, min(count, len(moments)))
    return [moments[round(position)] for position in positions]


def _rows(moments: Sequence[Moment], titles: Sequence[str], *, with_x0: bool) -> tuple[list[list[npt.NDArray[np.uint8]]], list[str]]:
    rows, names = [], []
    for number, title in enumerate(titles):
        rows.append([moment.x_t[number] for moment in moments])
        names.append(title)
        if with_x0:
            rows.append([_x0(moment)[number] for moment in moments])
            names.append("x0_hat")
    return rows, names


def _x0(moment: Moment) -> npt.NDArray[np.uint8]:
    return np.full_like(moment.x_t, 255) if moment.x0_hat is None else moment.x0_hat
