"""The processes of one job under torchrun: who this one is, what they tell each other, and how one's failure reaches the others.

What is said here goes through the launcher's key-value store (``torch.distributed.TCPStore``), in which waiting is done by looking again: a
process that waits still hears signals, and learns within moments that another one has failed. Gradients go through a process group, which
only training starts (``ddpmctl.distributed.ddp``).
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import pickle
import platform
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ddpmctl import __version__
from ddpmctl.errors import PeerError, UsageError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

T = TypeVar("T")
PART_BYTES = 4 * 2**20  # of one value in the store, which takes 8 MiB
CONNECT_SECONDS = 300
LONGEST_NAP = 0.1  # seconds between two looks at the store
FAILURE = "failure"


def split(count: int, pieces: int, index: int) -> slice:
    """Return the ``index``-th of ``pieces`` neighbouring parts of ``count`` things; sizes differ by one at most, the first part is the largest."""
    return slice(-(-count * index // pieces), -(-count * (index + 1) // pieces))


@dataclass(frozen=True)
class Job:
    """This process among those of its job; a process of its own is rank 0 of 1.

    Attributes:
        rank, size: as torchrun's RANK and WORLD_SIZE.
        local: the rank on this machine, which is the number of its GPU.
        store: where the processes leave word for each other; None for a process of its own.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    store: Store | None = None
    _turns: Iterator[int] = field(default_factory=itertools.count, repr=False, compare=False)

    @property
    def is_single(self) -> bool:
        """Whether this is a process of its own."""
        return self.size == 1

    @property
    def is_leader(self) -> bool:
        """Whether this is the one process that talks and writes."""
        return self.rank == 0

    def __str__(self) -> str:
        """Return rank, size and machine in words."""
        return f"rank {self.rank} of {self.size} on {platform.node()}"

    # Failures

    def claim(self, text: str) -> bool:
        """Return whether this process is the first of its job to fail, and so is to tell of it; the others then learn of it."""
        if self.store is None:
            return True
        try:
            return bool(self.store.compare_set(FAILURE, "", f"{self}: {text}"[:2000]).decode() == f"{self}: {text}"[:2000])
        except RuntimeError:  # the launcher is gone
            return self.is_leader

    def _raise_if_one_failed(self) -> None:
        assert self.store is not None
        if self.store.check([FAILURE]):
            raise PeerError(f"another process of this job failed: {self.store.get(FAILURE).decode()}")

    # Words

    def put(self, key: str, value: bytes) -> None:
        """Leave a value for the others, who ``take`` it by its key."""
        assert self.store is not None
        parts = [value[start : start + PART_BYTES] for start in range(0, len(value), PART_BYTES)]
        with _store_is_there():
            for number, part in enumerate(parts):
                self.store.set(f"{key}/{number}", part)  # type: ignore[arg-type]  # bytes are taken as they are
            self.store.set(key, str(len(parts)))  # last: who sees it finds all parts

    def take(self, key: str, *, last: bool = False) -> bytes:
        """Wait for a value and return it; ``last`` says that nobody is going to ask for it again.

        Raises:
            PeerError: another process failed, or the launcher is gone.
        """
        assert self.store is not None
        self.wait(key)
        with _store_is_there():
            parts = [f"{key}/{number}" for number in range(int(self.store.get(key)))]
            value = b"".join(self.store.get(part) for part in parts)
            for part in parts if last else ():
                self.store.delete_key(part)
        return value

    def wait(self, key: str, until: Callable[[], object] = lambda: False) -> bool:
        """Wait for a key, or until something else is the case; return whether the key is there.

        Raises:
            PeerError: another process failed, or the launcher is gone.
        """
        assert self.store is not None
        nap = 0.001
        with _store_is_there():
            while not self.store.check([key]):
                self._raise_if_one_failed()
                if until():
                    return False
                time.sleep(nap)
                nap = min(2 * nap, LONGEST_NAP)
        return True

    def from_leader(self, value: Callable[[], T]) -> T:
        """Return what rank 0 finds for a value; the others do not look for it. All ranks come here in the same order."""
        if self.is_single:
            return value()
        key = f"said/{next(self._turns)}"
        if self.is_leader:
            found = value()
            self.put(key, pickle.dumps(found))
            return found
        said: T = pickle.loads(self.take(key))
        return said

    def require_same(self, what: str, values: Mapping[str, object]) -> None:
        """Compare values with rank 0's.

        Raises:
            UsageError: this process has another one; names it, and both values.
        """
        if self.is_single:
            return
        own = {name: str(value) for name, value in values.items()}
        firsts: dict[str, str] = json.loads(self.from_leader(lambda: json.dumps(own)))
        others = [f"{name} is {own.get(name)} here and {firsts.get(name)} on rank 0" for name in {**firsts, **own} if own.get(name) != firsts.get(name)]
        if others:
            raise UsageError(f"this process has another {what} than rank 0: {'; '.join(others)}; start all of them alike")

    def require_one_version(self) -> None:
        """Compare this process's code with rank 0's.

        Raises:
            UsageError: it is another.
        """
        if not self.is_single:
            import torch

            self.require_same("version", {"ddpmctl": f"{__version__} ({source_digest()})", "torch": torch.__version__})

    @contextmanager
    def first_on_each_machine(self, what: str) -> Iterator[None]:
        """In the body, the first process of each machine goes ahead of the others, for whom it then has filled a cache.

        Raises:
            PeerError: another process failed.
        """
        key = f"first on {platform.node()}/{what}"
        if not self.is_single and self.local > 0:
            self.wait(key)
        yield
        if not self.is_single and self.local == 0:
            self.put(key, b"")


