"""How processes find each other in a store that remembers earlier ones."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import torch.distributed as dist

from ddpmctl.distributed.job import meeting

from .launch import several

pytestmark = several


def names(port: int, size: int, late: float = 0) -> set[str]:
    """Let all ranks meet in the store at a port, the last of them so many seconds late."""

    def come(rank: int) -> str:
        time.sleep(late if rank == size - 1 else 0)
        return meeting(dist.TCPStore("localhost", port, is_master=False), rank, size)

    with ThreadPoolExecutor(size) as processes:
        return set(processes.map(come, range(size)))


def test_all_go_by_one_name_and_after_a_restart_by_another() -> None:
    """The launcher's store remembers; each time another number of processes may come, in any order."""
    launcher = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    found = [names(launcher.port, size, late) for size, late in ((3, 0.0), (3, 0.3), (2, 0.3), (3, 0.3))]
    assert [len(each) for each in found] == [1, 1, 1, 1]
    assert len(set.union(*found)) == 4


def test_a_token_of_a_dead_process_is_not_taken_for_its_successors() -> None:
    """Rank 0 answered the token before the successor posted its own."""
    launcher = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    launcher.set("token/1", "of a dead process")
    (name,) = names(launcher.port, 2, late=0.3)
    assert launcher.get("answer/1").decode().endswith(f" {name}")
