"""Steps that several commands share."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ddpmctl.cli.terminal import Terminal
from ddpmctl.config import Config, Value
from ddpmctl.config_sources import assumed, overrides
from ddpmctl.data.source import DataSource
from ddpmctl.distributed.job import SINGLE, Job
from ddpmctl.errors import UsageError
from ddpmctl.task import LabelSet, Task

if TYPE_CHECKING:
    from ddpmctl.checkpoints.format import Checkpoint
    from ddpmctl.data.dataset import Conditions
    from ddpmctl.device import ComputeDevice
    from ddpmctl.evaluation.classifier_file import KnownClassifier
    from ddpmctl.evaluation.evaluate import EvaluationSpec
    from ddpmctl.evaluation.fidelity import Reference
    from ddpmctl.evaluation.remembered_device import RememberedDevice
    from ddpmctl.evaluation.results import FileResults
    from ddpmctl.progress import Notice, Progress
    from ddpmctl.report.page import BesideReal
    from ddpmctl.sampling.pipeline import SamplingPipeline


def known_conditions(source: DataSource, checkpoints: Sequence[Path]) -> tuple[Conditions, DataSource]:
    """Return the conditions, and the data that they are of: of the named source, or of the first checkpoint's run if its data are not i-CLEVR's.

    Raises:
        UsageError, DataError: they cannot be read.
    """
    from ddpmctl.data.dataset import load_conditions
    from ddpmctl.runs.conditions import conditions_of_run
    from ddpmctl.runs.folder import Run

    run = Run(checkpoints[0].parent.parent) if checkpoints else None
    if run is not None and run.data_file.is_file() and (found := conditions_of_run(run)) is not None:
        own = found[1]
        if source in (DataSource(), replace(DataSource(), path=own.path)) or (source.path is not None and source.path.resolve() == own.path):
            return found
    return load_conditions(source), source


def named_conditions(files: Sequence[Path] | None, known: Conditions) -> Mapping[str, Sequence[LabelSet]]:
    """Return the conditions by the name of their file: those named, each a name of the data's or a JSON file, else all of the data.

    Raises:
        UsageError, DataError: there is no such name or file, the file cannot be used, or two have the same name.
    """
    from ddpmctl.data.folders import read_conditions

    if not files:
        return known.conditions
    named: dict[str, Sequence[LabelSet]] = {}
    for file in files:
        if not file.exists() and str(file) not in known.conditions:
            names = ", ".join(known.conditions)
            raise UsageError(f"--conditions: {str(file)!r} is neither a JSON file nor one of {names}, the condition files of the data ({known.name})")
        named[file.stem] = known.conditions[str(file)] if str(file) in known.conditions else read_conditions(file, known.task)
    if len(named) < len(files):
        raise UsageError("--conditions: two files have the same name; their columns could not be told apart")
    return named


def evaluation_spec(
    conditions: Mapping[str, Sequence[LabelSet]], evaluator: Path | None, data: Path | None, task: Task, given: Given,
    *, seed: int, repeats: int, job: Job = SINGLE,
) -> EvaluationSpec:  # fmt: skip
    """Return the settings of an evaluation, with the classifier found and the device chosen: nothing is loaded before an image is missing in the cache.

    Raises:
        UsageError, DataError: the classifier or a device setting cannot be used.
    """
    from ddpmctl.evaluation.classifier_file import find_classifier
    from ddpmctl.evaluation.evaluate import EvaluationSpec
    from ddpmctl.evaluation.remembered_device import remember_device, remembered_device

    settings = Config().replace(**given.device).device
    file = find_classifier(evaluator, data, task)
    classifier: KnownClassifier = file
    compute: ComputeDevice | RememberedDevice | None = remembered_device(settings) if job.is_single else None
    if compute is None:
        compute = agreed_device(given.device, job)
        remember_device(settings, compute)
        classifier = file.load(str(compute.device))
    job.require_same("task", {"conditions": {name: list(sets) for name, sets in conditions.items()}, "evaluator": classifier.sha256[:12], **given.__dict__})
    return EvaluationSpec(conditions, classifier, compute, seed, repeats, given.sampling, given.assumed, job=job)


def reference_images(spec: EvaluationSpec, source: DataSource) -> Generator[Progress | Notice, None, tuple[Reference, str]]:
    """Yield progress and return the real images that samples are compared with, and a text that says where they come from.

    Raises:
        UsageError, DataError: the data cannot be read, or a condition has no real images.
    """
    from ddpmctl.data.dataset import load_dataset
    from ddpmctl.data.reference import real_images
    from ddpmctl.evaluation.fidelity import Reference

    dataset = yield from load_dataset(source)
    real = yield from real_images(dataset, [labels for sets in spec.conditions.values() for labels in sets], spec.repeats)
    return Reference(real.images[0], real.images[1], dataset.images, real.same_scene), real.source


def beside_real(
    terminal: Terminal, names: Sequence[str], rows: Sequence[Mapping[str, FileResults]], spec: EvaluationSpec, reference: Reference, source: str
) -> BesideReal:
    """Return the fidelity of all rows' images, with a table for each, and real images of the conditions."""
    from ddpmctl.evaluation.fidelity import PreparedReference, measure_fidelity
    from ddpmctl.evaluation.results import all_images
    from ddpmctl.report.page import BesideReal
    from ddpmctl.report.tables import fidelity_table

    prepared = PreparedReference(reference, spec.tools().classifier)
    found = [terminal.finish(measure_fidelity(all_images(answers), prepared)) for answers in rows]
    tables = [fidelity_table(name, fidelity, source) for name, fidelity in zip(names, found, strict=True)]
    return BesideReal(found, tables, reference.first[:, 0])


