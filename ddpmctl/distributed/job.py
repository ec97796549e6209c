"""The processes of one job: ranks, exchange of values, and how a failure of one process is reported to the others.

A single process is a job of size 1, which exchanges nothing and does not import torch.distributed. Under torchrun, values are sent with
torch's object collectives over a gloo group (``ddpmctl.distributed.ddp`` has its own group for gradients).

Four things are implemented here because torch lacks them. Collectives block in C++, where Python handles no signals, so they run in a
second thread while the main thread checks for signals and failures. The first process that fails writes its message to the launcher's
store, so that the job prints one error and not one per process (torchelastic's error file names a cause only after all processes have
ended). And the processes agree on a new key prefix for that store (``meeting``): torchrun's own attempt number counts the failures of one
machine, and differs between machines after a restart. Processes that are frozen are noticed in ``ddpmctl.distributed.watch``.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import platform
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ddpmctl import __version__
from ddpmctl.errors import PeerError, UsageError
from ddpmctl.progress import Progress

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

    from ddpmctl.distributed.watch import Watch

T = TypeVar("T")
P = TypeVar("P")
PATIENCE_DAYS = 30  # timeout of a collective: rank 0 may score for hours; the others notice at once that a process ended, and ``watch`` that it is frozen
POLL_SECONDS = 0.1  # between two checks of the store
FAILURE = "failure"


def split(count: int, pieces: int, index: int) -> slice:
    """Return the ``index``-th of ``pieces`` consecutive parts of ``count`` items; sizes differ by one at most, the first part is the largest."""
    return slice(-(-count * index // pieces), -(-count * (index + 1) // pieces))


@dataclass(frozen=True)
class Job:
    """This process and the others of its job.

    Attributes:
        rank, size: as torchrun's RANK and WORLD_SIZE.
        local: the rank on this machine, which is the index of its GPU.
        store: key-value store that all processes share; None for a single process.
        watch: notices processes that do not answer; None for a single process.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    store: Store | None = None
    watch: Watch | None = None

    @property
    def is_single(self) -> bool:
        """Whether this is the only process of its job."""
        return self.size == 1

    @property
    def is_leader(self) -> bool:
        """Whether this is rank 0, the process that prints and writes."""
        return self.rank == 0

    def __str__(self) -> str:
        """Return rank, size and host name as text."""
        return f"rank {self.rank} of {self.size} on {platform.node()}"

    def claim(self, text: str) -> bool:
        """Record that this process failed; return whether it is the first one, which prints the error."""
        if self.store is None:
            return True
        try:
            return bool(self.store.compare_set(FAILURE, "", f"{self}: {text}"[:2000]).decode() == f"{self}: {text}"[:2000])
        except RuntimeError:  # the launcher is gone
            return self.is_leader

    def be_patient(self, seconds: float, kept: str = "") -> None:
        """Set the timeout for other processes in seconds, and what the message at the end says about saved work."""
        if self.watch is not None:
            self.watch.timeout, self.watch.kept = seconds, kept

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """In the body, which may wait for other processes, notice those that do not answer, and convert backend errors about them to PeerError.

        Raises:
            PeerError: another process failed.
        """
        with self.watch.waiting() if self.watch is not None else nullcontext(), peer_errors():
            yield

    def from_leader(self, value: Callable[[], T]) -> T:
        """Return rank 0's ``value()`` on every process; the others do not call it. All processes must call this method in the same order.

        Raises:
            PeerError: another process failed.
        """
        if self.is_single:
            return value()
        box: list[Any] = [value() if self.is_leader else None]
        self._collective(lambda dist: dist.broadcast_object_list(box, src=0))
        found: T = box[0]
        return found

    def wait_for_leader(self, until: Callable[[], object]) -> bool:
        """Wait until rank 0 calls ``from_leader`` again; return False as soon as ``until()`` is true.

        Raises:
            PeerError: another process failed.
        """
        return self._collective(lambda dist: dist.broadcast_object_list([None], src=0), until)

    def require_same(self, what: str, values: Mapping[str, object]) -> None:
        """Compare values with rank 0's.

        Raises:
            UsageError: a value differs; names it, and both values.
        """
        if self.is_single:
            return
        own = {name: str(value) for name, value in values.items()}
        leaders = self.from_leader(lambda: own)
        differing = [f"{name} is {own.get(name)} here and {leaders.get(name)} on rank 0" for name in {**leaders, **own} if own.get(name) != leaders.get(name)]
        if differing:
            raise UsageError(f"this process has another {what} than rank 0: {'; '.join(differing)}; start all processes in the same way")

    def require_one_version(self) -> None:
        """Compare this process's code with rank 0's.

        Raises:
            UsageError: it differs.
        """
        if not self.is_single:
            import torch

            self.require_same("version", {"ddpmctl": f"{__version__} ({source_digest()})", "torch": torch.__version__})

    @contextmanager
    def first_on_each_machine(self) -> Iterator[None]:
        """Run the body on the first process of each machine, then on the others, which find the cache filled.

        Raises:
            PeerError: another process failed.
        """
        if not self.is_single and self.local > 0:
            self._collective(lambda dist: dist.barrier())
        yield
        if not self.is_single and self.local == 0:
            self._collective(lambda dist: dist.barrier())

    def map_ordered(self, work: Callable[[P], Generator[Progress, None, T]], pieces: Iterable[P]) -> Iterator[Progress | T]:
        """Distribute pieces of work over the processes; yield this process's progress, and on rank 0 the results, in order.

        The results equal those of a single process, since a piece is never split. They are sent as pickles.

        Args:
            work: yields progress on one piece and returns its result; called once per piece, on one of the processes.
            pieces: read on rank 0 only, one per process at a time.

        Raises:
            PeerError: another process failed.
        """
        remaining = iter(pieces)
        while part := self.from_leader(lambda: list(itertools.islice(remaining, self.size))):
            own = (yield from work(part[self.rank])) if self.rank < len(part) else None
            yield from self._gathered(own)[: len(part)]  # type: ignore[misc]  # None only if there was no piece

    def _gathered(self, own: T) -> list[T]:
        """Return every process's value on rank 0, nothing on the others."""
        if self.is_single:
            return [own]
        found: list[Any] | None = [None] * self.size if self.is_leader else None
        self._collective(lambda dist: dist.gather_object(own, found, dst=0))
        return found or []

    def _collective(self, call: Callable[[Any], object], until: Callable[[], object] = lambda: False) -> bool:
        """Run a collective in the second thread until it ends or ``until()`` is true; return whether it ended.

        Raises:
            PeerError: another process failed.
        """
        running = self._thread.submit(lambda: call(self._torch))
        with self.waiting():
            while not running.done():
                wait([running], POLL_SECONDS)
                self._raise_if_one_failed()
                if until():
                    return False
            running.result()
        return True

    def _raise_if_one_failed(self) -> None:
        assert self.store is not None
        try:
            failure = self.store.get(FAILURE).decode() if self.store.check([FAILURE]) else ""
        except RuntimeError:
            raise PeerError("torchrun, which started this process, has ended or was killed") from None
        if failure:
            raise PeerError(f"another process of this job failed: {failure}")

    @cached_property
    def _thread(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, "collectives")  # one thread: all ranks must start collectives in the same order

    @cached_property
    def _torch(self) -> Any:
        """torch.distributed, connected to the other processes; first used in the thread of collectives."""
        from datetime import timedelta

        import torch.distributed as dist

        dist.init_process_group("gloo", store=self.store, rank=self.rank, world_size=self.size, timeout=timedelta(days=PATIENCE_DAYS))
        return dist


