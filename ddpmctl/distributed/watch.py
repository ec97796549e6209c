"""Whether the other processes of a job answer, while this one waits for them; not imported by a single process.

A process that is frozen (SIGSTOP, a suspended machine) keeps its connections, so collectives wait for it. Their timeouts cannot tell it from a
process that works for long, such as rank 0 while it saves to a slow disk, and nccl's abort the process. So every process counts up a number in the
launcher's store, from a thread that goes on during any computation, and a process that waits reads the others' numbers. Its main thread is then
blocked in C++, where Python handles no signals. So the watching thread reads signals too, and ends the process by itself: nothing is half-written,
because a process that waits for others writes nothing.
"""

from __future__ import annotations

import contextlib
import os
import platform
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ddpmctl.config import RunConfig
from ddpmctl.errors import PeerError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

BEAT_SECONDS = 1.0
SIGNAL_SECONDS = 10.0  # without an answer after a signal, until this process stops by itself; torchrun kills it after 30
MENTION = 0.25  # of the timeout: without an answer for so long, a process is named
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Watch:
    """Two threads: one exchanges numbers with the other processes over the store, the other one judges who does not answer.

    Rank 0 watches all others, and they watch rank 0, which tells them when one of them is lost.

    Attributes:
        timeout: seconds without an answer after which a waiting process ends the job.
        kept: what a message about the end says about work that is kept.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        """Take the job's store, to which a second connection is made: the first one may be blocked for long."""
        self.timeout: float = RunConfig().peer_timeout
        self.kept = ""
        self._store, self._rank, self._size = store.clone(), rank, size
        self._watched = range(1, size) if rank == 0 else range(1)
        self._numbers, self._rounds = dict.fromkeys(self._watched, 0), 0  # the others' numbers, and how often they were read
        self._places: dict[int, str] = {}  # host and process id, by rank
        self._launcher, self._launcher_is_gone = os.getppid(), False
        self._waiting: object | None = None  # a new object each time that the main thread begins to wait

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """In the body, this process may wait for others."""
        self._waiting = object()
        try:
            yield
        finally:
            self._waiting = None

    def start(self, claim: Callable[[str], bool], say: Callable[[str], object], failed: Callable[[str], object], stopped: Callable[[int, str], object]) -> None:
        """Start the threads; only the main thread may call this.

        Args:
            claim: returns whether this process is the one that prints the end of the job.
            say: prints for whom this process waits.
            failed: prints that another process does not answer; the exit code is that of PeerError.
            stopped: prints the same after a signal, of which it gets the number; the exit code is 128 + the number.
        """
        self._claim, self._say, self._failed, self._stopped = claim, say, failed, stopped
        self._signals, written = socket.socketpair()
        written.settimeout(0)
        signal.set_wakeup_fd(written.detach(), warn_on_full_buffer=False)
        for work in (self._exchange, self._observe):
            threading.Thread(target=work, name=work.__name__, daemon=True).start()

    def _exchange(self) -> None:
        try:
            self._store.set(f"place/{self._rank}", f"{platform.node()} {os.getpid()}")
            while True:
                self._store.add(f"beat/{self._rank}", 1)
                self._numbers = {rank: self._store.add(f"beat/{rank}", 0) for rank in self._watched}
                for rank in self._watched:
                    if rank not in self._places and self._store.check([f"place/{rank}"]):
                        self._places[rank] = self._store.get(f"place/{rank}").decode()
                self._rounds += 1
                time.sleep(BEAT_SECONDS)
        except RuntimeError:  # the store has ended
            self._launcher_is_gone = True

    def _observe(self) -> None:
        last, received, sent = time.monotonic(), 0, False
        silence, stalled = dict.fromkeys(self._watched, 0.0), 0.0  # seconds without a new number, and without any answer of the store
        waiting, waited, signalled, told = self._waiting, 0.0, 0.0, False  # seconds of this wait, and of its part after a signal
        numbers, rounds = self._numbers, self._rounds
        while True:
            if select.select([self._signals], [], [], BEAT_SECONDS)[0]:
                received = received or next((number for number in self._signals.recv(64) if number in SIGNALS), 0)
            if (self._launcher_is_gone or os.getppid() != self._launcher) and not sent:
                sent = True
                os.kill(os.getpid(), signal.SIGTERM)  # as torchrun sends it when it is terminated
            now = time.monotonic()
            passed, last = min(now - last, 2 * BEAT_SECONDS), now  # the time in which this process was frozen itself does not count
            silence = {rank: silence[rank] + passed if self._numbers[rank] == numbers[rank] else 0.0 for rank in self._watched}
            stalled = stalled + passed if self._rounds == rounds else 0.0
            numbers, rounds = self._numbers, self._rounds
            if self._waiting is not waiting:
                waiting, waited, signalled, told = self._waiting, 0.0, 0.0, False
            elif waiting is not None:
                waited, signalled = waited + passed, signalled + passed * bool(received)

            def without_answer(seconds: float) -> list[int] | None:
                """Return the ranks without an answer for so long, none of them if the store itself does not answer; None if all do."""
                return [] if stalled >= seconds else [rank for rank in self._watched if silence[rank] >= seconds] or None  # noqa: B023 - called at once

            # After torchrun's signal there are 30 seconds; if torchrun is gone, nobody can be heard, and a slow step may still end.
            patience = self.timeout if sent else min(SIGNAL_SECONDS, MENTION * self.timeout)
            if received and signalled >= patience and (lost := without_answer(patience)) is not None:
                self._end(lost, received)
            elif waited >= self.timeout and (lost := without_answer(self.timeout)) is not None:
                self._end(lost)
            elif self._rank == 0 and not told and waited >= MENTION * self.timeout and (lost := without_answer(patience)) is not None:
                told = True
                self._say(f"{self._subject(lost)} not answered for {waited:.0f} s; the job ends after {self.timeout:g} s without an answer (--peer-timeout)")

    def _end(self, lost: list[int], received: int = 0) -> None:
        """End this process, and those that do not answer, for which torchrun would wait."""
        text = f"{self._subject(lost)} not answered"
        if not received:
            text += f" for {self.timeout:g} s (--peer-timeout): frozen, or its machine or network is down"
        text += f"; {self.kept}" if self.kept else ""
        with contextlib.suppress(Exception):  # whatever happens to the output, this process ends
            # Without the store, processes cannot agree on one that prints.
            if self._claim(text) if lost else os.environ.get("LOCAL_RANK", "0") == "0":
                self._stopped(received, text) if received else self._failed(text)
        for rank in lost or self._watched:
            self._kill(rank, if_stopped=not lost)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # a closed pipe
                stream.flush()
        os._exit(128 + received if received else PeerError.exit_code)

    def _subject(self, lost: list[int]) -> str:
        """Return who does not answer, with "has" or "have"."""
        names = [f"rank {rank} of {self._size}" + (f" on {self._places[rank].split()[0]}" if rank in self._places else "") for rank in lost]
        return f"{', '.join(names) or 'the store of torchrun'} {'have' if len(names) > 1 else 'has'}"

    def _kill(self, rank: int, *, if_stopped: bool) -> None:
        """Kill a process of this job on this machine that does not answer; torchrun would do the same after 30 seconds, or is gone.

        If it is not known which processes answer, ``if_stopped`` spares those that SIGSTOP did not stop.
        """
        host, _, process = self._places.get(rank, " ").partition(" ")
        if host != platform.node():
            return
        with contextlib.suppress(OSError, ValueError):
            folder = Path("/proc", process)
            environment = (folder / "environ").read_bytes().split(b"\0")
            same = {f"RANK={rank}".encode(), f"TORCHELASTIC_RUN_ID={os.environ.get('TORCHELASTIC_RUN_ID')}".encode()} <= set(environment)
            stopped = (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0] == "T"
            if same and (stopped or not if_stopped):
                os.kill(int(process), signal.SIGKILL)
