"""Random numbers as a pure function of (seed, purpose, index).

The noise of image i does not depend on the batch that it is in, on what was drawn before, or
on the device: it is drawn on the CPU from a generator of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch
from torch import Tensor

Key = tuple[int | str, ...]


def derived_seed(seed: int, purpose: str, *index: int | str) -> int:
    """Return a 63-bit seed for one use; different (seed, purpose, index) give unrelated streams."""
    text = json.dumps((seed, purpose, *index))  # not joined by a sign that a name may hold: each cut has a text of its own
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, purpose: str, *index: int | str, device: str | torch.device = "cpu") -> torch.Generator:
    """Return a fresh generator seeded for one use."""
    return torch.Generator(device).manual_seed(derived_seed(seed, purpose, *index))


class ImageNoise:
    """Standard normal noise for a batch of images, one independent stream an image.

    Args:
        keys: one (seed, index, ...) per image; equal keys give equal noise in any batch.
        shape: of one image, e.g. (3, 64, 64).
        device: where the noise is needed.
    """

    def __init__(self, keys: Sequence[Key], shape: tuple[int, ...], device: torch.device) -> None:
        """Seed one generator an image."""
        self.shape, self.device = shape, device
        self._generators = [generator(int(seed), "image", *index) for seed, *index in keys]

    def __call__(self) -> Tensor:
        """Return the next noise of every image, (B, *shape)."""
        return torch.stack([torch.randn(self.shape, generator=g) for g in self._generators]).to(self.device)
