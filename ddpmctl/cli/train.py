"""``ddpmctl train``."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ddpmctl.cli.common import describe_classifier, only_one_source, prepare_output
from ddpmctl.cli.crash import run_folder
from ddpmctl.cli.options import RUNS, ClassifierFile, ConfigFile, Data, Resolved, RunsDir, Scenes, command, overrides, resolve
from ddpmctl.cli.signals import stop_is_noted
from ddpmctl.cli.terminal import Terminal
from ddpmctl.config import PRESET_HELP, RECIPE, Config, Value, settings
from ddpmctl.config_toml import dump_toml
from ddpmctl.distributed.job import Job
from ddpmctl.errors import PeerError, UsageError

if TYPE_CHECKING:
    from ddpmctl.data.dataset import Dataset
    from ddpmctl.device import ComputeDevice
    from ddpmctl.evaluation.classifiers import Classifier
    from ddpmctl.training.events import Evaluated
    from ddpmctl.training.run_folder import Run

PRESETS = "; ".join(f"{name}: {text}" for name, text in PRESET_HELP.items())


# What a state cannot be carried over to.
FIXED = frozenset({"net", "act", "width", "optimizer", "ema", "seed"})


@command("model", "diffusion", "training", "sampling", "device", "run")
def train(
    given: dict[str, str],
    job: Job,
    preset: Annotated[str, typer.Option(envvar="DDPMCTL_PRESET", help=f"Named settings to start from. {PRESETS}.")] = "report",
    config: ConfigFile = None,
    data: Data = None,
    scenes: Scenes = None,
    evaluator: ClassifierFile = None,
    name: Annotated[str | None, typer.Option(help="Name of the run's folder (made from the settings).", show_default=False)] = None,
    runs_dir: RunsDir = RUNS,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder, with its settings.", show_default=False)] = None,
    override: Annotated[
        str | None, typer.Option(help="With --resume: settings that may differ from the run's from now on, e.g. lr,epochs.", show_default=False)
    ] = None,
    exist_ok: Annotated[
        str | None, typer.Option("--exist-ok", metavar="resume", help="resume: where the run exists already, go on with it.", show_default=False)
    ] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print every setting with its origin as TOML, and leave.")] = False,  # noqa: FBT002
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and leave.")] = False,  # noqa: FBT002
) -> None:
    """Train a model; the default is exactly the lab report's recipe.

    Makes runs/<name>/ with settings, metrics, scored checkpoints and sample grids. Ctrl-C and SIGTERM keep what is done: go on with --resume.
    """
    only_one_source(data, scenes)
    if resume and scenes is not None:
        raise UsageError("--scenes: a resumed run keeps its data")
    if override is not None and not resume:
        raise UsageError("--override: goes with --resume; a new run takes any setting")
    if exist_ok is not None and (exist_ok != "resume" or resume):
        raise UsageError("--exist-ok: does not go with --resume" if resume else f"--exist-ok: {exist_ok!r} is not known; give --exist-ok resume")
    terminal = Terminal(silent=not job.is_leader)
    resolved = _resumed(resume, given, config, name, override) if resume else resolve(given, config, preset)
    if print_config:
        terminal.result(dump_toml(resolved.config, resolved.origins).rstrip())
        return
    if dry_run:
        _say_what_would_be_done(terminal, resolved, data, scenes, evaluator, resume or runs_dir / (name or ""), named=name is not None or resume is not None)
    elif resume:
        _resume(terminal, resolved.config, resume, data, evaluator, job)
    else:
        _begin(terminal, resolved.config, data, scenes, evaluator, name, runs_dir, job, go_on=exist_ok is not None)


def _resumed(folder: Path, given: dict[str, str], config_file: Path | None, name: str | None, override: str | None) -> Resolved:
    """Return a run's own settings; where and how it runs may change, its recipe only by name."""
    from ddpmctl.training.run_folder import open_run

    if name is not None:
        raise UsageError("--name: a resumed run keeps its folder")
    config = open_run(folder).config()
    flat = config.flat()
    allowed = _overridable(override)
    around = overrides(given, "device", "run", config_file=config_file)
    recipe = overrides(given, *RECIPE, config_file=config_file)
    changed = {key: value for key, value in recipe.items() if value != flat[key]}
    refused = [f"{key}: {flat[key]} in the run, {value} now" for key, value in changed.items() if key not in allowed]
    if refused:
        names = ",".join(key for key in changed if key not in allowed)
        hint = "train a new run instead" if FIXED & (set(changed) - allowed) else f"train a new run, or allow it with --override {names}"
        raise UsageError(f"--resume {folder}: a run keeps its settings ({'; '.join(refused)}); {hint}")
    if unused := sorted(allowed - set(changed)):
        raise UsageError(f"--override {','.join(unused)}: is as it was in the run; give the new value too, e.g. --{unused[0].replace('_', '-')} VALUE")
    if {"epochs", "minutes"} & set(changed) and len({"epochs", "minutes"} & set(changed)) == 1:
        changed = {"epochs": None, "minutes": None, **changed}
    origins = {key: "flag" if key in {**around, **changed} else f"run {folder}" for key in flat}
    return Resolved(config.replace(**around, **changed), origins)


