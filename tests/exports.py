"""Checkpoints to export, for tests."""

from __future__ import annotations

from pathlib import Path

import torch

from ddpmctl.checkpoints.format import Checkpoint, load_checkpoint, save_checkpoint
from ddpmctl.config import Config
from ddpmctl.presets import PRESETS
from ddpmctl.task import Task
from ddpmctl.training.trainer import make_network

HOSTILE = Task(('a </script><img src=x onerror=alert(1)>, "b"', "`c`| ```"), 32, ("test",))


def random_checkpoint(path: Path, task: Task, **settings: object) -> Checkpoint:
    torch.manual_seed(0)
    config = Config().replace(**{**PRESETS["quick"], "width": 16, "sampler": "ddim", "steps": 3, **settings})  # type: ignore[arg-type]
    net = make_network(config, task)
    for parameter in net.parameters():  # layers that start at zero would hide differences
        torch.nn.init.normal_(parameter, std=0.05)
    save_checkpoint(path, config, net.state_dict(), task, epoch=3)
    return load_checkpoint(path)


def finished(task: object) -> object:
    while True:
        try:
            next(task)  # type: ignore[call-overload]
        except StopIteration as end:
            return end.value
