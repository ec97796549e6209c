"""Checkpoints that no longer belong to a run, because it goes on from an earlier state."""

from __future__ import annotations

import itertools
import math
from contextlib import suppress
from pathlib import Path

from ddpmctl.checkpoints.names import recorded_in_name
from ddpmctl.errors import DataError
from ddpmctl.runs.folder import Run, by_epoch, epoch_in_name
from ddpmctl.runs.record import mean, scored_in
from ddpmctl.statistics.ranking import Standing


def abandon(run: Run, after: int) -> list[str]:
    """Move checkpoints of later epochs than ``after`` to ``checkpoints/abandoned``, correct the pointers, and return the names.

    They were written after the state from which the run resumes, and their steps will be trained again.
    """
    later = [file for file in by_epoch(run.checkpoints) if epoch_in_name(file) > after]
    if not later:
        return []
    run.abandoned.mkdir(exist_ok=True)
    for file in later:
        places = (run.abandoned / f"{'again-' * count}{file.name}" for count in itertools.count())
        file.rename(next(place for place in places if not place.exists()))
    kept = [file for file in by_epoch(run.checkpoints) if epoch_in_name(file) >= 0]
    standings = _standings(run, kept)
    for name in ("best", "latest"):
        if run.pointer(name) is None and kept:
            run.point(name, kept[-1] if name == "latest" else max(kept, key=standings.__getitem__))
        elif run.pointer(name) is None:
            (run.folder / f"{name}.json").unlink(missing_ok=True)
    return [file.name for file in later]


def _standings(run: Run, files: list[Path]) -> dict[Path, Standing]:
    """Return the standings of scored checkpoints: accuracies are in their names, exact match in results.csv, unless its row is lost."""
    exact: dict[str, float] = {}
    with suppress(DataError):
        exact = {scored.checkpoint: mean(scored.exact) for scored in scored_in(run)}
    recorded = {file: recorded_in_name(file) for file in files}
    accuracy = {file: mean({name: value for name, value in of.items() if name != "epoch"}) for file, of in recorded.items()}
    return {file: Standing.of(accuracy[file], exact.get(file.name, math.nan), int(of["epoch"])) for file, of in recorded.items()}
