"""The lock of a run, so that two processes never train in it."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from filelock import FileLock, Timeout

from ddpmctl.errors import DataError, UsageError
from ddpmctl.files import read_plain, remove_temporary_files
from ddpmctl.runs.folder import Run
from ddpmctl.runs.sources import MAX_BYTES

LOCK_SECONDS = 0.2  # for a lock that ``is_locked`` holds for a moment


@contextmanager
def locked(run: Run) -> Iterator[None]:
    """Lock a run's folder against other training processes, and remove temporary files of killed ones.

    The operating system releases the lock when the process ends, also if it is killed.

    Raises:
        UsageError: another process is training there; names it.
        DataError: a file or folder of the run is a link, a pipe, or shared with another folder.
    """
    run.require_own_files()
    with held(run):
        run.require_own_files()
        for file in run.logs:
            if file.exists() and file.stat().st_nlink > 1:
                raise DataError(f"{file}: is a hard link, so training would also change the file that it shares; replace it by a copy")
        lock = run.lock_identity()
        try:
            with suppress(OSError):
                run.holder_file.unlink(missing_ok=True)
                with run.holder_file.open("x", encoding="utf-8") as holder:
                    holder.write(f"process {os.getpid()} on {platform.node()}\n")
            for folder in (run.folder, run.checkpoints, run.samples):
                remove_temporary_files(folder)
            yield
        finally:
            with suppress(OSError):
                if run.lock_identity() == lock:
                    run.holder_file.unlink()


@contextmanager
def held(run: Run) -> Iterator[None]:
    """Hold a run's lock, and write nothing else.

    Raises:
        UsageError: another process is training there; names it.
    """
    lock = FileLock(run.lock_file, timeout=LOCK_SECONDS, poll_interval=0.02, mode=0o644)
    try:
        lock.acquire()
    except Timeout:
        raise UsageError(f"{run.folder}: {_holder(run)} is training this run; wait for it, or stop it first") from None
    except (OSError, NotImplementedError) as error:
        raise UsageError(f"{run.folder}: cannot be locked against a second trainer ({error}); choose another disk with --runs-dir") from None
    try:
        yield
    finally:
        lock.release()


def is_locked(run: Run) -> bool:
    """Return whether a process trains here now; nothing is written."""
    if not run.holder_file.exists() or not run.lock_file.exists():
        return False
    try:
        with FileLock(run.lock_file, timeout=0, mode=0o644):
            return False
    except Timeout:
        return True
    except (OSError, NotImplementedError):  # the folder of another user: the process that trains has written who it is
        return True


def _holder(run: Run) -> str:
    try:
        name = read_plain(run.holder_file, MAX_BYTES).decode()[:200].strip()
    except (OSError, UnicodeDecodeError, DataError):
        name = ""
    return name if name.isprintable() and name else "another process"
