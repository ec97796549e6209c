"""Starting real jobs with torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch.distributed

several = pytest.mark.skipif(os.name != "posix" or not torch.distributed.is_gloo_available(), reason="torchrun over gloo is POSIX")
QUIET = {"OMP_NUM_THREADS": "1"}


def torchrun(
    count: int, *arguments: object, restarts: int = 0, module: str = "ddpmctl", environment: Mapping[str, str] | None = None, endpoint: str | None = None
) -> subprocess.Popen[str]:
    """Start a module in ``count`` processes; with an endpoint, as one of two launchers that connect there, as on two machines."""
    place = ["--standalone"] if endpoint is None else ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "job"]
    launcher = [sys.executable, "-m", "torch.distributed.run", *place, "--nproc-per-node", str(count), "--max-restarts", str(restarts)]
    command = [*launcher, "-m", module, *map(str, arguments)]
    around = {**os.environ, **QUIET, **(environment or {})}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=around, cwd=Path(__file__).parents[2])


def finished(process: subprocess.Popen[str], code: int = 0, timeout: float = 120) -> tuple[str, str]:
    """Wait for a job and return its stdout and stderr; it must not hang, and must end with ``code``."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == code, err[-5000:]
    return out, err


def workers(launcher: int) -> list[int]:
    """Return the process ids of a launcher's workers, by rank."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == launcher:
                    environment = dict(item.partition("=")[::2] for item in (folder / "environ").read_text().split("\0"))
                    found.append((int(environment["RANK"]), int(folder.name)))
            except (OSError, KeyError):
                continue
    return [process for _, process in sorted(found)]
