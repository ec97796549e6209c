"""ddpmctl, but on rank 0 some writes to the disk take eight seconds, as on a network drive."""

from __future__ import annotations

import itertools
import os
import time

if os.environ["RANK"] == "0":
    inner, calls = os.fsync, itertools.count()

    def fsync(file: int) -> None:
        """Write to the disk, the tenth time slowly."""
        time.sleep(8 if next(calls) % 50 == 10 else 0)
        inner(file)

    os.fsync = fsync

from ddpmctl.cli.app import main

main()
