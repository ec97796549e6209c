"""Rounding of weights to float16, which halves their size. The rounded weights are then the ones that are compared, scored and exported."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ddpmctl.checkpoints.exported import write_exported
from ddpmctl.checkpoints.format import Checkpoint, load_checkpoint
from ddpmctl.checkpoints.names import WEIGHTS
from ddpmctl.errors import DataError


def halved(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """Write a checkpoint with weights rounded to float16 into a folder, and return it; its network still calculates in float32.

    Raises:
        DataError: a weight is too large for float16.
    """
    weights = as_half(checkpoint)
    if large := [name for name, value in weights.items() if not torch.isfinite(value).all()]:
        raise DataError(f"{checkpoint.path}: --half: {large[0]} has values over 65504, the largest of float16")
    folder.mkdir(parents=True, exist_ok=True)
    write_exported(folder, checkpoint, weights)
    return load_checkpoint(folder / WEIGHTS)


def as_half(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the weights of a checkpoint, with every floating-point tensor as float16."""
    return {name: value.half() if value.is_floating_point() else value for name, value in checkpoint.weights.items()}


def is_half(checkpoint: Checkpoint) -> bool:
    """Return whether all weights are float16 numbers, as those of ``halved``; once loaded, they are stored as float32."""
    return all(torch.equal(value, half) for value, half in zip(checkpoint.weights.values(), as_half(checkpoint).values(), strict=True))
