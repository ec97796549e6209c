"""``ddpmctl train``."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from ddpmctl.cli.common import describe_evaluator, only_one_source, prepare_output
from ddpmctl.cli.options import RUNS, ConfigFile, Data, EvaluatorFile, Resolved, RunsDir, Scenes, command, overrides, resolve
from ddpmctl.cli.terminal import Terminal
from ddpmctl.config import PRESET_HELP
from ddpmctl.config_toml import dump_toml
from ddpmctl.errors import UsageError

if TYPE_CHECKING:
    from ddpmctl.engine.events import Evaluated
    from ddpmctl.engine.runs import Run

PRESETS = "; ".join(f"{name}: {text}" for name, text in PRESET_HELP.items())


@command("model", "diffusion", "training", "sampling", "machine")
def train(
    given: dict[str, str],
    preset: Annotated[str, typer.Option(envvar="DDPMCTL_PRESET", help=f"Named settings to start from. {PRESETS}.")] = "report",
    config: ConfigFile = None,
    data: Data = None,
    scenes: Scenes = None,
    evaluator: EvaluatorFile = None,
    name: Annotated[str | None, typer.Option(help="Name of the run's folder (made from the settings).", show_default=False)] = None,
    runs_dir: RunsDir = RUNS,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder, with its settings.", show_default=False)] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print every setting with its origin as TOML, and leave.")] = False,  # noqa: FBT002
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and leave.")] = False,  # noqa: FBT002
) -> None:
    """Train a model; the default is exactly the lab report's recipe.

    Makes runs/<name>/ with settings, metrics, scored checkpoints and sample grids. Ctrl-C keeps what is done: go on with --resume.
    """
    only_one_source(data, scenes)
    if resume and scenes is not None:
        raise UsageError("--scenes: a resumed run keeps its data")
    terminal = Terminal()
    resolved = _resumed(resume, given, config, name) if resume else resolve(given, config, preset)
    if print_config:
        terminal.result(dump_toml(resolved.config, resolved.origins).rstrip())
        return
    _train(terminal, resolved, data, scenes, evaluator, name, runs_dir, resume, dry_run=dry_run)


def _resumed(folder: Path, given: dict[str, str], config_file: Path | None, name: str | None) -> Resolved:
    """Return a run's own settings; where and how it runs may change, its recipe may not."""
    from ddpmctl.engine.runs import open_run

    if name is not None:
        raise UsageError("--name: a resumed run keeps its folder")
    config = open_run(folder).config()
    flat = config.flat()
    machine = overrides(given, "machine", config_file=config_file)
    recipe = overrides(given, "model", "diffusion", "training", "sampling", config_file=config_file)
    changed = [f"{key}: {flat[key]} in the run, {value} now" for key, value in recipe.items() if value != flat[key]]
    if changed:
        raise UsageError(f"--resume {folder}: a run keeps its settings ({'; '.join(changed)}); train a new run instead")
    return Resolved(config.replace(**machine), {key: "flag" if key in machine else f"run {folder}" for key in flat})


def _train(
    terminal: Terminal, resolved: Resolved, data: Path | None, scenes: int | None, evaluator_file: Path | None,
    name: str | None, runs_dir: Path, resume: Path | None, *, dry_run: bool,
) -> None:  # fmt: skip
    from ddpmctl.data.dataset import load_conditions, load_dataset, scene_count
    from ddpmctl.engine import events
    from ddpmctl.engine.machine import make_machine
    from ddpmctl.engine.runs import Run, create_run, name_for, open_run
    from ddpmctl.engine.train import make_plan, resumed_sources
    from ddpmctl.engine.train import train as training
    from ddpmctl.evaluator.classifiers import BUILT_IN, load_evaluator

    config = resolved.config
    if resume:
        sources = resumed_sources(open_run(resume))
        scenes, evaluator_file = sources.scenes, evaluator_file or sources.evaluator
        if data is not None and sources.data is None:
            raise UsageError("--data: the run trains on the embedded benchmark, and a resumed run keeps its data")
        data = data or sources.data  # the lab's folder may have moved; its content is checked against the run's
        if data is not None and not data.is_dir():
            raise UsageError(f"{data}: the run's data are no longer there; name their new place with --data DIR")
    machine = make_machine(config.machine)
    config = config.replace(precision=machine.precision)  # what auto came to is the run's from now on: a resumed run must not change it
    if dry_run:
        conditions = load_conditions(data, scenes=scenes)
        judge = load_evaluator(evaluator_file, data)
        place = resume or runs_dir / (name or name_for(config))
        terminal.plan(make_plan(config, place, conditions.name, conditions.images, machine, describe_evaluator(judge)))
        terminal.result(dump_toml(config, resolved.origins).rstrip())
        return
    judge = load_evaluator(evaluator_file, data, machine.device)
    if resume and judge.sha256 != sources.evaluator_sha256:
        theirs = sources.evaluator_sha256[:12]
        raise UsageError(f"--resume {resume}: its scores are by evaluator {theirs}, not by {describe_evaluator(judge)}; name the file with --evaluator")
    if resume is None:
        prepare_output(runs_dir, "--runs-dir", folder=True)
    dataset = terminal.finish(load_dataset(data, scenes=scenes))
    size = scene_count(scenes) if data is None else None
    source: dict[str, object] = {
        "data": None if data is None else str(data.resolve()), "scenes": size, "key": dataset.key,
        "evaluator": None if judge.name == BUILT_IN else str(Path(judge.name).resolve()), "evaluator_sha256": judge.sha256,
    }  # fmt: skip
    run = Run(resume) if resume else create_run(runs_dir, name, config, source)
    plan = make_plan(config, run.folder, dataset.name, len(dataset.images), machine, describe_evaluator(judge))
    terminal.plan(plan)
    last_scores: events.Evaluated | None = None
    with closing(training(plan, run, dataset, judge, machine, resume=resume is not None)) as stream, _stop_request() as stop:
        for event in terminal.follow(stream):
            last_scores = event if isinstance(event, events.Evaluated) else last_scores
            if stop.is_set():
                break
    if stop.is_set():
        terminal.say(f"stopped; to go on: ddpmctl train --resume {run.folder}")
        raise KeyboardInterrupt
    _summary(terminal, run, last_scores)


@contextmanager
def _stop_request() -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl-C sets, so that training stops between steps; a second one leaves at once."""
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, on_signal) if threading.current_thread() is threading.main_thread() else None
    try:
        yield stop
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)


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
