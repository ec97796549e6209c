"""Agreement of the processes of a job on a prefix for their keys in the launcher's store, also after a restart."""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

CONNECT_SECONDS = 300


def meeting(store: Store, rank: int, size: int) -> str:
    """Return a prefix for this job's keys, equal on all processes and never used before.

    The launcher's store outlives restarts, and values from before a restart must not be read after it. So each process posts a random
    token and takes the prefix that rank 0 posts in answer to that token; rank 0 answers until every process has acknowledged the prefix.

    Raises:
        RuntimeError: a process did not come within CONNECT_SECONDS.
    """
    own, until = uuid.uuid4().hex, time.monotonic() + CONNECT_SECONDS
    if rank > 0:
        store.set(f"token/{rank}", own)
        while True:
            token, _, name = _read(store, f"answer/{rank}").partition(" ")
            if token == own:
                store.set(f"{name}/met/{rank}", "")
                return name
            _nap("rank 0", until)
    answered: dict[int, str] = {}
    while missing := [other for other in range(1, size) if not store.check([f"{own}/met/{other}"])]:
        for other in missing:
            token = _read(store, f"token/{other}")
            if token != answered.get(other, ""):  # another token: a process that was restarted meanwhile
                store.set(f"answer/{other}", f"{token} {own}")
                answered[other] = token
        _nap(f"rank {missing[0]}", until)
    return own


def _read(store: Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _nap(awaited: str, until: float) -> None:
    if time.monotonic() > until:
        raise RuntimeError(f"{awaited} did not answer in {CONNECT_SECONDS} s")
    time.sleep(0.01)
