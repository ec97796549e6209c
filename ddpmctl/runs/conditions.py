"""The conditions of a run whose data bring none: label sets of its images, some of them kept out of training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

from ddpmctl.data.conditions import HELD_OUT
from ddpmctl.data.dataset import Conditions, load_conditions
from ddpmctl.data.folders import read_json
from ddpmctl.data.source import DataSource
from ddpmctl.errors import DataError, show
from ddpmctl.files import write_text
from ddpmctl.iclevr import ICLEVR
from ddpmctl.runs.folder import Run
from ddpmctl.runs.sources import RunSources
from ddpmctl.task import LabelSet, Task


def save_conditions(run: Run, conditions: Mapping[str, Sequence[LabelSet]]) -> None:
    """Write a JSON file for each list of conditions, which ``--conditions`` can name."""
    run.conditions.mkdir(exist_ok=True)
    for name, sets in conditions.items():
        write_text(run.conditions / f"{name}.json", json.dumps(list(map(list, sets)), ensure_ascii=False) + "\n")


def conditions_of_run(run: Run) -> tuple[Conditions, DataSource] | None:
    """Return a run's conditions and data; None if they are i-CLEVR's at its usual size.

    Raises:
        UsageError, DataError: a file is missing or damaged.
    """
    sources = RunSources.load(run.data_file)
    if sources.task == ICLEVR:
        return None
    files = {name: run.conditions / f"{name}.json" for name in sources.task.scored}
    if not all(file.is_file() for file in files.values()):
        return load_conditions(sources.source), sources.source
    found = {name: [_checked(entry, sources.task, str(file)) for entry in _list(read_json(file), str(file))] for name, file in files.items()}
    trained = frozenset(frozenset(one) for name, sets in found.items() if name != HELD_OUT for one in sets)
    key = hashlib.sha256(json.dumps(found).encode()).hexdigest()
    return Conditions(sources.describe(), key, found, sources.source.path, trained, 0, sources.task), sources.source


def _list(value: object, where: str) -> list[object]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: must be a list of lists of labels; restore the file")
    return value


def _checked(entry: object, task: Task, where: str) -> LabelSet:
    if not isinstance(entry, list) or not all(isinstance(name, str) and name in task.index for name in entry) or len(set(entry)) < len(entry):
        raise DataError(f"{where}: {show(entry)} is not a list of different labels of the run; restore the file")
    return tuple(entry)
