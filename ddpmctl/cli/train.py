"""``ddpmctl train``."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddpmctl.cli.busy import others_are_busy
from ddpmctl.cli.common import task_of
from ddpmctl.cli.completion import checkpoints, one_of, run_names
from ddpmctl.cli.crash import run_folder
from ddpmctl.cli.data_options import DataFormat, Fit, HoldOut, LabelColumn, Repeated, Size, data_source
from ddpmctl.cli.options import RESUMING, RUNS, ClassifierFile, ConfigFile, Data, RunsDir, SceneCount, command
from ddpmctl.cli.signals import StopRequest, stop_is_noted
from ddpmctl.cli.terminal import Terminal
from ddpmctl.config import RECIPE, Config
from ddpmctl.config_sources import Resolved, overrides, resolve
from ddpmctl.config_toml import dump_toml
from ddpmctl.distributed.job import Job
from ddpmctl.errors import PeerError, UsageError
from ddpmctl.label_lists import example
from ddpmctl.presets import PRESET_HELP
from ddpmctl.progress import Progress

if TYPE_CHECKING:
    from ddpmctl.runs.folder import Run
    from ddpmctl.training.events import Evaluated
    from ddpmctl.training.session import TrainingRequest

PRESETS = "; ".join(f"{name}: {text}" for name, text in PRESET_HELP.items())


Resume = Annotated[
    Path | None,
    typer.Option(help="Go on with the run in this folder, with its settings.", show_default=False, rich_help_panel=RESUMING, autocompletion=run_names),
]
Override = Annotated[
    str | None, typer.Option(help="With --resume: settings to change on resume, e.g. lr,epochs.", show_default=False, rich_help_panel=RESUMING)
]
EXISTING = one_of(("resume",))
ExistOk = Annotated[
    str | None,
    typer.Option(help="resume: if the run exists already, resume it.", metavar="NAME", show_default=False, rich_help_panel=RESUMING, autocompletion=EXISTING),
]
FIRST = ("preset", "act", "net", "schedule", "epochs", "minutes", "batch_size", "lr", "seed", "data", "name", "dry_run", "print_config")


@command("model", "diffusion", "training", "sampling", "device", "run", first=FIRST)
def train(
    given: dict[str, str],
    job: Job,
    preset: Annotated[
        str, typer.Option(envvar="DDPMCTL_PRESET", help=f"Named settings to start from. {PRESETS}.", metavar="NAME", autocompletion=one_of(tuple(PRESET_HELP)))
    ] = "report",
    config: ConfigFile = None,
    data: Data = None,
    scenes: SceneCount = None,
    size: Size = None,
    fit: Fit = None,
    form: DataFormat = None,
    label_column: LabelColumn = None,
    repeated: Repeated = None,
    hold_out: HoldOut = None,
    evaluator: ClassifierFile = None,
    name: Annotated[str | None, typer.Option(help="Name of the run's folder (made from the settings).", show_default=False)] = None,
    runs_dir: RunsDir = RUNS,
    weights: Annotated[
        Path | None, typer.Option("--weights", help="Start from a checkpoint's weights, with its network.", show_default=False, autocompletion=checkpoints)
    ] = None,
    resume: Resume = None,
    override: Override = None,
    exist_ok: ExistOk = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print every setting and its origin as TOML, and exit.")] = False,  # noqa: FBT002
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard event files, to RUN/tensorboard/.")] = False,  # noqa: FBT002
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and exit.")] = False,  # noqa: FBT002
) -> None:
    """Train a model; the default is exactly the lab report's recipe.

    ddpmctl train --preset quick
    ddpmctl train --act gelu --epochs 600
    ddpmctl train --resume runs/NAME

    Makes runs/<name>/ with settings, metrics, scored checkpoints and sample grids. Ctrl-C and SIGTERM keep what is done; --resume continues the run.

    Defaults are shown for --preset report. A setting can also stand in the file of --config, or in an environment variable: DDPMCTL_LR for --lr.
    """
    reading: dict[str, Any] = {"size": size, "fit": fit, "form": form, "label_column": label_column, "repeated": repeated, "hold_out": hold_out}
    source = data_source(data, scenes, **reading)
    if resume and any(value is not None for value in reading.values()):
        raise UsageError("--resume: a run keeps how its images are read; leave --size, --fit, --format, --label-column, --repeated and --hold-out out")
    _refuse_conflicts(resume, scenes=scenes, name=name, weights=weights, override=override, exist_ok=exist_ok)
    terminal, busy = Terminal(silent=not job.is_leader), others_are_busy()
    resume = _named(resume, runs_dir, job) if resume else None
    resolved = _resumed(resume, given, config, override, job) if resume else resolve(given, config, preset)
    if weights:
        weights, resolved = _started(weights, runs_dir, resolved)
    if print_config:
        terminal.document(dump_toml(resolved.config, resolved.origins))
        return

    job.be_patient(resolved.config.run.peer_timeout)
    terminal.say("starting: loading torch, the data and the network")
    from ddpmctl.training.session import TrainingRequest, plan_only
    from ddpmctl.training.tensorboard import require_tensorboard

    if tensorboard:
        require_tensorboard()
    stop = StopRequest()
    signals = (lambda: stop.number, lambda: stop.continued)
    request = TrainingRequest(resolved.config, source, evaluator, weights, name, runs_dir, resume, exist_ok is not None, job, *signals)
    if dry_run:
        plan = plan_only(request)
        terminal.plan(plan)
        terminal.document(dump_toml(plan.config, resolved.origins))
    else:
        _train(terminal, request, stop, busy=busy, tensorboard=tensorboard)


def _refuse_conflicts(resume: Path | None, *, scenes: int | None, name: str | None, weights: Path | None, override: str | None, exist_ok: str | None) -> None:
    """Refuse options that a resumed run, or a new one, would ignore.

    Raises:
        UsageError: one was given.
    """
    if resume and scenes is not None:
        raise UsageError("--scenes: cannot be combined with --resume, because a run keeps its data")
    if resume and name is not None:
        raise UsageError("--name: cannot be combined with --resume, because a run keeps its folder")
    if resume and weights is not None:
        raise UsageError("--weights: cannot be combined with --resume, because a run goes on with its own")
    if override is not None and not resume:
        raise UsageError("--override: needs --resume; a new run accepts every setting without it")
    if exist_ok is not None and (exist_ok != "resume" or resume):
        raise UsageError("--exist-ok: cannot be combined with --resume" if resume else f"--exist-ok: {exist_ok!r} is not known; give --exist-ok resume")


def _named(run: Path, runs_dir: Path, job: Job) -> Path:
    """Return the folder of the run that is named."""
    from ddpmctl.runs.named import located

    return job.from_leader(lambda: located(run, runs_dir))


def _started(named: Path, runs_dir: Path, resolved: Resolved) -> tuple[Path, Resolved]:
    """Return the checkpoint of ``--weights``, and the settings with its network."""
    from ddpmctl.interface.choices import checkpoint_path
    from ddpmctl.training.starting import with_network_of

    path, _ = checkpoint_path(named, runs_dir)
    return path, with_network_of(path, resolved)


def _resumed(folder: Path, given: dict[str, str], config_file: Path | None, override: str | None, job: Job) -> Resolved:
    """Return a run's own settings; those of device and run may change, those of its recipe only by name."""
    from ddpmctl.training.resuming import overridable, resumed_config

    allowed = overridable(override)
    around = overrides(given, "device", "run", config_file=config_file)
    config, changed = resumed_config(folder, around, overrides(given, *RECIPE, config_file=config_file), allowed, job)
    return Resolved(config, {key: "flag" if key in changed else f"run {folder}" for key in config.flat()})


