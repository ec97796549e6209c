"""The run's log: metrics.jsonl, timing.jsonl and results.csv; a resumed run neither loses nor repeats a row."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddpmctl.errors import DataError
from ddpmctl.files import cannot_write, read_plain
from ddpmctl.runs.folder import MAX_LOG_BYTES, Run
from ddpmctl.training.events import EpochDone, Evaluated, Event, Overridden, RolledBack, StepDone

TIMES = ("seconds", "images_per_second")
KINDS: dict[type, str] = {StepDone: "step", EpochDone: "epoch", RolledBack: "rollback", Overridden: "override"}
EPOCH_ROW = b'{"event": "epoch"'
LOGGED = frozenset({*KINDS, Evaluated})


class RunLog:
    """Appends events to the run's log files.

    Each saved state contains the sizes of the files. On resume, rows written after that state are cut off, because the resumed run
    writes them again; so is an incomplete last line.
    """

    def __init__(self, run: Run, *, writes: bool = True) -> None:
        """Append to the run's files; with several processes, only one ``writes``."""
        self._metrics, self._timing, self._results = run.metrics_file, run.timing_file, run.results_file
        self.files = {file.name: file for file in run.logs if writes}
        self._run, self._lock = run, run.lock_identity()

    def require_folder(self) -> None:
        """Check that the run's folder is still there, before something is written to it.

        Raises:
            UsageError: it was deleted, moved or replaced.
        """
        if self.files:
            self._run.require_present(self._lock)

    def sizes(self) -> dict[str, int]:
        """Return the files' sizes in bytes, after an fsync of each.

        Raises:
            UsageError: the run's folder is gone.
        """
        self.require_folder()
        for file in self.files.values():
            if file.exists():
                with file.open("rb+") as handle:
                    os.fsync(handle.fileno())
        return {name: file.stat().st_size if file.exists() else 0 for name, file in self.files.items()}

    def require_own(self, sizes: Mapping[str, Any], epoch: int, loss: float, where: str) -> None:
        """Check that the log agrees with a saved state: another run of the same settings and data has other losses in a budget of minutes.

        Args:
            sizes: of the files, in the state.
            epoch, loss: the last whole epoch in the state, and its mean loss.
            where: names the state.

        Raises:
            DataError: the log says otherwise, and was longer than now or as long when the state was saved. Nothing is changed.
        """
        size = sizes.get(self._metrics.name)
        if self._metrics.name not in self.files or not isinstance(size, int) or not self._metrics.exists() or self._metrics.stat().st_size < size:
            return
        kept = read_plain(self._metrics, MAX_LOG_BYTES)[:size]
        last = next((line for line in reversed(kept.splitlines()) if line.startswith(EPOCH_ROW)), None)
        try:
            same = last is None or ((row := json.loads(last))["epoch"], row["loss"]) == (epoch, loss)
        except (ValueError, LookupError, TypeError, RecursionError):
            same = False
        if not same or not kept[-1:] == b"\n" * bool(kept):
            raise DataError(f"{where}: does not match {self._metrics.name} in epoch {epoch}: one of them was changed or is of another run; restore it")

    def cut(self, sizes: Mapping[str, Any]) -> list[str]:
        """Truncate the files to the sizes in a saved state; return the names of files that are shorter, having lost rows."""
        short = []
        for name, file in self.files.items():
            size = sizes.get(name)
            size = size if isinstance(size, int) and size >= 0 else 0
            if not file.exists():
                short += [name] * (size > 0)
                continue
            with file.open("rb+") as handle:
                content = handle.read(size)
                handle.truncate(content.rfind(b"\n") + 1)
            short += [name] * (len(content) < size)
        return short

    def read(self, event: Event) -> None:
        """Append an event to the log; events of other kinds are ignored.

        Raises:
            UsageError: the disk is full, or the run's folder is gone.
        """
        if not self.files or type(event) not in LOGGED:
            return
        self.require_folder()
        if isinstance(event, Evaluated):
            scores = {name: value.to_dict() for name, value in event.scores.items()}
            logged = {name: value for name, value in event.__dict__.items() if name != "sharpness"}  # shown only: the file's rows stay as they are
            self._record("evaluation", {**logged, "scores": scores, "checkpoint": event.checkpoint.name})
            self._result(event)
        elif kind := KINDS.get(type(event)):
            self._record(kind, event.__dict__)

    def _record(self, kind: str, values: Mapping[str, Any]) -> None:
        self._append(self._metrics, json.dumps({"event": kind, **{name: value for name, value in values.items() if name not in TIMES}}) + "\n")
        times = {name: values[name] for name in TIMES if name in values}
        if times:
            self._append(self._timing, json.dumps({"event": kind, "step": values["step"], **times}) + "\n")

    def _result(self, event: Evaluated) -> None:
        text, files = io.StringIO(), list(event.scores)
        columns = ("epoch", "step", "images_seen", "seconds", "loss", *files, *(f"{name}_exact" for name in files), "evaluator", "checkpoint")
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        if not self._results.exists() or self._results.stat().st_size == 0:
            writer.writeheader()
        writer.writerow(
            {
                **{name: getattr(event, name) for name in ("epoch", "step", "images_seen", "seconds", "loss", "evaluator")},
                **{name: value.accuracy for name, value in event.scores.items()},
                **{f"{name}_exact": value.exact_match for name, value in event.scores.items()},
                "checkpoint": event.checkpoint.name,
            }
        )
        self._append(self._results, text.getvalue())

    @staticmethod
    def _append(file: Path, text: str) -> None:
        try:
            with file.open("ab") as handle:
                handle.write(text.encode())
        except OSError as error:
            raise cannot_write(file.parent, error) from error
