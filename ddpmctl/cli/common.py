"""Steps that several commands share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ddpmctl.cli.options import assumed, overrides
from ddpmctl.cli.terminal import Terminal
from ddpmctl.config import Config, Value
from ddpmctl.distributed.job import ALONE, Ranks
from ddpmctl.errors import UsageError
from ddpmctl.files import cannot_write
from ddpmctl.labels import CLASSES, class_index

if TYPE_CHECKING:
    from ddpmctl.checkpoints.format import Checkpoint
    from ddpmctl.device import Machine
    from ddpmctl.evaluation.classifiers import Evaluator
    from ddpmctl.evaluation.evaluate import Task
    from ddpmctl.labels import LabelSet
    from ddpmctl.sampling.pipeline import Painter


def only_one_source(data: Path | None, scenes: int | None) -> None:
    """Refuse ``--scenes`` beside ``--data``: one of them would be ignored in silence.

    Raises:
        UsageError: both were given.
    """
    if data is not None and scenes is not None:
        raise UsageError("--scenes sets the size of the embedded benchmark and does not go with --data")


def parse_labels(texts: Sequence[str]) -> list[tuple[str, ...]]:
    """Return ``--labels`` texts as label sets; a comma list is one image's objects.

    Raises:
        UsageError: an empty list, an unknown label, or one named twice.
    """
    sets = []
    for text in texts:
        names = [part.strip() for part in text.split(",")]
        if not all(names):
            raise UsageError(f'--labels {text!r}: a label is missing; give e.g. --labels "red cube,blue sphere"')
        try:
            labels = tuple(CLASSES[class_index(name)] for name in names)
        except UsageError as error:
            raise UsageError(f"--labels: {error}") from None
        if len(set(labels)) < len(labels):
            raise UsageError(f"--labels {text!r}: a label is named twice, but images hold no object twice")
        sets.append(labels)
    return sets


def prepare_output(path: Path, flag: str, *, folder: bool) -> None:
    """Make an output folder, or a file's parent, before any work is done for it.

    Raises:
        UsageError: it cannot be made or written to.
    """
    target = path if folder else path.parent
    if not folder and path.is_dir():
        raise UsageError(f"{flag}: {path} is a folder; name a file in it")
    try:
        target.mkdir(parents=True, exist_ok=True)
        probe = target / ".ddpmctl-probe.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"{flag}: {cannot_write(target, error)}") from None


def prepare_files(files: Mapping[str, Path | None]) -> None:
    """Make the folders of the files to write, given by flag, before any work is done for them; '-' is stdout.

    Raises:
        UsageError: one cannot be written to, or two flags name one file.
    """
    named: dict[Path, str] = {}
    for flag, file in files.items():
        if file is None or str(file) == "-":
            continue
        if (other := named.setdefault(file.resolve(), flag)) != flag:
            raise UsageError(f"{other} and {flag}: both name {file}, and one would overwrite the other")
        prepare_output(file, flag, folder=False)


def ready_task(
    conditions: Mapping[str, Sequence[LabelSet]],
    evaluator: Path | None,
    data: Path | None,
    given: Given,
    *,
    seed: int,
    repeats: int,
    ranks: Ranks = ALONE,
) -> Task:
    """Return what every checkpoint is to be put through, with the evaluator loaded and the machine chosen.

    Raises:
        UsageError, DataError: the evaluator or a machine setting cannot be used.
    """
    from ddpmctl.evaluation.classifiers import load_evaluator
    from ddpmctl.evaluation.evaluate import Task

    machine = agreed_machine(given.machine, ranks)
    judge = load_evaluator(evaluator, data, machine.device)
    ranks.must_agree("task", {"conditions": {name: list(sets) for name, sets in conditions.items()}, "evaluator": judge.sha256[:12], **given.__dict__})
    return Task(conditions, judge, machine, seed, repeats, given.sampling, given.assumed, ranks=ranks)


def agreed_machine(settings: Mapping[str, Value], ranks: Ranks) -> Machine:
    """Return where this process works, in the precision that rank 0 finds best.

    Raises:
        UsageError: a setting cannot be used here.
    """
    from ddpmctl.device import make_machine

    config = Config().replace(**settings)
    return make_machine(config.replace(precision=ranks.first_says(lambda: make_machine(config.machine).precision)).machine, ranks.local)


@dataclass(frozen=True)
class Given:
    """The settings that a person gave to a command that judges checkpoints, checked."""

    sampling: dict[str, Value]
    machine: dict[str, Value]
    assumed: dict[str, Value]

    @staticmethod
    def of(given: dict[str, str], config_file: Path | None, assume: list[str] | None) -> Given:
        """Return them from flags, environment and files; UsageError where one cannot be used."""
        return Given(overrides(given, "sampling", config_file=config_file), overrides(given, "machine", config_file=config_file), assumed(assume))


def chosen_checkpoint(named: Path | None, runs_dir: Path, assume: dict[str, Value], terminal: Terminal) -> Checkpoint:
    """Return the checkpoint that was named (a run's best, for a run), or the best of the newest run, saying so."""
    from ddpmctl.checkpoints.format import load_checkpoint
    from ddpmctl.training.run_folder import Run, newest_best

    if named is None:
        named = newest_best(runs_dir)
        terminal.say(f"checkpoint: {named} (the newest run's best)")
    elif named.is_dir():
        pointer = Run(named).pointer("best") or Run(named).pointer("latest")
        if pointer is None:
            raise UsageError(f"{named}: is no run with a checkpoint; name a .pth file or a run")
        named = pointer
        terminal.say(f"checkpoint: {named} (the run's best)")
    checkpoint = load_checkpoint(named, assume)
    if checkpoint.foreign:
        config = checkpoint.config
        terminal.warn(
            f"{named} carries no settings: taken as {config.model.net}, act {config.model.act}, width {config.model.width}, "
            f"schedule {config.diffusion.schedule}, T = {config.diffusion.timesteps}; change that with --assume act=relu and the like"
        )
    return checkpoint


def ready_painter(
    named: Path | None,
    runs_dir: Path,
    given: dict[str, str],
    config_file: Path | None,
    assume: list[str] | None,
    terminal: Terminal,
    ranks: Ranks = ALONE,
) -> Painter:
    """Return what makes pictures from the checkpoint chosen, with the sampling settings given, after saying what it is.

    Raises:
        UsageError, DataError: a setting or the checkpoint cannot be used.
    """
    changes, assumptions = overrides(given, "sampling", config_file=config_file), assumed(assume)
    machine_settings = overrides(given, "machine", config_file=config_file)

    from ddpmctl.evaluation.evaluate import painter_for

    checkpoint = chosen_checkpoint(named, runs_dir, assumptions, terminal)
    ranks.must_agree("checkpoint", {"its content": checkpoint.sha256[:12], **changes})
    painter = painter_for(checkpoint, changes, agreed_machine(machine_settings, ranks))
    terminal.say(painter.describe())
    return painter


def describe_evaluator(evaluator: Evaluator) -> str:
    """Return an evaluator's name with the beginning of its hash."""
    return f"{evaluator.name} ({evaluator.sha256[:12]})"
