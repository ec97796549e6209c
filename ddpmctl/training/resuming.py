"""What may change when a run is resumed, and what a change does to it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ddpmctl.config import RECIPE, Config, Value, settings
from ddpmctl.config_sources import in_words
from ddpmctl.device import ComputeDevice, cores, threads_that_fit
from ddpmctl.distributed.job import SINGLE, Job
from ddpmctl.errors import UsageError
from ddpmctl.runs.folder import open_run

BITS = ("precision", "threads", "compile", "micro_batch", "sync_bn")  # settings outside of the recipe that change the last bits, or more
# Settings that cannot change on resume, even with --override.
FIXED = frozenset({"net", "act", "width", "optimizer", "ema", "seed"})


def resumed_config(folder: Path, around: Mapping[str, Value], recipe: Mapping[str, Value], allowed: set[str], job: Job = SINGLE) -> tuple[Config, set[str]]:
    """Return a run's settings with the changes of a resume, and the names of the changed ones.

    Args:
        folder: the run.
        around: device settings and run settings, which may always change.
        recipe: settings of the recipe that were given; they may differ from the run's where they are ``allowed``.
        allowed: names given to ``--override``.
        job: its rank 0 reads the folder, which the others may not see.

    Raises:
        UsageError: a setting of the recipe differs and is not allowed to, or is allowed to and does not differ.
    """
    config = job.from_leader(lambda: open_run(folder).config())
    flat = config.flat()
    changed: dict[str, Value] = {key: value for key, value in recipe.items() if value != flat[key]}
    refused = [f"{key}: {flat[key]} in the run, {value} now" for key, value in changed.items() if key not in allowed]
    if refused:
        names = ",".join(key for key in changed if key not in allowed)
        hint = "train a new run instead" if FIXED & (set(changed) - allowed) else f"train a new run, or allow it with --override {names}"
        raise UsageError(f"--resume {folder}: a run keeps its settings ({'; '.join(refused)}); {hint}")
    if unused := sorted(allowed - set(changed)):
        raise UsageError(f"--override {','.join(unused)}: has not changed; give the new value too, e.g. --{unused[0].replace('_', '-')} VALUE")
    if len({"epochs", "minutes"} & set(changed)) == 1:
        changed = {"epochs": None, "minutes": None, **changed}
    threads = threads_that_fit(config.device.threads)
    return config.replace(**{"threads": threads, **around, **changed}), {*around, *changed}


def overridable(text: str | None) -> set[str]:
    """Return the settings that ``--override`` names.

    Raises:
        UsageError: one is not a setting of a recipe, or cannot change within a run.
    """
    known = {setting.name for section in RECIPE for setting in settings(section)}
    names = {part.strip().replace("-", "_") for part in text.split(",")} if text is not None else set()
    if unknown := sorted(names - known):
        raise UsageError(f"--override: {unknown[0]!r} is not a setting of a run's recipe; separate names with commas, e.g. lr,epochs")
    if fixed := sorted(names & FIXED):
        raise UsageError(f"--override: {fixed[0]} cannot change within a run; train a new one")
    return names


def changed_bits(recorded: Config, config: Config, compute: ComputeDevice, job: Job) -> str:
    """Return, as text, the settings outside of the recipe that differ from the run's and change the last bits of its weights."""
    before, after = recorded.flat(), config.flat()
    after["threads"] = torch.get_num_threads()
    spared = {  # not recorded by earlier versions, or without effect here
        "precision": before["precision"] == "auto",
        "threads": before["threads"] is None or compute.device.type != "cpu",
        "sync_bn": job.is_single,
    }
    changed = [name for name in BITS if after[name] != before[name] and not spared.get(name)]
    if not changed:
        return ""
    new, old = (in_words({name: values[name] for name in changed}) for values in (after, before))
    fewer = "threads" in changed and threads_that_fit(recorded.device.threads) is None
    return f"{new} instead of {old}{f' (this machine has cores for {cores()} in each process)' if fewer else ''}"
