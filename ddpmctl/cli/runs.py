"""``ddpmctl runs`` and ``ddpmctl runs rm``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddpmctl.cli.commands import App
from ddpmctl.cli.completion import run_names
from ddpmctl.cli.options import RUNS, command
from ddpmctl.cli.outputs import Outputs
from ddpmctl.cli.terminal import Terminal
from ddpmctl.config import RECIPE, Value, settings
from ddpmctl.errors import DdpmctlError, UsageError

if TYPE_CHECKING:
    from ddpmctl.runs.record import Record, Scored

RunsFolder = Annotated[Path, typer.Option("--runs-dir", metavar="PATH", envvar="DDPMCTL_RUNS_DIR", help="Where runs are kept.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="PATH", help="Write the table as JSON ('-': to stdout, without the table).", show_default=False)
]
_runs_dir: ContextVar[Path] = ContextVar("runs_dir", default=RUNS)  # given before ``rm``
FEW = 4  # settings that the table shows for a run, at most

HELP = """List the runs: state, epochs, scores, size, data and settings that differ; or remove some.

ddpmctl runs
ddpmctl runs --json -
ddpmctl runs rm q30

The scores are the mean accuracy on test and new_test. In JSON they stand file by file, and all settings that differ are named.
"""
app = App(help=HELP, no_args_is_help=False, invoke_without_command=True)


@app.callback()
def runs(context: typer.Context, runs_dir: RunsFolder = RUNS, json_file: JsonFile = None) -> None:
    """List the runs, if no other command follows."""
    _runs_dir.set(runs_dir)
    if context.invoked_subcommand is None:
        _list(runs_dir=runs_dir, json_file=json_file)


@command()
def _list(runs_dir: RunsFolder, json_file: JsonFile) -> None:
    from ddpmctl.files import in_bytes, json_text, write_text
    from ddpmctl.runs.record import run_folders

    terminal, outputs = Terminal(), Outputs(json=json_file)
    outputs.prepare()
    if not runs_dir.is_dir():
        raise UsageError(f"--runs-dir: there is no folder {runs_dir}; train first, or name another folder")
    records, broken = _read(run_folders(runs_dir))
    if json_file:
        text = json_text(_as_dict(runs_dir, records, broken))
        if outputs.only_json:
            terminal.document(text)
            return
        write_text(json_file, text + "\n")
    if not records and not broken:
        terminal.result(f"{runs_dir}/ has no run")
        return
    if records:
        data, differing = {name: record.data for name, record in records.items()}, _in_words(records)
        columns = {
            "run": list(records),
            "state": [record.state for record in records.values()],
            "epochs": [str(record.epochs) for record in records.values()],
            "last": [_score(record.last) for record in records.values()],
            "best": [_score(record.best) for record in records.values()],
            "size": [in_bytes(record.size) for record in records.values()],
            **({"data": list(data.values())} if len(set(data.values())) > 1 else {}),
            **({"settings that differ": differing} if any(differing) else {}),
        }
        of = f"; data: {next(iter(data.values()))}" if "data" not in columns else ""
        names = dict.fromkeys(" and ".join(record.files) for record in records.values() if record.files)
        note = f"last, best: mean accuracy on {', or '.join(names)}" if names else "the runs have no scores"
        terminal.table(f"{runs_dir}/: {_count(len(records), 'run')}{of}", list(columns), list(zip(*columns.values(), strict=True)), caption=note)
    for name, reason in broken.items():
        terminal.result(f"broken: {name}: {reason}")


@app.command("rm")
@command()
def remove(
    names: Annotated[list[Path], typer.Argument(metavar="RUNS", help="Runs, by their names or folders.", show_default=False, autocompletion=run_names)],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove without asking.")] = False,  # noqa: FBT002
    runs_dir: Annotated[Path | None, typer.Option("--runs-dir", help="Where runs are kept (runs).", show_default=False)] = None,
) -> None:
    """Remove runs with all their checkpoints, after a question.

    ddpmctl runs rm q30
    ddpmctl runs rm "runs/test-*" --yes

    A run that is being trained, a link, and what is no run are refused; then nothing is removed.
    """
    from ddpmctl.files import in_bytes
    from ddpmctl.runs.named import located_all
    from ddpmctl.runs.record import size_of
    from ddpmctl.runs.removal import remove_run, require_removable

    terminal = Terminal()
    folders = list(dict.fromkeys(located_all(names, runs_dir or _runs_dir.get())))
    for folder in folders:
        require_removable(folder)
    sizes = {folder: in_bytes(size_of(folder)) for folder in folders}
    for folder, size in sizes.items():
        checkpoints = len(list((folder / "checkpoints").glob("*.pth")))
        terminal.say(f"{folder}: {_count(checkpoints, 'checkpoint')}, {size}")
    if not yes:
        typer.confirm(f"Remove {_count(len(folders), 'run')}? This cannot be undone.", abort=True, err=True)
    for folder in folders:
        remove_run(folder)
        terminal.result(f"removed {folder}")


def _read(folders: Sequence[Path]) -> tuple[dict[str, Record], dict[str, str]]:
    """Return what can be read of runs by name, and why others cannot."""
    from ddpmctl.runs.record import read_record

    records, broken = {}, {}
    for folder in folders:
        try:
            records[folder.name] = read_record(folder)
        except (DdpmctlError, OSError) as error:
            broken[folder.name] = str(error)
    return records, broken


def _in_words(records: Mapping[str, Record]) -> list[str]:
    """Return for each run the settings that differ; where they are many, its preset and what differs from that, without what all runs share."""
    from ddpmctl.config_sources import in_words, nearest_preset

    differing = _differing(records)
    if len(next(iter(differing.values()))) <= FEW:
        return [in_words(values) for values in differing.values()]
    described = [nearest_preset(record.config) for record in records.values()]
    pairs = [set(changed.items()) for _, changed in described]
    shared = set.intersection(*pairs) if len(pairs) > 1 else set()
    one_preset = len({preset for preset, _ in described}) == 1
    texts = []
    for preset, changed in described:
        own = [(name, value) for name, value in changed.items() if (name, value) not in shared]
        more = f"and {len(own) - FEW} more" if len(own) > FEW else ""
        texts.append(", ".join(filter(None, ("" if one_preset else preset, in_words(dict(own[:FEW])), more))))
    return texts


def _differing(records: Mapping[str, Record]) -> dict[str, dict[str, Value]]:
    """Return for each run the settings of its recipe that are not the same in all runs."""
    recipe = [setting.name for section in RECIPE for setting in settings(section)]
    flat = {name: record.config.flat() for name, record in records.items()}
    differing = [key for key in recipe if len({repr(values[key]) for values in flat.values()}) > 1]
    return {name: {key: values[key] for key in differing} for name, values in flat.items()}


def _as_dict(runs_dir: Path, records: Mapping[str, Record], broken: Mapping[str, str]) -> dict[str, Any]:
    differing = _differing(records)
    found = [
        {
            "name": name, "path": str(record.run.folder), "state": record.state, "data": record.data, "settings": differing[name],
            "epochs": record.epochs, "seconds": record.seconds, "last": record.last and asdict(record.last), "best": record.best and asdict(record.best),
            "bytes": record.size,
        }
        for name, record in records.items()
    ]  # fmt: skip
    return {"runs": found, "broken": [{"name": name, "path": str(runs_dir / name), "reason": reason} for name, reason in broken.items()]}


def _score(scored: Scored | None) -> str:
    return "-" if scored is None or not scored.accuracy else f"{scored.standing.accuracy:.3f}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
