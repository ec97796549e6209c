"""Room on the disk: what a whole run is going to need, before its first step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ddpmctl.config import Config
from ddpmctl.errors import UsageError
from ddpmctl.files import in_bytes, need_room
from ddpmctl.registry import NETWORKS

GRID_BYTES = 800_000  # the two sample grids of one score
MOMENTS = {"muon": 1}  # numbers an optimizer keeps for each weight; the others are kinds of Adam and keep two


@dataclass(frozen=True)
class Room:
    """What a run needs on the disk.

    Attributes:
        checkpoints: how many scored ones there will be at a time; for a budget in minutes at least one.
        checkpoint_bytes, state_bytes: of one file.
    """

    checkpoints: int
    checkpoint_bytes: int
    state_bytes: int

    @property
    def total(self) -> int:
        """Bytes in all; the state is there twice while it is written."""
        return self.checkpoints * (self.checkpoint_bytes + GRID_BYTES) + 2 * self.state_bytes

    def __str__(self) -> str:
        """Return the need in words."""
        return f"about {in_bytes(self.total)}: {self.checkpoints} checkpoint{'s' * (self.checkpoints != 1)} of {in_bytes(self.checkpoint_bytes)} and the state"


def room_for(config: Config) -> Room:
    """Return what a run of these settings needs, from the size of its network."""
    with torch.device("meta"):
        net = NETWORKS.get(config.model.net)(config.model)
    weights = sum(value.numel() * value.element_size() for value in net.state_dict().values())
    training = config.training
    scored = 1 if training.epochs is None else -(-training.epochs // training.save_every)
    kept = scored if config.run.keep is None else min(scored, config.run.keep + 3)  # the best, the last, and one more while it is written
    copies = 1 + (training.ema is not None) + MOMENTS.get(training.optimizer, 2)
    return Room(kept, weights, copies * weights)


def check_room(config: Config, folder: Path, *, already: int = 0) -> None:
    """Refuse a run that will not fit on the disk of ``folder``, of whose checkpoints ``already`` are there.

    Raises:
        UsageError: says what is needed and what is free.
    """
    room = room_for(config)
    size = max(0, room.total - already * room.checkpoint_bytes)
    try:
        need_room(folder, size, "for the whole run")
    except UsageError as error:
        raise UsageError(f"{error} with --runs-dir, or keep fewer of the {room.checkpoints} checkpoints with --keep") from None