def _train(terminal: Terminal, request: TrainingRequest, stop: StopRequest, *, busy: bool, tensorboard: bool) -> None:
    """Train, showing events, until the end or until a signal asks for one."""
    from ddpmctl.cli.monitor import Monitor
    from ddpmctl.runs.folder import Run
    from ddpmctl.training import events, session

    # Of several processes, all end at StopAgreed; rank 0 also while it makes images for a score, for which the others only wait.
    ends = (events.StopAgreed,) if not request.job.is_leader else (events.StopAgreed, Progress, events.Evaluated)
    last_scores: Evaluated | None = None
    run, place, monitor = Run(request.folder), "", None
    with ExitStack() as stack:
        stream = session.run_training(request)
        try:
            for event in terminal.follow(stream):
                if monitor is not None:
                    monitor.read(event)
                if isinstance(event, events.Ticked | events.EpochDone | events.StopAgreed):
                    place = f" in epoch {event.epoch}, after step {event.step:,}"
                match event:
                    case events.Prepared():
                        run = Run(event.plan.run)
                        run_folder.set(run.folder)
                        request.job.be_patient(request.config.run.peer_timeout, f"to go on from the last saved state: ddpmctl train --resume {run.folder}")
                        terminal.plan(event.plan)
                        if busy and event.plan.device.startswith("cpu") and request.config.device.threads is None:
                            terminal.warn("other processes use this machine's cores; --threads 1 may train faster until they end")
                        stack.enter_context(stop_is_noted(stop))
                        if request.job.is_leader:
                            monitor = Monitor(terminal, run, tensorboard=tensorboard)
                            stack.callback(monitor.close)
                    case events.Evaluated():
                        last_scores = event
                    case events.StopAgreed():
                        stop.number = stop.number or event.number
                if stop.number and (request.job.is_single or isinstance(event, ends)):
                    break
        except PeerError:
            stop.obey()  # the other processes were stopped by the same signal
            raise
        finally:
            stream.close()
        if stop.number:
            stop.obey(f"stopped{place}; to go on: ddpmctl train --resume {run.folder}")
    _summary(terminal, run, request.config, last_scores)


