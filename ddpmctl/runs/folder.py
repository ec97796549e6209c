"""Run folders: their names and files, and how they are found."""

from __future__ import annotations

import csv
import json
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from ddpmctl.checkpoints.names import FILE_NAME
from ddpmctl.config import Config
from ddpmctl.config_toml import dump_toml, load_toml
from ddpmctl.errors import DataError, UsageError
from ddpmctl.files import cannot_write, remove_temporary_files, write_text
from ddpmctl.runs.sources import RunSources

LOCK_SECONDS = 0.2  # for a lock that ``is_locked`` holds for a moment
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
    checkpoints = _Inside("checkpoints")  # folder of scored checkpoints
    samples = _Inside("samples")  # folder of sample grids

    @property
    def is_untouched(self) -> bool:
        """Whether nothing was trained here yet: the run was killed before its first state was saved."""
        written = [self.state_file, *(file for file in (self.metrics_file, self.results_file, self.timing_file) if file.exists() and file.stat().st_size)]
        return not any(file.exists() for file in written) and not any(self.checkpoints.glob("*.pth"))

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
        if not self.results_file.is_file():
            return []
        try:
            with self.results_file.open(newline="", encoding="utf-8") as file:
                return list(csv.DictReader(file))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{self.results_file}: cannot be read as CSV ({error})") from None

    def pointer(self, name: str) -> Path | None:
        """Return the checkpoint that ``best.json`` or ``latest.json`` points to, or None."""
        try:
            target = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))["checkpoint"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        path = self.folder / str(target)
        return path if path.is_file() else None

    def point(self, name: str, checkpoint: Path) -> None:
        """Write a checkpoint's path to ``best.json`` or ``latest.json``, which can be copied more easily than a link."""
        write_text(self.folder / f"{name}.json", json.dumps({"checkpoint": checkpoint.relative_to(self.folder).as_posix()}) + "\n")

    def retain(self, count: int) -> None:
        """Delete scored checkpoints except the best, the last, and the ``count`` latest of the others."""
        spared = {self.pointer("best"), self.pointer("latest")}
        others = [file for file in find_checkpoints(self.folder) if file not in spared]
        for file in others[: max(0, len(others) - count)]:
            file.unlink(missing_ok=True)


def create_run(parent: Path, name: str | None, config: Config, sources: RunSources) -> Run:
    """Create a new run folder with its settings atomically; an existing folder is never used.

    Raises:
        UsageError: the name is taken or is not a folder name, or the parent cannot be written to.
    """
    if name is not None and (not re.fullmatch(r"[\w.+-]+", name) or name.strip(".") == ""):
        raise UsageError(f"--name: {name!r} is not a folder name; use letters, digits, '.', '_', '+' and '-'")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _sweep_unfinished(parent)
        made = parent / f".run-{secrets.token_hex(8)}.tmp"
        made.mkdir()
        run = Run(made)
        run.checkpoints.mkdir()
        run.samples.mkdir()
    except OSError as error:
        raise cannot_write(parent, error) from None
    try:
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
                raise UsageError(f"--name: {parent / name} exists already; choose another name, or resume with --resume {parent / name}") from None
    raise UsageError(f"{parent}: holds ten thousand runs called {base}; give --name")


@contextmanager
def locked(run: Run) -> Iterator[None]:
    """Lock a run's folder against other training processes, and remove temporary files of killed ones.

    The operating system releases the lock when the process ends, also if it is killed.

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
        with suppress(OSError):
            (run.folder / ".holder").write_text(f"process {os.getpid()} on {platform.node()}\n", encoding="utf-8")
        for folder in (run.folder, run.checkpoints, run.samples):
            remove_temporary_files(folder)
        yield
    finally:
        with suppress(OSError):
            (run.folder / ".holder").unlink()
        lock.release()


def is_locked(run: Run) -> bool:
    """Return whether a process trains here now; nothing is written."""
    if not (run.folder / ".holder").exists() or not run.lock_file.exists():
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
        return (run.folder / ".holder").read_text(encoding="utf-8")[:200].strip() or "another process"
    except (OSError, UnicodeDecodeError):
        return "another process"


def name_for(config: Config) -> str:
    """Return a run name of the settings that usually differ: network, activation, schedule, budget, seed."""
    model, training = config.model, config.training
    budget = f"{training.epochs}ep" if training.epochs is not None else f"{training.minutes:g}min"
    return f"{model.net}{model.width}-{model.act}-{config.diffusion.schedule}-{budget}-s{training.seed}"


def open_run(folder: Path) -> Run:
    """Return the run in a folder.

    Raises:
        UsageError: the folder is not a run.
    """
    run = Run(folder)
    if not folder.is_dir():
        raise UsageError(f"{folder}: there is no such run folder")
    run.config()
    return run


def newest_best(parent: Path) -> Path:
    """Return the best checkpoint of the newest run below ``parent``, or its latest if none is the best.

    Raises:
        UsageError: there is none.
    """
    found = []
    for config_file in parent.glob("*/config.toml"):
        run = Run(config_file.parent)
        checkpoint = run.pointer("best") or run.pointer("latest")
        if checkpoint is not None:
            found.append((checkpoint.stat().st_mtime_ns, checkpoint))
    if not found:
        raise UsageError(f"no checkpoint named, and {parent}/ has no run with a checkpoint; train first, or name a checkpoint")
    return max(found)[1]


def find_checkpoints(path: Path) -> list[Path]:
    """Return the checkpoints at a path: a file, a run, or a folder of ``.pth`` files, by epoch.

    Raises:
        UsageError: there is no such path, or no checkpoint in it.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UsageError(f"{path}: there is no such file or folder")
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
