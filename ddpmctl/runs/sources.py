"""``data.json`` of a run: its data, what they ask of the network, and its classifier."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ddpmctl.data.source import DataSource
from ddpmctl.errors import DataError, UsageError
from ddpmctl.files import read_plain, write_text
from ddpmctl.iclevr import ICLEVR
from ddpmctl.task import Task

MAX_BYTES = 2**20  # of the small files of a run: its settings, data, pointers


@dataclass(frozen=True)
class RunSources:
    """A run's data and classifier.

    Attributes:
        source: the data.
        key: hash of labels and pixels.
        evaluator: file of the classifier; None for the built-in one, or for none.
        evaluator_sha256: hash of that file; empty if the run has no classifier.
        task: what the data ask of the network.
        weights: hash of the checkpoint that training started from; empty for random weights.
    """

    source: DataSource
    key: str
    evaluator: Path | None
    evaluator_sha256: str
    task: Task = ICLEVR
    weights: str = ""

    def describe(self) -> str:
        """Return the data in words."""
        return f"benchmark, {self.source.scenes:,} scenes" if self.source.path is None else str(self.source.path)

    def save(self, file: Path) -> None:
        """Write the record as JSON."""
        source, task = self.source, self.task
        content: dict[str, Any] = {
            "data": source.path,
            "scenes": source.scenes,
            "key": self.key,
            "evaluator": self.evaluator,
            "evaluator_sha256": self.evaluator_sha256,
        }
        if reading := {name: value for name, value in asdict(source).items() if name in READING and value != READING[name]}:
            content["reading"] = reading
        if task != ICLEVR:
            content["task"] = task.to_dict()
        if self.weights:
            content["weights"] = self.weights
        write_text(file, json.dumps(content, indent=2, default=str) + "\n")

    @staticmethod
    def load(file: Path) -> RunSources:
        """Return the record in a file.

        Raises:
            DataError: the file is missing or damaged.
        """
        try:
            content = json.loads(read_plain(file, MAX_BYTES))
            data, evaluator = (None if content[name] is None else Path(content[name]) for name in ("data", "evaluator"))
            scenes = int(content["scenes"]) if data is None else None
            source = DataSource.checked(path=data, scenes=scenes, **content.get("reading", {}))
            task = Task.from_dict(content["task"]) if "task" in content else ICLEVR
            return RunSources(source, str(content["key"]), evaluator, str(content["evaluator_sha256"]), task, str(content.get("weights", "")))
        except (OSError, ValueError, LookupError, TypeError, RecursionError, UsageError):
            raise DataError(f"{file}: missing or damaged, so the run's data are unknown") from None


READING: dict[str, Any] = {field.name: field.default for field in fields(DataSource) if field.name not in ("path", "scenes")}
"""How images are read, by default."""
