"""Run folders: their names, their files, and finding them again."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass
from pathlib import Path

from ddpmctl.config import Config
from ddpmctl.config_toml import dump_toml, load_toml
from ddpmctl.engine.checkpoint import FILE_NAME
from ddpmctl.engine.events import EpochDone, Evaluated, Event, StepDone
from ddpmctl.errors import DataError, UsageError
from ddpmctl.files import atomic_write, cannot_write

RESULT_COLUMNS = (
    "epoch", "step", "images_seen", "seconds", "loss", "test", "new_test", "test_exact", "new_test_exact", "evaluator", "checkpoint"
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A run's folder and the files in it."""

    folder: Path

    @property
    def config_file(self) -> Path:
        """The settings, as TOML that ``--config`` reads."""
        return self.folder / "config.toml"

    @property
    def data_file(self) -> Path:
        """Which data the run trains on, as JSON."""
        return self.folder / "data.json"

    @property
    def metrics_file(self) -> Path:
        """One JSON object a line for every logged step, epoch and evaluation."""
        return self.folder / "metrics.jsonl"

    @property
    def results_file(self) -> Path:
        """One row an evaluation."""
        return self.folder / "results.csv"

    @property
    def state_file(self) -> Path:
        """All that is needed to go on: raw and averaged weights, optimizers, counters."""
        return self.folder / "state.pt"

    @property
    def checkpoints(self) -> Path:
        """The folder of scored checkpoints."""
        return self.folder / "checkpoints"

    @property
    def samples(self) -> Path:
        """The folder of sample grids."""
        return self.folder / "samples"

    def config(self) -> Config:
        """Return the run's settings.

        Raises:
            UsageError: the folder is no run.
        """
        if not self.config_file.is_file():
            raise UsageError(f"{self.folder}: is no run (it has no config.toml)")
        return Config.from_flat(load_toml(self.config_file))

    def results(self) -> list[dict[str, str]]:
        """Return the rows of results.csv, as text; none before the first evaluation.

        Raises:
            DataError: the file is no CSV.
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
        """Make ``best.json`` or ``latest.json`` name a checkpoint: a small file survives copying, where links do not."""
        with atomic_write(self.folder / f"{name}.json") as temporary:
            temporary.write_text(json.dumps({"checkpoint": checkpoint.relative_to(self.folder).as_posix()}) + "\n", encoding="utf-8")


def create_run(parent: Path, name: str | None, config: Config, data: dict[str, object]) -> Run:
    """Make a new run folder holding its settings; never an existing one.

    Raises:
        UsageError: the name is taken or no folder name, or the parent cannot be written to.
    """
    if name is not None and (not re.fullmatch(r"[\w.+-]+", name) or name.strip(".") == ""):
        raise UsageError(f"--name: {name!r} is no folder name; use letters, digits, '.', '_', '+' and '-'")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = _claim(parent, name, config)
        (folder / "checkpoints").mkdir()
        (folder / "samples").mkdir()
    except OSError as error:
        raise cannot_write(parent, error) from None
    run = Run(folder)
    with atomic_write(run.config_file) as temporary:
        temporary.write_text(dump_toml(config), encoding="utf-8")
    with atomic_write(run.data_file) as temporary:
        temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    return run


def _claim(parent: Path, name: str | None, config: Config) -> Path:
    if name is not None:
        try:
            (parent / name).mkdir()
        except FileExistsError:
            raise UsageError(f"--name: {parent / name} exists already; choose another name, or go on with --resume {parent / name}") from None
        return parent / name
    base = name_for(config)
    for suffix in ("", *(f"-{n}" for n in range(2, 10_000))):
        try:
            (parent / (base + suffix)).mkdir()
        except FileExistsError:
            continue
        return parent / (base + suffix)
    raise UsageError(f"{parent}: holds ten thousand runs called {base}; give --name")


def name_for(config: Config) -> str:
    """Return a run name that tells runs apart by what people vary: network, activation, schedule, budget, seed."""
    model, training = config.model, config.training
    budget = f"{training.epochs}ep" if training.epochs is not None else f"{training.minutes:g}min"
    return f"{model.net}{model.width}-{model.act}-{config.diffusion.schedule}-{budget}-s{training.seed}"


def open_run(folder: Path) -> Run:
    """Return the run in a folder.

    Raises:
        UsageError: the folder is no run.
    """
    run = Run(folder)
    if not folder.is_dir():
        raise UsageError(f"{folder}: there is no such run folder")
    run.config()
    return run


def newest_best(parent: Path) -> Path:
    """Return the best checkpoint of the newest run below ``parent``; its last where none was scored.

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
        raise UsageError(f"no checkpoint named, and {parent}/ holds no run with one; train first, or name a checkpoint")
    return max(found)[1]


def find_checkpoints(path: Path) -> list[Path]:
    """Return the checkpoints that a path stands for: a file, a run, or a folder of ``.pth`` files, by epoch.

    Raises:
        UsageError: there is no such path, or no checkpoint in it.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UsageError(f"{path}: there is no such file or folder")
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = sorted(folder.glob("*.pth"), key=lambda file: (epoch_in_name(file), file.name))
    if not found:
        raise UsageError(f"{path}: holds no .pth checkpoint")
    return found


def epoch_in_name(path: Path) -> int:
    """Return the epoch that a report-style file name tells, -1 where it tells none."""
    match = FILE_NAME.fullmatch(path.name)
    return int(match["epoch"]) if match else -1


class RunLog:
    """The reader of the event stream that writes metrics.jsonl and results.csv."""

    def __init__(self, run: Run) -> None:
        """Append to the run's files; a last line that a crash cut short is dropped, so that no row is glued to it."""
        self.run = run
        for file in (run.metrics_file, run.results_file):
            _drop_torn_line(file)

    def read(self, event: Event) -> None:
        """Append an event that belongs in the log; others are passed over."""
        match event:
            case StepDone():
                self._append({"event": "step", **event.__dict__})
            case EpochDone():
                self._append({"event": "epoch", **event.__dict__})
            case Evaluated():
                scores = {name: value.to_dict() for name, value in event.scores.items()}
                self._append({"event": "evaluation", **event.__dict__, "scores": scores, "checkpoint": event.checkpoint.name})
                self._append_result(event)

    def _append(self, record: dict[str, object]) -> None:
        with self.run.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def _append_result(self, event: Evaluated) -> None:
        new = not self.run.results_file.exists() or self.run.results_file.stat().st_size == 0
        with self.run.results_file.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, RESULT_COLUMNS)
            if new:
                writer.writeheader()
            writer.writerow(
                {
                    **{name: getattr(event, name) for name in ("epoch", "step", "images_seen", "seconds", "loss", "evaluator")},
                    **{name: value.accuracy for name, value in event.scores.items()},
                    **{f"{name}_exact": value.exact_match for name, value in event.scores.items()},
                    "checkpoint": event.checkpoint.name,
                }
            )


def _drop_torn_line(file: Path) -> None:
    if not file.exists():
        return
    with file.open("rb+") as handle:
        content = handle.read()
        handle.truncate(content.rfind(b"\n") + 1)
