"""Run folders: their names and files, and how they are found."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import secrets
import shutil
import stat
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ddpmctl.checkpoints.names import FILE_NAME, WEIGHTS
from ddpmctl.config import Config
from ddpmctl.config_toml import dump_toml, load_toml
from ddpmctl.errors import DataError, UsageError
from ddpmctl.files import cannot_write, in_bytes, not_plain, read_plain, write_text
from ddpmctl.runs.sources import MAX_BYTES, RunSources

MAX_NAME = 255  # characters of a file name
MAX_LOG_BYTES = 2**28  # of metrics.jsonl, timing.jsonl and results.csv: 60 million steps
STALE_SECONDS = 3600  # a folder that is still unfinished after this time was left by a killed process


class _Inside:
    """A path in a run's folder."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, run: Run, owner: type[Run]) -> Path:
        return run.folder / self._name


@dataclass(frozen=True)
class Run:
    """A run's folder and the files in it."""

    folder: Path
    config_file = _Inside("config.toml")  # the settings, as TOML that --config reads
    data_file = _Inside("data.json")  # which data the run trains on
    metrics_file = _Inside("metrics.jsonl")  # an object for every logged step, epoch and evaluation; nothing in it depends on a clock
    timing_file = _Inside("timing.jsonl")  # the seconds that each line of metrics.jsonl took
    results_file = _Inside("results.csv")  # a row for each evaluation
    curves_file = _Inside("curves.png")  # loss and accuracy over epochs, drawn at each score
    state_file = _Inside("state.pt")  # all that is needed to resume: weights and their average, optimizers, counters
    diagnosis_file = _Inside("diagnosis.json")  # details of NaN or inf
    lock_file = _Inside(".lock")  # held by the process that trains here; the file itself stays
    holder_file = _Inside(".holder")  # who holds the lock
    checkpoints = _Inside("checkpoints")  # folder of scored checkpoints
    abandoned = _Inside("checkpoints/abandoned")  # folder of those after a state from which the run went on
    conditions = _Inside("conditions")  # folder of the conditions, where the data bring none
    samples = _Inside("samples")  # folder of sample grids
    tensorboard = _Inside("tensorboard")  # folder of event files

    @property
    def is_untouched(self) -> bool:
        """Whether nothing was trained here yet: the run was killed before its first state was saved."""
        written = [self.state_file, *(file for file in (self.metrics_file, self.results_file, self.timing_file) if file.exists() and file.stat().st_size)]
        return not any(file.exists() for file in written) and not any(self.checkpoints.glob("*.pth"))

    @property
    def logs(self) -> tuple[Path, ...]:
        """The files that training appends to."""
        return (self.metrics_file, self.timing_file, self.results_file)

    def require_own_files(self) -> None:
        """Check that the run's files and folders are regular ones in its own folder, and that small files are small.

        A run from an unknown source may have links, through which training would write elsewhere, and pipes, which block.

        Raises:
            DataError: one is not; names it.
        """
        folders = (self.checkpoints, self.abandoned, self.conditions, self.samples, self.tensorboard)
        small = (self.config_file, self.data_file, self.holder_file, self._pointer_file("best"), self._pointer_file("latest"))
        others = (self.state_file, self.curves_file, self.diagnosis_file, self.lock_file)
        for path in (*folders, *small, *self.logs, *others):
            if problem := not_plain(path, stat.S_ISDIR if path in folders else stat.S_ISREG):
                raise DataError(f"{path}: {problem}; a run may contain only regular files and folders, so remove it or replace it by a copy")
            limit = MAX_BYTES if path in small else MAX_LOG_BYTES if path in self.logs else None
            if limit is not None and path.exists() and path.stat().st_size > limit:
                raise DataError(f"{path}: is too large ({in_bytes(path.stat().st_size)}); the run is damaged")

    def lock_identity(self) -> tuple[int, int] | None:
        """Return device and inode number of the lock file; None if there is none. While the lock is held, no other file has them."""
        try:
            about = self.lock_file.lstat()
        except OSError:
            return None
        return about.st_dev, about.st_ino

    def require_present(self, lock: tuple[int, int] | None) -> None:
        """Check that the folder is still that of the run whose lock was ``lock``.

        Raises:
            UsageError: it was deleted, moved or replaced.
        """
        if not os.path.lexists(self.config_file) or self.lock_identity() not in (lock, None):
            what = "the run's folder was deleted, moved or replaced during training"
            raise UsageError(f"{self.folder}: {what}, so nothing more is saved; if it was moved, resume it from its new place")

    def config(self) -> Config:
        """Return the run's settings.

        Raises:
            UsageError: the folder is not a run.
        """
        if not self.config_file.is_file():
            raise UsageError(f"{self.folder}: is not a run (it has no config.toml)")
        return Config.from_flat(load_toml(self.config_file))

    def results(self) -> list[dict[str, str]]:
        """Return the rows of results.csv, as text; none before the first evaluation.

        Raises:
            DataError: the file is not a CSV file.
        """
        try:
            return list(csv.DictReader(io.StringIO(read_plain(self.results_file, MAX_LOG_BYTES).decode(), newline="")))
        except FileNotFoundError:
            return []
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{self.results_file}: cannot be read as CSV ({error})") from None

    def pointer(self, name: str) -> Path | None:
        """Return the checkpoint that ``best.json`` or ``latest.json`` points to, a file in ``checkpoints``; None if it points to none."""
        try:
            target = json.loads(read_plain(self._pointer_file(name), MAX_BYTES))["checkpoint"]
        except (OSError, ValueError, LookupError, TypeError, RecursionError, DataError):
            return None
        folder, _, file = target.rpartition("/") if isinstance(target, str) else ("", "", "")
        return self.checkpoint(file) if folder == self.checkpoints.name else None

    def checkpoint(self, name: str) -> Path | None:
        """Return the file of this name in ``checkpoints``, or None if there is none or the name is not that of a checkpoint."""
        if not name.endswith(".pth") or Path(name).name != name or len(name) > MAX_NAME:
            return None
        path = self.checkpoints / name
        return path if not_plain(path) is None and path.is_file() else None

    def _pointer_file(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def point(self, name: str, checkpoint: Path) -> None:
        """Write a checkpoint's path to ``best.json`` or ``latest.json``, which can be copied more easily than a link."""
        write_text(self._pointer_file(name), json.dumps({"checkpoint": checkpoint.relative_to(self.folder).as_posix()}) + "\n")

    def retain(self, count: int, *, until: int) -> None:
        """Delete scored checkpoints except the best, the last, and the ``count`` latest of the others; those after epoch ``until`` stay as well."""
        spared = {self.pointer("best"), self.pointer("latest")}
        others = [file for file in by_epoch(self.checkpoints) if file not in spared and epoch_in_name(file) <= until]
        for file in others[: max(0, len(others) - count)]:
            file.unlink(missing_ok=True)


class TakenError(UsageError):
    """The name of a new run is taken."""


def create_run(parent: Path, name: str | None, config: Config, sources: RunSources) -> Run:
    """Create a new run folder with its settings atomically; an existing folder is never used.

    Raises:
        TakenError: the name is taken.
        UsageError: it is not a folder name, or the parent cannot be written to.
    """
    if name is not None and (not re.fullmatch(r"[\w.+-]+", name) or name.strip(".") == ""):
        raise UsageError(f"--name: {name!r} is not a folder name; use letters, digits, '.', '_', '+' and '-'")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _sweep_unfinished(parent)
        made = parent / f".run-{secrets.token_hex(8)}.tmp"
        made.mkdir()
    except OSError as error:
        raise cannot_write(parent, error) from None
    run = Run(made)
    try:
        for folder in (run.checkpoints, run.samples):
            try:
                folder.mkdir()
            except OSError as error:
                raise cannot_write(parent, error) from None
        save_config(run, config)
        sources.save(run.data_file)
        return Run(_claim(made, parent, name, config))
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def save_config(run: Run, config: Config) -> None:
    """Write a run's settings."""
    write_text(run.config_file, dump_toml(config))


def _sweep_unfinished(parent: Path) -> None:
    for left in parent.glob(".run-*.tmp"):
        with suppress(OSError):
            if abs(time.time() - left.stat().st_mtime) > STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


def _claim(made: Path, parent: Path, name: str | None, config: Config) -> Path:
    """Rename a finished folder to its final name; this fails if the name is a non-empty folder, also one that was just created."""
    base = name or name_for(config)
    for suffix in ("", *(f"-{n}" for n in range(2, 10_000))):
        try:
            return made.rename(parent / (base + suffix))
        except OSError as error:
            if not os.path.lexists(parent / (base + suffix)):
                raise cannot_write(parent, error) from None
            if name is not None:
                raise TakenError(f"--name: {parent / name} exists already; choose another name, or resume with --resume {parent / name}") from None
    raise UsageError(f"{parent}: holds ten thousand runs called {base}; give --name")


def name_for(config: Config) -> str:
    """Return a run name of the settings that usually differ: network, activation, schedule, budget, seed."""
    model, training = config.model, config.training
    budget = f"{training.epochs}ep" if training.epochs is not None else f"{training.minutes:g}min"
    return f"{model.net}{model.width}-{model.act}-{config.diffusion.schedule}-{budget}-s{training.seed}"


def open_run(folder: Path) -> Run:
    """Return the run in a folder.

    Raises:
        UsageError: the folder is not a run.
        DataError: a file or folder of it is a link or a pipe, or its settings are damaged.
    """
    run = Run(folder)
    if not folder.is_dir():
        raise UsageError(f"{folder}: there is no such run folder")
    run.require_own_files()
    run.config()
    return run


def best_checkpoint(run: Run) -> tuple[Path, str] | None:
    """Return the checkpoint that represents a run, and what it is: ``best``, or ``latest`` if best.json points to none; None if there is neither."""
    return next(((file, name) for name in ("best", "latest") if (file := run.pointer(name))), None)


def newest_best(parent: Path) -> tuple[Path, str] | None:
    """Return the best checkpoint of the newest run below ``parent``, or its latest if none is the best; and what it is. None if there is no run."""
    found = []
    for config_file in parent.glob("*/config.toml"):
        if best := best_checkpoint(Run(config_file.parent)):
            found.append((best[0].stat().st_mtime_ns, *best))
    return max(found)[1:] if found else None


def find_checkpoints(path: Path) -> list[Path]:
    """Return the checkpoints at a path: a file, a run, an exported folder, or a folder of ``.pth`` files, by epoch.

    Raises:
        UsageError: there is no such path, or no checkpoint in it.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UsageError(f"{path}: there is no such file or folder")
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if not (found := by_epoch(folder)):
        raise UsageError(f"{path}: holds no .pth checkpoint")
    return found


def by_epoch(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder by the epoch in their names; those without one come first."""
    return sorted(folder.glob("*.pth"), key=lambda file: (epoch_in_name(file), file.name))


def epoch_in_name(path: Path) -> int:
    """Return the epoch in a report-style file name, -1 if there is none."""
    match = FILE_NAME.fullmatch(path.name)
    return int(match["epoch"]) if match else -1
