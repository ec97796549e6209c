"""Removing runs."""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path

from ddpmctl.errors import UsageError
from ddpmctl.files import cannot_write
from ddpmctl.runs.folder import Run
from ddpmctl.runs.lock import held


def require_removable(folder: Path) -> None:
    """Check that a folder is a run that may be removed: made by train, not a link, and not being trained.

    Raises:
        UsageError: it is not.
    """
    run = Run(folder)
    if folder.is_symlink():
        raise UsageError(f"{folder}: is a symbolic link, and only the run itself is removed; name the folder that it points to")
    if not folder.is_dir() or not all(part.exists() and not part.is_symlink() for part in (run.config_file, run.data_file, run.checkpoints)):
        raise UsageError(f"{folder}: is not a run (a run has config.toml, data.json and checkpoints/); nothing was removed")
    with held(run):
        pass


def remove_run(folder: Path) -> None:
    """Remove a run's folder. Links in it are removed, and what they point to stays.

    Raises:
        UsageError: it may not be removed, or cannot be.
    """
    require_removable(folder)
    # A name that is no run's: if this is interrupted, the next run that is made here removes the rest.
    going = folder.with_name(f".run-{secrets.token_hex(8)}.tmp")
    try:
        with held(Run(folder)):
            folder.rename(going)
        shutil.rmtree(going)
    except OSError as error:
        raise cannot_write(folder.parent, error) from None
