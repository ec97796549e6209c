"""Weights rounded to float16: half the size. What is exported, proven and scored is then the rounded checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ddpmctl.checkpoints.exported import write_exported
from ddpmctl.checkpoints.format import Checkpoint, load_checkpoint
from ddpmctl.checkpoints.names import WEIGHTS
from ddpmctl.errors import DataError


def halved(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """Write a checkpoint into a folder, its weights rounded to float16, and return that one; networks still calculate in float32.

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
    """Return the weights with float16 for every floating type."""
    return {name: value.half() if value.is_floating_point() else value for name, value in checkpoint.weights.items()}


def is_half(checkpoint: Checkpoint) -> bool:
    """Return whether float16 holds the weights without rounding, as those of ``halved``; a loaded checkpoint has them in float32."""
    return all(torch.equal(value, half) for value, half in zip(checkpoint.weights.values(), as_half(checkpoint).values(), strict=True))
