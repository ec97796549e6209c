"""``data.json`` of a run: its data and its classifier."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ddpmctl.errors import DataError
from ddpmctl.files import read_plain, write_text

MAX_BYTES = 2**20  # of the small files of a run: its settings, data, pointers


@dataclass(frozen=True)
class RunSources:
    """A run's data and classifier.

    Attributes:
        data: the lab's folder; None for the embedded benchmark.
        scenes: scenes of the embedded benchmark; None for a folder.
        key: hash of labels and pixels.
        evaluator: file of the classifier; None for the built-in one.
        evaluator_sha256: hash of that file.
    """

    data: Path | None
    scenes: int | None
    key: str
    evaluator: Path | None
    evaluator_sha256: str

    def describe(self) -> str:
        """Return the data in words."""
        return f"benchmark, {self.scenes:,} scenes" if self.data is None else str(self.data)

    def save(self, file: Path) -> None:
        """Write the record as JSON."""
        write_text(file, json.dumps(asdict(self), indent=2, default=str) + "\n")

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
            return RunSources(data, scenes, str(content["key"]), evaluator, str(content["evaluator_sha256"]))
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            raise DataError(f"{file}: missing or damaged, so the run's data are unknown") from None