def _overridable(text: str | None) -> set[str]:
    known = {setting.name for section in RECIPE for setting in settings(section)}
    names = {part.strip().replace("-", "_") for part in text.split(",")} if text is not None else set()
    if unknown := sorted(names - known):
        raise UsageError(f"--override: {unknown[0]!r} is no setting of a run's recipe; name them with commas between, e.g. lr,epochs")
    if fixed := sorted(names & FIXED):
        raise UsageError(f"--override: {fixed[0]} cannot change within a run; train a new one")
    return names


def _say_what_would_be_done(
    terminal: Terminal, resolved: Resolved, data: Path | None, scenes: int | None, classifier_file: Path | None, place: Path, *, named: bool
) -> None:
    from ddpmctl.data.dataset import load_conditions
    from ddpmctl.device import make_compute_device
    from ddpmctl.evaluation.classifiers import load_classifier
    from ddpmctl.training.loop import make_plan, resumed_sources
    from ddpmctl.training.run_folder import Run, name_for

    compute = make_compute_device(resolved.config.device)
    config = resolved.config.replace(precision=compute.precision)
    if Run(place).config_file.is_file() and named:
        sources = resumed_sources(Run(place))
        data, scenes, classifier_file = data or sources.data, sources.scenes, classifier_file or sources.evaluator
    conditions = load_conditions(data, scenes=scenes)
    classifier = load_classifier(classifier_file, data)
    place = place if named else place / name_for(config)
    terminal.plan(make_plan(config, place, conditions.name, conditions.images, compute, describe_classifier(classifier)))
    terminal.result(dump_toml(config, resolved.origins).rstrip())


def _begin(
    terminal: Terminal,
    config: Config,
    data: Path | None,
    scenes: int | None,
    classifier_file: Path | None,
    name: str | None,
    runs_dir: Path,
    job: Job,
    *,
    go_on: bool,
) -> None:
    """Train a new run; where it exists already and ``go_on`` says so, go on with it."""
    from ddpmctl.benchmark.embedded import scene_count
    from ddpmctl.evaluation.classifiers import BUILT_IN, load_classifier
    from ddpmctl.training.disk_space import check_room
    from ddpmctl.training.run_folder import Run, create_run, locked, name_for

    if not go_on and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
        raise UsageError("--exist-ok: torchrun --max-restarts calls the same command again; add --exist-ok resume, so that it goes on with the run")
    compute, config = _machine(config, job)
    existing = runs_dir / (name or name_for(config))
    if go_on and job.from_leader((existing / "config.toml").is_file):
        _go_on(terminal, config, existing, data, scenes, classifier_file, job)
        return
    classifier = load_classifier(classifier_file, data, compute.device)
    if job.is_leader:
        prepare_output(runs_dir, "--runs-dir", folder=True)
        check_room(config, runs_dir)
    dataset = _load(terminal, job, data, scenes)
    source: dict[str, object] = {
        "data": None if data is None else str(data.resolve()), "scenes": scene_count(scenes) if data is None else None, "key": dataset.key,
        "evaluator": None if classifier.name == BUILT_IN else str(Path(classifier.name).resolve()), "evaluator_sha256": classifier.sha256,
    }  # fmt: skip
    run = Run(job.from_leader(lambda: create_run(runs_dir, name, config, source).folder))
    with locked(run) if job.is_leader else nullcontext():
        _follow(terminal, run, config, dataset, classifier, compute, job, recorded=None)


def _go_on(
    terminal: Terminal, config: Config, folder: Path, data: Path | None, scenes: int | None, classifier_file: Path | None, job: Job
) -> None:
    """Go on with the run that these settings name, if it is theirs."""
    from ddpmctl.benchmark.embedded import scene_count
    from ddpmctl.training.loop import resumed_sources
    from ddpmctl.training.run_folder import Run, open_run

    recorded: dict[str, Value] = job.from_leader(lambda: open_run(folder).config().flat())
    names = {setting.name for section in RECIPE for setting in settings(section)}
    others = [f"{key}: {recorded[key]} in the run, {value} now" for key, value in config.flat().items() if key in names and recorded[key] != value]
    sources = job.from_leader(lambda: resumed_sources(Run(folder)))
    if sources.scenes != (scene_count(scenes) if data is None else None):
        others.append(f"scenes: {sources.scenes} in the run, {scenes} now")
    if others:
        raise UsageError(f"--exist-ok: {folder} is a run of other settings ({'; '.join(others)}); give this one a --name of its own")
    terminal.say(f"{folder}: exists already; going on with it")
    _resume(terminal, config, folder, data, classifier_file, job)


