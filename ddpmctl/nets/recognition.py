"""What maps of logits, (B, C, H, W), say of the objects in an image: each value is the logit that a cell shows an object of a class."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

AN_OBJECT = 2.0  # logit of a peak that is an object as likely as not; measured in docs/experiments.md
TIE = 1e-4  # added over all cells; far less than logits differ by


def seen_anywhere(logits: Tensor) -> Tensor:
    """Return for each class the logarithm of the mean over all cells of exp(logit), (B, C): high if the class is seen anywhere."""
    cells = logits.flatten(2)
    return cells.logsumexp(2) - math.log(cells.shape[2])


def none_or_one(logits: Tensor) -> Tensor:
    """Return the log-probabilities (B, 2, C) that an image shows no object of a class, and exactly one.

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
    """Return the log-probabilities (B, 2, C) that an image does not show a class, and that it does."""
    seen = seen_anywhere(logits)
    return torch.stack((F.logsigmoid(-seen), F.logsigmoid(seen)), 1)
