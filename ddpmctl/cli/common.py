"""Steps that several commands share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ddpmctl.checkpoints.names import PRETRAINED, PRETRAINED_NAME
from ddpmctl.cli.terminal import Terminal
from ddpmctl.config import Value
from ddpmctl.config_sources import assumed, overrides
from ddpmctl.distributed.job import SINGLE, Job
from ddpmctl.errors import DdpmctlError
from ddpmctl.iclevr import ICLEVR
from ddpmctl.task import Task

if TYPE_CHECKING:
    from ddpmctl.checkpoints.format import Checkpoint
    from ddpmctl.evaluation.evaluate import EvaluationSpec
    from ddpmctl.evaluation.fidelity import Reference
    from ddpmctl.evaluation.results import FileResults
    from ddpmctl.report.page import BesideReal
    from ddpmctl.sampling.pipeline import SamplingPipeline


def beside_real(
    terminal: Terminal, names: Sequence[str], rows: Sequence[Mapping[str, FileResults]], spec: EvaluationSpec, reference: Reference, source: str
) -> BesideReal:
    """Return the fidelity of all rows' images, with a table for each, and real images of the conditions."""
    from ddpmctl.interface.choices import measured_fidelity
    from ddpmctl.report.page import BesideReal
    from ddpmctl.report.tables import fidelity_table

    found = terminal.finish(measured_fidelity(rows, spec, reference))
    tables = [fidelity_table(name, fidelity, source) for name, fidelity in zip(names, found, strict=True)]
    return BesideReal(found, tables, reference.first[:, 0])


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


def say_which(terminal: Terminal, path: Path, which: str) -> None:
    """Say which checkpoint a command takes, and why."""
    terminal.say(f"checkpoint: {PRETRAINED_NAME if path.parent == PRETRAINED else path} ({which})")


def chosen_checkpoint(named: Path | None, runs_dir: Path, assume: dict[str, Value], terminal: Terminal) -> Checkpoint:
    """Return the checkpoint of ``checkpoint_path``, and say which it is where that was not given."""
    from ddpmctl.checkpoints.format import load_checkpoint
    from ddpmctl.interface.choices import checkpoint_path

    path, which = checkpoint_path(named, runs_dir)
    if which:
        say_which(terminal, path, which)
    checkpoint = load_checkpoint(path, assume)
    if checkpoint.foreign:
        config = checkpoint.config
        terminal.warn(
            f"{path} carries no settings: taken as {config.model.net}, act {config.model.act}, width {config.model.width}, "
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
        from ddpmctl.interface.choices import agreed_device

        checkpoint = chosen_checkpoint(named, runs_dir, given.assumed, terminal)
        job.require_same("checkpoint", {"its content": checkpoint.sha256[:12], **given.sampling})
        pipeline = pipeline_for(checkpoint, given.sampling, agreed_device(given.device, job))
    terminal.say(pipeline.describe())
    return pipeline


def checkpoint_files(named: Path | None, runs_dir: Path) -> list[Path]:
    """Return the checkpoint that a command would use; none where there is none, which the command then says."""
    from ddpmctl.interface.choices import checkpoint_path

    try:
        return [checkpoint_path(named, runs_dir)[0]]
    except (DdpmctlError, OSError):
        return []


def task_of(named: Path | None, runs_dir: Path) -> Task:
    """Return the task of the checkpoint or run that a command would use; i-CLEVR's where there is none, which the command then says."""
    from ddpmctl.checkpoints.outline import read_outline

    try:
        return next((read_outline(file, {}).task for file in checkpoint_files(named, runs_dir)), ICLEVR)
    except (DdpmctlError, OSError):
        return ICLEVR
