"""The key prefix on which processes agree in a store that still has the keys of earlier processes."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import torch.distributed as dist

from ddpmctl.distributed.meeting import meeting

from .launch import several

pytestmark = several


def names(port: int, size: int, late: float = 0) -> set[str]:
    """Return the prefixes that the ranks agree on; the last rank starts ``late`` seconds later."""

    def come(rank: int) -> str:
        time.sleep(late if rank == size - 1 else 0)
        return meeting(dist.TCPStore("localhost", port, is_master=False), rank, size)

    with ThreadPoolExecutor(size) as processes:
        return set(processes.map(come, range(size)))


def test_all_ranks_agree_on_one_prefix_and_on_a_new_one_after_a_restart() -> None:
    """The launcher's store keeps all keys; after a restart the number of processes may differ, and they start in any order."""
    launcher = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    found = [names(launcher.port, size, late) for size, late in ((3, 0.0), (3, 0.3), (2, 0.3), (3, 0.3))]
    assert [len(each) for each in found] == [1, 1, 1, 1]
    assert len(set.union(*found)) == 4


def test_the_token_of_a_dead_process_is_not_used_for_the_restarted_one() -> None:
    """Rank 0 answers the old token before the restarted process posts its own."""
    launcher = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    launcher.set("token/1", "of a dead process")
    (name,) = names(launcher.port, 2, late=0.3)
    assert launcher.get("answer/1").decode().endswith(f" {name}")
