"""What an evaluation or a sampling works on: a checkpoint, conditions, a classifier, a device and real images, as a person named them."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ddpmctl.checkpoints.names import PRETRAINED, WEIGHTS
from ddpmctl.config import Config, Value
from ddpmctl.data.dataset import Conditions, load_conditions, load_dataset
from ddpmctl.data.folders import read_conditions
from ddpmctl.data.source import DataSource
from ddpmctl.distributed.job import SINGLE, Job
from ddpmctl.errors import UsageError
from ddpmctl.evaluation.classifier_file import KnownClassifier, find_classifier
from ddpmctl.evaluation.evaluate import EvaluationSpec
from ddpmctl.evaluation.remembered_device import RememberedDevice, remember_device, remembered_device
from ddpmctl.evaluation.results import all_images
from ddpmctl.runs.conditions import conditions_of_run
from ddpmctl.runs.folder import Run, best_checkpoint, newest_best
from ddpmctl.runs.named import located
from ddpmctl.task import LabelSet, Task

if TYPE_CHECKING:
    from ddpmctl.device import ComputeDevice
    from ddpmctl.evaluation.fidelity import Fidelity, Reference
    from ddpmctl.evaluation.results import FileResults
    from ddpmctl.progress import Notice, Progress


def checkpoint_path(named: Path | None, runs_dir: Path) -> tuple[Path, str]:
    """Return the file of the checkpoint that a command takes, and in words which one it is, where that was not given.

    For a run, it is the run's best; without a name, that of the newest run, or the model that comes with ddpmctl where there is no run.

    Raises:
        UsageError: there is none.
    """
    if named is None:
        if (newest := newest_best(runs_dir)) is not None:
            return newest[0], f"the newest run's {newest[1]}"
        if not runs_dir.exists() and runs_dir != Path("runs"):
            raise UsageError(f"--runs-dir: there is no folder {runs_dir}; train first, or name another folder")
        return PRETRAINED / WEIGHTS, f"it comes with ddpmctl; {runs_dir}/ has no run with a checkpoint"
    if not (path := located(named, runs_dir)).is_dir():
        return path, ""
    if (exported := path / WEIGHTS).is_file():
        return exported, ""
    if (found := best_checkpoint(Run(path))) is None:
        raise UsageError(f"{path}: is not a run with a checkpoint that best.json or latest.json names; name a .pth file or a run")
    return found[0], f"the run's {found[1]}"


def known_conditions(source: DataSource, checkpoints: Sequence[Path]) -> tuple[Conditions, DataSource]:
    """Return the conditions, and the data that they are of: of the named source, or of the first checkpoint's run if its data are not i-CLEVR's.

    Raises:
        UsageError, DataError: they cannot be read.
    """
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
    conditions: Mapping[str, Sequence[LabelSet]], evaluator: Path | None, data: Path | None, task: Task,
    *, device: Mapping[str, Value], sampling: Mapping[str, Value], assumed: Mapping[str, Value], seed: int, repeats: int, job: Job = SINGLE,
) -> EvaluationSpec:  # fmt: skip
    """Return the settings of an evaluation, with the classifier found and the device chosen: nothing is loaded before an image is missing in the cache.

    ``device``, ``sampling`` and ``assumed`` are flat settings that were given.

    Raises:
        UsageError, DataError: the classifier or a device setting cannot be used.
    """
    settings = Config().replace(**device).device
    file = find_classifier(evaluator, data, task)
    classifier: KnownClassifier = file
    compute: ComputeDevice | RememberedDevice | None = remembered_device(settings) if job.is_single else None
    if compute is None:
        compute = agreed_device(device, job)
        remember_device(settings, compute)
        classifier = file.load(str(compute.device))
    agreed = {"conditions": {name: list(sets) for name, sets in conditions.items()}, "evaluator": classifier.sha256[:12]}
    job.require_same("task", {**agreed, "sampling": sampling, "device": device, "assumed": assumed})
    return EvaluationSpec(conditions, classifier, compute, seed, repeats, sampling, assumed, job=job)


def reference_images(spec: EvaluationSpec, source: DataSource) -> Generator[Progress | Notice, None, tuple[Reference, str]]:
    """Yield progress and return the real images that samples are compared with, and a text that says where they come from.

    Raises:
        UsageError, DataError: the data cannot be read, or a condition has no real images.
    """
    from ddpmctl.data.reference import real_images
    from ddpmctl.evaluation.fidelity import Reference

    dataset = yield from load_dataset(source)
    real = yield from real_images(dataset, [labels for sets in spec.conditions.values() for labels in sets], spec.repeats)
    return Reference(real.images[0], real.images[1], dataset.images, real.same_scene), real.source


def agreed_device(settings: Mapping[str, Value], job: Job = SINGLE) -> ComputeDevice:
    """Return this process's device, with the precision that rank 0 chose.

    Raises:
        UsageError: a setting cannot be used here.
    """
    from ddpmctl.device import make_compute_device

    config = Config().replace(**settings)
    return make_compute_device(config.replace(precision=job.from_leader(lambda: make_compute_device(config.device).precision)).device, job.local)


def measured_fidelity(rows: Sequence[Mapping[str, FileResults]], spec: EvaluationSpec, reference: Reference) -> Generator[Progress, None, list[Fidelity]]:
    """Yield progress and return the fidelity of the images of each row, which has all its images."""
    from ddpmctl.evaluation.fidelity import PreparedReference, measure_fidelity

    prepared, found = PreparedReference(reference, spec.tools().classifier), []
    for answers in rows:
        found.append((yield from measure_fidelity(all_images(answers), prepared)))
    return found
