"""Which objects an image shows, from maps of logits (B, C, H, W): one logit for each class and each cell of a coarse grid."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

AN_OBJECT = 2.0  # logit of a peak that is an object as likely as not; measured in docs/experiments.md
TIE = 1e-4  # added over all cells; far less than logits differ by


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