SINGLE = Job()


@contextmanager
def peer_errors() -> Iterator[None]:
    """Convert backend errors about another process to PeerError; gloo raises plain RuntimeErrors."""
    try:
        yield
    except RuntimeError as error:
        from torch.distributed import DistError

        if not isinstance(error, DistError) and not any(word in str(error) for word in BACKEND_WORDS):
            raise
        raise PeerError("the connection to another process was lost: it ended or was killed, or its machine is down") from None


BACKEND_WORDS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")


def join(environ: Mapping[str, str] = os.environ) -> Job:
    """Return the job that torchrun started this process for; without torchrun, a single process.

    Raises:
        UsageError: the launcher's variables are incomplete, or its store cannot be reached.
    """
    return SINGLE if is_single_process(environ) else _join(environ)


def is_single_process(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether torchrun did not start this process, or started no other."""
    return environ.get("WORLD_SIZE", "") in ("", "1")


def _join(environ: Mapping[str, str]) -> Job:
    from datetime import timedelta

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is loaded: a lost connection is no stack of C++ frames, but our one line
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    from ddpmctl.distributed.meeting import CONNECT_SECONDS, meeting
    from ddpmctl.distributed.watch import Watch

    try:
        store, rank, size = next(iter(rendezvous("env://", timeout=timedelta(seconds=CONNECT_SECONDS))))
        store = PrefixStore("ddpmctl", store)
        store = PrefixStore(meeting(store, rank, size), store)
        return Job(rank, size, int(environ.get("LOCAL_RANK", "0")), store, Watch(store, rank, size))
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"torchrun: its other processes cannot be reached ({' '.join(str(error).split())[:200]})") from None


@contextmanager
def without_teardown(environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Under torchrun, exit right after the body, with its exit code and without Python's shutdown.

    During shutdown a thread of gloo may abort the process (about one job in a hundred), and torchrun would report a finished job as failed.
    """
    code: object = 0
    try:
        yield
    except SystemExit as end:
        code = end.code
        if is_single_process(environ):
            raise
    if not is_single_process(environ):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # a closed pipe
                stream.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


def source_digest() -> str:
    """Return a short hash of this package's own code."""
    import hashlib

    root, content = Path(__file__).parent.parent, io.BytesIO()
    for file in sorted(root.rglob("*.py")):
        content.write(f"{file.relative_to(root).as_posix()}\n".encode() + file.read_bytes())
    return hashlib.sha256(content.getvalue()).hexdigest()[:12]