def _resume(terminal: Terminal, config: Config, folder: Path, data: Path | None, classifier_file: Path | None, job: Job) -> None:
    """Go on with a run, on its own data and with its own evaluator."""
    from ddpmctl.evaluation.classifiers import load_classifier
    from ddpmctl.training.disk_space import check_room
    from ddpmctl.training.loop import resumed_sources
    from ddpmctl.training.run_folder import Run, locked, open_run

    run = Run(folder)
    recorded: Config = job.from_leader(lambda: open_run(folder).config())
    sources = job.from_leader(lambda: resumed_sources(run))
    if data is not None and sources.data is None:
        raise UsageError("--data: the run trains on the embedded benchmark, and a resumed run keeps its data")
    data = data or sources.data  # the lab's folder may have moved; its content is checked against the run's
    if data is not None and not data.is_dir():
        raise UsageError(f"{data}: the run's data are no longer there; name their new place with --data DIR")
    compute, config = _machine(config, job)
    classifier = load_classifier(classifier_file or sources.evaluator, data, compute.device)
    if classifier.sha256 != sources.evaluator_sha256:
        theirs = sources.evaluator_sha256[:12]
        raise UsageError(f"--resume {folder}: its scores are by evaluator {theirs}, not by {describe_classifier(classifier)}; name the file with --evaluator")
    with locked(run) if job.is_leader else nullcontext():
        if job.is_leader:
            check_room(config, folder, already=len(list(run.checkpoints.glob("*.pth"))))
        dataset = _load(terminal, job, data, sources.scenes)
        _follow(terminal, run, config, dataset, classifier, compute, job, recorded=recorded)


def _machine(config: Config, job: Job) -> tuple[ComputeDevice, Config]:
    """Return where to train, and the settings with what ``auto`` came to on rank 0: from now on it is the run's, and a resumed run must not change it."""
    from ddpmctl.device import make_compute_device

    job.require_same("setting", {key: value for key, value in config.flat().items() if key not in ("device", "threads")})
    config = config.replace(precision=job.from_leader(lambda: make_compute_device(config.device).precision))
    return make_compute_device(config.device, job.local), config


def _load(terminal: Terminal, job: Job, data: Path | None, scenes: int | None) -> Dataset:
    from ddpmctl.data.dataset import load_dataset

    with job.first_on_each_machine():
        dataset: Dataset = terminal.finish(load_dataset(data, scenes=scenes))
    job.require_same("data set", {"its content": dataset.key[:12]})
    return dataset


def _follow(
    terminal: Terminal,
    run: Run,
    config: Config,
    dataset: Dataset,
    classifier: Classifier,
    compute: ComputeDevice,
    job: Job,
    *,
    recorded: Config | None,
) -> None:
    """Train, showing events, until the end or until a signal asks for one; ``recorded`` are a resumed run's settings so far."""
    from ddpmctl.training import events
    from ddpmctl.training.loop import make_plan, training_events

    run_folder.set(run.folder)
    plan = make_plan(config, run.folder, dataset.name, len(dataset.images), compute, describe_classifier(classifier), job)
    terminal.plan(plan)
    # Where several ranks end together; rank 0 also in the middle of its pictures, for which the others only wait.
    ends = (events.StopAgreed,) if not job.is_leader else (events.StopAgreed, events.Progress, events.Evaluated)
    last_scores: events.Evaluated | None = None
    with stop_is_noted() as stop, _group(job, compute):
        stream = training_events(plan, run, dataset, classifier, compute, resume=recorded is not None, recorded=recorded, job=job, asked=stop.asked)
        try:
            with closing(stream):
                for event in terminal.follow(stream):
                    last_scores = event if isinstance(event, events.Evaluated) else last_scores
                    if isinstance(event, events.StopAgreed):
                        stop.number = stop.number or event.number
                    if stop and (job.is_single or isinstance(event, ends)):
                        break
        except PeerError:
            stop.obey()  # who has been told to end does not wonder that the others have
            raise
        if stop:
            terminal.say(f"stopped; to go on: ddpmctl train --resume {run.folder}")
            stop.obey()
    _summary(terminal, run, last_scores)


def _group(job: Job, compute: ComputeDevice) -> AbstractContextManager[None]:
    if job.is_single:
        return nullcontext()
    from ddpmctl.distributed.ddp import process_group

    return process_group(job, compute.device)


def _summary(terminal: Terminal, run: Run, evaluated: Evaluated | None) -> None:
    """Print the final table and where the pictures are."""
    if evaluated is None:
        terminal.say(f"{run.folder}: its budget was used up already; nothing was left to do")
        return
    rows = [[name, f"{s.accuracy:.4f}", f"{s.hits}/{s.labels}", f"{s.exact_match:.4f}", f"{s.exact}/{s.images}"] for name, s in evaluated.scores.items()]
    terminal.table(f"epoch {evaluated.epoch}", ["conditions", "accuracy", "objects found", "exact match", "images right"], rows)
    terminal.result(f"checkpoint: {evaluated.checkpoint}")
    for name in evaluated.scores:
        terminal.result(f"picture: {run.samples / f'epoch{evaluated.epoch}_{name}.png'}")
