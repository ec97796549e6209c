"""``ddpmctl.train``: train a model, event by event."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ddpmctl.config import RECIPE, Config, settings
from ddpmctl.config_sources import resolve
from ddpmctl.data.source import DataSource
from ddpmctl.errors import UsageError
from ddpmctl.interface.choices import checkpoint_path
from ddpmctl.interface.model import Model, load
from ddpmctl.interface.tasks import checked
from ddpmctl.runs.folder import open_run
from ddpmctl.runs.named import located
from ddpmctl.training.events import Event, Prepared
from ddpmctl.training.resuming import resumed_config
from ddpmctl.training.session import TrainingRequest, run_training
from ddpmctl.training.starting import with_network_of

READING = ("size", "fit", "format", "label_column", "repeated", "hold_out")
AROUND = ("device", "run")  # settings that are not part of the recipe


class Training(Iterator[Event]):
    """A training run, as an iterator over its events: it trains while it is iterated. Made by ``ddpmctl.train``.

    An interrupted run can be continued with ``ddpmctl.train(resume=...)``.

    Attributes:
        config: every setting.
    """

    def __init__(self, request: TrainingRequest) -> None:
        """Prepare it; training begins with the first event."""
        self.config = request.config
        self._events = run_training(request)
        self._folder: Path | None = request.resume

    def __next__(self) -> Event:
        """Train until the next event and return it."""
        event = next(self._events)
        if isinstance(event, Prepared):
            self._folder = event.plan.run
        return event

    @property
    def folder(self) -> Path:
        """The run's folder.

        Raises:
            UsageError: it does not exist yet; it does from the event ``Prepared`` on.
        """
        if self._folder is None:
            raise UsageError("the run has no folder yet; iterate over the training first")
        return self._folder

    def finish(self) -> Model:
        """Train to the end and return the run's best model."""
        for _ in self:
            pass
        return load(self.folder)

    def close(self) -> None:
        """End the training now and release the run's folder; it can be resumed from its last saved state."""
        self._events.close()


def train(
    *, preset: str = "report", data: str | Path | None = None, scenes: int | None = None, evaluator: str | Path | None = None, name: str | None = None,
    runs_dir: str | Path = "runs", weights: str | Path | None = None, resume: str | Path | None = None, **given: Any,
) -> Training:  # fmt: skip
    """Train a model as ``ddpmctl train`` does; returns an iterator over the events.

    ``for event in ddpmctl.train(preset="quick", minutes=5): ...`` trains for 5 minutes, and ``ddpmctl.train(...).finish()`` returns the model.
    Settings are those given here, of the preset and the defaults: no environment variables and no files.

    Args:
        preset: named settings to start from.
        data: folder, or zip file, of the data; None for the embedded benchmark.
        scenes: size of the embedded benchmark.
        evaluator: file of the classifier; None for the default one of the data.
        name: of the run's folder in ``runs_dir``; None for one made from the settings.
        runs_dir: the folder of runs.
        weights: a checkpoint, or a run, to start from, whose network is taken; None for random weights.
        resume: a run to go on with; settings that are given then change.
        given: settings by name, such as ``minutes=5`` or ``act="gelu"``, and how images are read: ``size``, ``fit``, ``format``, ``label_column``,
            ``repeated``, ``hold_out``.

    Raises:
        UsageError, DataError: an argument cannot be used. Problems of the data are raised with the first event.
    """
    reading = {key: value for key, value in given.items() if key in READING}
    others = {key: value for key, value in given.items() if key not in READING}
    if isinstance(reading.get("label_column"), str):
        reading["label_column"] = (reading["label_column"],)
    if resume is not None and (reading or scenes is not None or name is not None or weights is not None):
        raise UsageError("resume: a run keeps its folder, its weights and how its images are read")
    source = DataSource.checked(path=None if data is None else Path(data), scenes=scenes, **reading)
    runs, own = Path(runs_dir), None if resume is None else located(Path(resume), Path(runs_dir))
    start = None if weights is None else checkpoint_path(Path(weights), runs)[0]
    config = _config(preset, others, start) if own is None else _resumed(own, others)
    return Training(TrainingRequest(config, source, None if evaluator is None else Path(evaluator), start, name, runs, own))


def _config(preset: str, given: Mapping[str, Any], start: Path | None) -> Config:
    resolved = resolve(checked(given, *RECIPE, *AROUND), None, preset, environ={})
    return (resolved if start is None else with_network_of(start, resolved)).config


def _resumed(folder: Path, given: Mapping[str, Any]) -> Config:
    """Return a run's settings with changes; those of its recipe are allowed to change because they were given."""
    recorded = open_run(folder).config().flat()
    around = checked({name: value for name, value in given.items() if name in {setting.name for part in AROUND for setting in settings(part)}}, *AROUND)
    recipe = checked({name: value for name, value in given.items() if name not in around}, *RECIPE)
    return resumed_config(folder, around, recipe, {name for name, value in recipe.items() if value != recorded[name]})[0]
