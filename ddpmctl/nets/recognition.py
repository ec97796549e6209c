"""Which objects an image shows, from maps of logits (B, C, H, W), one for each class and each cell of a coarse grid; and how many, from features."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpmctl.nets.unet import ChannelNorm

AN_OBJECT = 2.0  # logit of a peak that is an object as likely as not; measured in docs/experiments.md
TIE = 1e-4  # added over all cells; far less than logits differ by
COUNT_CHANNELS = 64
FIRST_DENSITY = -3.0  # softplus of it is 0.05 objects in each cell, a few in 8x8
COUNT_ERROR = 0.3  # standard deviation of ``ObjectCount``, in objects; measured in docs/experiments.md
OTHER_NUMBERS = 3  # so many whole numbers to each side are compared with the one that is asked for


class ObjectCount(nn.Module):
    """How many objects an image shows, of whatever class: the sum of a density over the cells of a coarse grid (Lempitsky & Zisserman 2010).

    Peaks of one class cannot tell two objects in neighbouring cells from one, nor an extra object that is taken for no class with certainty. A sum also
    counts one object more than any training image shows.
    """

    def __init__(self, channels: int, act: type[nn.Module]) -> None:
        """Create the layers, for features of so many channels."""
        super().__init__()
        self.density = nn.Sequential(ChannelNorm(channels), nn.Conv2d(channels, COUNT_CHANNELS, 1), act(), nn.Conv2d(COUNT_CHANNELS, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, C, H, W) to the number of objects, (B,), in float32."""
        return F.softplus(self.density(features).float() + FIRST_DENSITY).sum((1, 2, 3))


def log_probability_of_number(counted: Tensor, number: Tensor) -> Tensor:
    """Return the log-probability that an image shows ``number`` objects, (B,), if ``ObjectCount`` finds ``counted``, (B,).

    Every whole number from 0 on is equally likely before, and the error of the count is normal with ``COUNT_ERROR``.
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
