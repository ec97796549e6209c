"""The probability that a noisy image shows the requested objects, as estimated by the denoising network itself."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ddpmctl.config import Config
from ddpmctl.errors import UsageError
from ddpmctl.nets.recognition import FoundObjects, log_probability_of_number, none_or_one, none_or_some
from ddpmctl.registry import NETWORKS
from ddpmctl.task import Task


@runtime_checkable
class Recogniser(Protocol):
    """A network that recognises the objects in x_t."""

    def find_objects(self, x_t: Tensor, time: Tensor) -> FoundObjects:
        """Return which objects x_t (B, 3, H, W) at t / T (B,) shows in each cell of a grid, and how many, if the network counts them."""


def recognises_objects(net: str) -> bool:
    """Return whether a registered network recognises the objects in x_t; see ``Recogniser``."""
    return hasattr(NETWORKS.get(net), "find_objects")


def require_recogniser(config: Config) -> None:
    """Check that the network learns to recognise objects if ``particles`` is more than 1: the choice between particles needs it.

    Raises:
        UsageError: it does not.
    """
    if config.sampling.particles == 1:
        return
    if not recognises_objects(config.model.net):
        raise UsageError(f"--particles: the network {config.model.net} does not recognise objects; give --particles 1")
    if config.training.label_loss == 0:
        raise UsageError("--particles: a network trained with --label-loss 0 does not recognise objects; give --particles 1")


def log_probability_of_labels(net: Recogniser, x_t: Tensor, labels: Tensor, time: Tensor, task: Task) -> Tensor:
    """Return the log-probability that x_t (B, 3, H, W) at t / T (B,) shows what ``labels`` (B, C) request and nothing else, (B,).

    An object that is not requested must be absent, and a requested one must be there exactly once; where the network counts objects, their number must
    be right too. Labels that are just names may be seen any number of times.
    """
    found = net.find_objects(x_t, time)
    absent, present = (none_or_one if task.names_objects else none_or_some)(found.logits.float()).unbind(1)
    total = torch.where(labels > 0, present, absent).sum(1)
    if task.names_objects and found.number is not None:
        total = total + log_probability_of_number(found.number, labels.sum(1))
    return total
