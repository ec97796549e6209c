"""Run commands in this process, and record what they write.

    python -m tests.survival.audited RECORD COMMANDS

COMMANDS is a JSON list of command lines, each a list of arguments. RECORD becomes a JSON list with, for each of them, its exit code and what it
opened for writing, made, renamed, removed or changed: [event, absolute path without links]. Also recorded are the programs that it started, whose
writes would not be seen. An audit hook sees what goes through Python; for libraries in C there is strace.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# How many of an event's arguments are paths, and where the descriptors of the folders that they are relative to follow.
CHANGES = {
    "os.rename": (2, 2), "os.link": (2, 2), "os.symlink": (2, None), "os.remove": (1, 1), "os.rmdir": (1, 1), "os.mkdir": (1, 2), "os.truncate": (1, None),
    "os.chmod": (1, 2), "os.chown": (1, 3), "os.utime": (1, 3), "os.mkfifo": (1, 2), "os.setxattr": (1, None), "os.removexattr": (1, None),
    "shutil.rmtree": (1, None), "shutil.move": (2, None), "shutil.copyfile": (2, None), "shutil.make_archive": (1, None), "sqlite3.connect": (1, None),
}  # fmt: skip
OPEN = os.open
PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork", "os.forkpty")
READS = {"shutil.copyfile": 1}  # the first path is only read


def place(path: Any, folder: int | None = None) -> str:
    """Return an absolute path without links; ``folder`` is the descriptor that a relative one belongs to."""
    name = os.fsdecode(path)
    if folder is not None and folder >= 0 and not os.path.isabs(name):
        name = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), name)
    above, last = os.path.split(os.path.abspath(name))
    return os.path.join(os.path.realpath(above), last)


class Recorder:
    """The audit hook."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []
        self.folder: int | None = None

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        """``os.open``, of whose arguments the hook does not see ``dir_fd``."""
        self.folder = dir_fd
        try:
            return OPEN(path, flags, mode, dir_fd=dir_fd)
        finally:
            self.folder = None

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(path, int) and isinstance(flags, int) and flags & WRITING:
                self.seen.append((event, os.path.realpath(place(path, self.folder))))
        elif event in CHANGES:
            count, folders = CHANGES[event]
            for index in range(READS.get(event, 0), count):
                if isinstance(arguments[index], int):  # an open file, whose opening was recorded
                    continue
                self.seen.append((event, place(arguments[index], arguments[folders + index] if folders is not None else None)))
        elif event in PROGRAMS:
            self.seen.append((event, os.path.basename(os.fsdecode(arguments[0] or "a program"))))


def main() -> None:
    """Run the commands and write the record."""
    record, commands = Path(sys.argv[1]).open("w"), json.loads(sys.argv[2])  # noqa: SIM115
    recorder, found = Recorder(), []
    sys.addaudithook(recorder)
    os.open = recorder.open
    from ddpmctl.cli.app import app

    for arguments in commands:
        recorder.seen = []
        try:
            code = app(arguments, standalone_mode=False) or 0
        except SystemExit as end:
            code = end.code
        found.append({"code": code, "seen": recorder.seen})
    json.dump(found, record)
    record.close()


if __name__ == "__main__":
    main()
