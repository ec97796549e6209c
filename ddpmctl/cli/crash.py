"""Unexpected errors: a one-line message, and a file with the traceback."""

from __future__ import annotations

import os
import platform
import sys
import time
import traceback
from contextlib import suppress
from contextvars import ContextVar
from pathlib import Path

from ddpmctl import __version__
from ddpmctl.errors import DdpmctlError

run_folder: ContextVar[Path | None] = ContextVar("run_folder", default=None)


def report(error: BaseException) -> Path | None:
    """Write a traceback to the run's folder, or else to the cache; return None if neither is writable."""
    torch = getattr(sys.modules.get("torch"), "__version__", "not loaded")
    versions = f"ddpmctl {__version__}, Python {platform.python_version()}, {platform.platform()}, torch {torch}"
    content = f"{versions}\ncommand: {' '.join(sys.argv[1:2])}\n\n{''.join(traceback.format_exception(error))}"
    from ddpmctl.data.cache import cache_folder

    name = f"crash-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    for find, make in ((run_folder.get, False), (lambda: cache_folder() / "crashes", True)):
        with suppress(OSError, DdpmctlError):
            if (folder := find()) is not None:
                if make:
                    folder.mkdir(parents=True, exist_ok=True)
                with (folder / name).open("x", encoding="utf-8", errors="replace") as file:
                    file.write(content)
                return folder / name
    return None


def in_one_line(error: BaseException) -> str:
    """Return an error's type and the start of its message."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
