"""Which objects an image shows, from a logit for each class and each cell of a coarse grid, and how many objects, from the features of these cells."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpmctl.nets.unet import ChannelNorm

AN_OBJECT = 2.0  # logit of a peak that is an object as likely as not; measured in docs/experiments.md
TIE = 1e-4  # added over all cells; far less than logits differ by
COUNT_CHANNELS = 64
FIRST_DENSITY = -3.0  # softplus of it is 0.05 objects in each cell, a few in 8x8
COUNT_ERROR = 0.3  # standard deviation of ``ObjectCount``, in objects; measured in docs/experiments.md
OTHER_NUMBERS = 3  # fewer and more than the requested number that are compared with it; others change nothing that matters


class FoundObjects(NamedTuple):
    """What a network recognises in noisy images.

    Attributes:
        logits: one for each class and cell, (B, C, h, w).
        number: how many objects each image shows, of all classes together, not rounded, (B,); None for a network that does not count.
    """

    logits: Tensor
    number: Tensor | None = None


class ObjectCount(nn.Module):
    """Count the objects in an image, of all classes together: a density in each cell of a coarse grid, summed over the cells (Lempitsky & Zisserman 2010).

    ``none_or_one`` looks for the peaks of one class. It takes two objects in neighbouring cells for one, and misses an extra object whose class is
    uncertain. A sum sees both, also in an image with more objects than any training image has.
    """

    def __init__(self, channels: int, act: type[nn.Module]) -> None:
        """Create the layers; ``channels`` is the number of channels of the features."""
        super().__init__()
        self.density = nn.Sequential(ChannelNorm(channels), nn.Conv2d(channels, COUNT_CHANNELS, 1), act(), nn.Conv2d(COUNT_CHANNELS, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, channels, h, w) to the number of objects in each image, (B,), not rounded, in float32."""
        return F.softplus(self.density(features).float() + FIRST_DENSITY).sum((1, 2, 3))


def log_probability_of_number(counted: Tensor, number: Tensor) -> Tensor:
    """Return the log-probability that an image shows ``number`` objects, (B,), given the count ``counted`` of ``ObjectCount``, (B,).

    The posterior for a uniform prior over the whole numbers from 0 on, and a normal error of the count with the standard deviation ``COUNT_ERROR``.
    """
    away = torch.arange(-OTHER_NUMBERS, OTHER_NUMBERS + 1, device=counted.device)
    logits = -((counted - number)[:, None] - away).square() / (2 * COUNT_ERROR**2)
    logits = logits.masked_fill(number[:, None] + away < 0, -torch.inf)
    return logits.log_softmax(1)[:, OTHER_NUMBERS]


def seen_anywhere(logits: Tensor) -> Tensor:
    """Return one logit for each class and image, (B, C): the log of the mean of exp(logit) over all cells. It is high if any cell's logit is."""
    cells = logits.flatten(2)
    return cells.logsumexp(2) - math.log(cells.shape[2])


def none_or_one(logits: Tensor) -> Tensor:
    """Return for each class the log-probabilities (B, 2, C) that the image shows no object of it, and that it shows exactly one.

    A cell may be an object if no neighbour's logit is higher: an object covers several cells, and two objects are two such peaks. Each peak is an
    object or not, independently of the others: log P(none) is the sum of log(1 - p), and P(one) is P(none) times the sum of p / (1 - p).
    """
    height, width = logits.shape[2:]
    order = torch.arange(height * width, device=logits.device).view(height, width)
    logits = logits - AN_OBJECT + TIE / (height * width) * order  # in bf16, neighbours are often equal: then, the later one is the peak
    peaks = (logits == F.max_pool2d(logits, 3, stride=1, padding=1)).flatten(2)
    logits = logits.flatten(2)
    none = (F.logsigmoid(-logits) * peaks).sum(2)
    return torch.stack((none, none + logits.masked_fill(~peaks, -torch.inf).logsumexp(2)), 1)


def none_or_some(logits: Tensor) -> Tensor:
    """Return for each class the log-probabilities (B, 2, C) that the image does not show it, and that it does."""
    seen = seen_anywhere(logits)
    return torch.stack((F.logsigmoid(-seen), F.logsigmoid(seen)), 1)