SINGLE = Job()


@contextmanager
def join(environ: Mapping[str, str] = os.environ) -> Iterator[Job]:
    """Yield this process among those that torchrun started with it; without torchrun, a process of its own.

    Raises:
        UsageError: the launcher's variables are incomplete, or its store cannot be reached.
    """
    if is_alone(environ):
        yield SINGLE
        return
    yield _join(environ)


def is_alone(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether no launcher has started this process as one of several."""
    return environ.get("WORLD_SIZE", "") in ("", "1")


def _join(environ: Mapping[str, str]) -> Job:
    from datetime import timedelta

    from torch.distributed import PrefixStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, size = next(iter(rendezvous("env://", timeout=timedelta(seconds=CONNECT_SECONDS))))
        store = PrefixStore("ddpmctl", store)
        return Job(rank, size, int(environ.get("LOCAL_RANK", "0")), PrefixStore(meeting(store, rank, size), store))
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"torchrun: its other processes cannot be reached ({' '.join(str(error).split())[:200]})") from None


def meeting(store: Store, rank: int, size: int) -> str:
    """Return a name for this meeting of all ranks, which is the same for each of them and was never used before.

    The launcher's store outlives restarts, whose number differs between machines (torchrun counts the failures of its own), and what was
    said before a restart must not be heard after it. So each rank leaves a word that nobody else can have left, and goes by what rank 0
    answers to that word; rank 0 answers until all have been heard to go by the name.

    Raises:
        RuntimeError: somebody did not come within CONNECT_SECONDS.
    """
    own, until = uuid.uuid4().hex, time.monotonic() + CONNECT_SECONDS
    if rank > 0:
        store.set(f"word/{rank}", own)
        while True:
            word, _, name = _read(store, f"answer/{rank}").partition(" ")
            if word == own:
                store.set(f"{name}/met/{rank}", "")
                return name
            _nap("rank 0", until)
    answered: dict[int, str] = {}
    while missing := [other for other in range(1, size) if not store.check([f"{own}/met/{other}"])]:
        for other in missing:
            word = _read(store, f"word/{other}")
            if word != answered.get(other, ""):  # a later word is that of a process which came after a restart
                store.set(f"answer/{other}", f"{word} {own}")
                answered[other] = word
        _nap(f"rank {missing[0]}", until)
    return own


def _read(store: Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _nap(awaited: str, until: float) -> None:
    if time.monotonic() > until:
        raise RuntimeError(f"no word from {awaited} in {CONNECT_SECONDS} s")
    time.sleep(0.01)


@contextmanager
def without_teardown(environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """End a process of torchrun's as soon as the body has, with its exit code.

    Were Python taken apart first, a thread of gloo's that wakes up meanwhile would abort the process (about one job in a hundred), and
    torchrun would take a job that is done for one that failed.
    """
    code: object = 0
    try:
        yield
    except SystemExit as end:
        code = end.code
        if is_alone(environ):
            raise
    if not is_alone(environ):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # whoever read it went away
                stream.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


def source_digest() -> str:
    """Return a short hash of this package's own code."""
    import hashlib

    import ddpmctl

    root, content = Path(ddpmctl.__file__).parent, io.BytesIO()
    for file in sorted(root.rglob("*.py")):
        content.write(f"{file.relative_to(root).as_posix()}\n".encode() + file.read_bytes())
    return hashlib.sha256(content.getvalue()).hexdigest()[:12]


@contextmanager
def _store_is_there() -> Iterator[None]:
    from torch.distributed import DistError

    try:
        yield
    except DistError as error:
        raise PeerError(f"the job's other processes cannot be reached any more ({' '.join(str(error).split())[:200]})") from None


def gathered(job: Job, work: Sequence[Callable[[], Any]]) -> Iterator[Any]:
    """Share pieces of work over the ranks in turn, piece by piece; on rank 0, yield all results in order, on the others nothing.

    The results are those of one process: a piece is never split. They travel as pickles, between processes of one job.

    Raises:
        PeerError: another process failed.
    """
    turn = next(job._turns)
    for number, piece in enumerate(work):
        worker = number % job.size
        if job.rank == worker:
            result = piece()
            if not job.is_leader:
                job.put(f"work/{turn}/{number}", pickle.dumps(result))
        if job.is_leader:
            yield result if worker == 0 else pickle.loads(job.take(f"work/{turn}/{number}", last=True))