def agreed_device(settings: Mapping[str, Value], job: Job) -> ComputeDevice:
    """Return where this process works, in the precision that rank 0 finds best.

    Raises:
        UsageError: a setting cannot be used here.
    """
    from ddpmctl.device import make_compute_device

    config = Config().replace(**settings)
    return make_compute_device(config.replace(precision=job.from_leader(lambda: make_compute_device(config.device).precision)).device, job.local)


@dataclass(frozen=True)
class Given:
    """The settings given to a command that samples from checkpoints, checked."""

    sampling: dict[str, Value]
    device: dict[str, Value]
    assumed: dict[str, Value]

    @staticmethod
    def of(given: dict[str, str], config_file: Path | None, assume: list[str] | None) -> Given:
        """Return them from flags, environment variables and files; UsageError if one cannot be used."""
        return Given(overrides(given, "sampling", config_file=config_file), overrides(given, "device", config_file=config_file), assumed(assume))


def chosen_checkpoint(named: Path | None, runs_dir: Path, assume: dict[str, Value], terminal: Terminal) -> Checkpoint:
    """Return the checkpoint that was named (a run's best, for a run), or the best of the newest run, saying so."""
    from ddpmctl.checkpoints.format import load_checkpoint
    from ddpmctl.runs.folder import Run, best_checkpoint, newest_best
    from ddpmctl.runs.named import located

    if named is None:
        named, which = newest_best(runs_dir)
        terminal.say(f"checkpoint: {named} (the newest run's {which})")
    elif (named := located(named, runs_dir)).is_dir():
        if (found := best_checkpoint(Run(named))) is None:
            raise UsageError(f"{named}: is not a run with a checkpoint that best.json or latest.json names; name a .pth file or a run")
        named, which = found
        terminal.say(f"checkpoint: {named} (the run's {which})")
    checkpoint = load_checkpoint(named, assume)
    if checkpoint.foreign:
        config = checkpoint.config
        terminal.warn(
            f"{named} carries no settings: taken as {config.model.net}, act {config.model.act}, width {config.model.width}, "
            f"schedule {config.diffusion.schedule}, T = {config.diffusion.timesteps}; change that with --assume act=relu and the like"
        )
    return checkpoint


def ready_pipeline(named: Path | None, runs_dir: Path, given: Given, terminal: Terminal, job: Job = SINGLE) -> SamplingPipeline:
    """Return the sampling pipeline of the chosen checkpoint with the given settings, and print what it is.

    Raises:
        UsageError, DataError: a setting or the checkpoint cannot be used.
    """
    with terminal.busy("loading torch and the checkpoint"):
        from ddpmctl.evaluation.evaluate import pipeline_for

        checkpoint = chosen_checkpoint(named, runs_dir, given.assumed, terminal)
        job.require_same("checkpoint", {"its content": checkpoint.sha256[:12], **given.sampling})
        pipeline = pipeline_for(checkpoint, given.sampling, agreed_device(given.device, job))
    terminal.say(pipeline.describe())
    return pipeline