def _summary(terminal: Terminal, run: Run, config: Config, evaluated: Evaluated | None) -> None:
    """Print the final table, where the images are, and what can be done next."""
    if evaluated is None:
        name, budget = _budget(config)
        terminal.say(f"{run.folder}: its {budget:g} {name} are used up; nothing to do. To train it for longer: {longer(run.folder, config)}")
        return
    if not evaluated.scores:
        terminal.result(f"checkpoint: {evaluated.checkpoint}")
        for image in sorted(run.samples.glob(f"epoch{evaluated.epoch}_*.png")):
            terminal.result(f"image: {image}")
        for text in next_commands(run.folder, scored=False):
            terminal.say(f"next: {text}")
        return
    rows = [[name, f"{s.accuracy:.4f}", f"{s.hits}/{s.labels}", f"{s.exact_match:.4f}", f"{s.exact}/{s.images}"] for name, s in evaluated.scores.items()]
    terminal.table(f"epoch {evaluated.epoch}", ["conditions", "accuracy", "objects found", "exact match", "images right"], rows)
    terminal.result(f"checkpoint: {evaluated.checkpoint}")
    for name in evaluated.scores:
        terminal.result(f"image: {run.samples / f'epoch{evaluated.epoch}_{name}.png'}")
    for text in next_commands(run.folder, scored=bool(evaluated.scores)):
        terminal.say(f"next: {text}")


def next_commands(run: Path, *, scored: bool = True) -> list[str]:
    """Return what can be done with the checkpoints of a run; only one with a classifier can be evaluated without naming one."""
    task = task_of(run, run.parent)
    labels = f" --labels {example(task)}" if task.classes else ""
    texts = [f"evaluate {run} --repeats 8"] if scored else []
    return [f"ddpmctl {text}" for text in (*texts, f"sample {run}{labels or ' -n 16'}", f"denoise-grid {run}{labels}")]


def longer(run: Path, config: Config) -> str:
    """Return the command that trains a finished run for as long again."""
    name, budget = _budget(config)
    return f"ddpmctl train --resume {run} --override {name} --{name} {2 * budget:g}"


def _budget(config: Config) -> tuple[str, float]:
    training = config.training
    return ("epochs", training.epochs or 0) if training.minutes is None else ("minutes", training.minutes)
