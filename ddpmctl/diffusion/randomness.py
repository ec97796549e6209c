"""Random numbers as a pure function of (seed, purpose, index).

Each image has its own generator on the CPU, so its noise does not depend on the batch, on earlier draws or on the device.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch
from torch import Tensor

Key = tuple[int | str, ...]


def derived_seed(seed: int, purpose: str, *index: int | str) -> int:
    """Return a 63-bit seed; different (seed, purpose, index) give independent streams."""
    text = json.dumps((seed, purpose, *index))  # JSON, because names may contain any separator
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, purpose: str, *index: int | str, device: str | torch.device = "cpu") -> torch.Generator:
    """Return a new generator for (seed, purpose, index)."""
    return torch.Generator(device).manual_seed(derived_seed(seed, purpose, *index))


class ImageNoise:
    """Standard normal noise for a batch of images, with one independent stream per image.

    Args:
        keys: one (seed, index, ...) per image; equal keys give equal noise in any batch.
        shape: shape of one image, e.g. (3, 64, 64).
        device: the device of the returned noise.
    """

    def __init__(self, keys: Sequence[Key], shape: tuple[int, ...], device: torch.device) -> None:
        """Seed one generator per image."""
        self.shape, self.device = shape, device
        self._generators = [generator(int(seed), "image", *index) for seed, *index in keys]

    def __call__(self) -> Tensor:
        """Return the next noise of every image, (B, *shape)."""
        return torch.stack([torch.randn(self.shape, generator=g) for g in self._generators]).to(self.device)
