"""``ddpmctl evaluate``."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddpmctl.cli.common import describe_evaluator, only_one_source, prepare_output
from ddpmctl.cli.options import RUNS, Assume, ConfigFile, Data, EvaluatorFile, RunsDir, Scenes, assumed, command, overrides
from ddpmctl.cli.terminal import Terminal
from ddpmctl.errors import DataError, UsageError
from ddpmctl.files import atomic_write

if TYPE_CHECKING:
    from ddpmctl.engine.events import Judged


@command("sampling", "machine")
def evaluate(
    given: dict[str, str],
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Checkpoints, runs or folders of .pth files; else the newest run's best.", show_default=False)
    ] = None,
    data: Data = None,
    scenes: Scenes = None,
    evaluator: EvaluatorFile = None,
    conditions: Annotated[list[Path] | None, typer.Option("--conditions", help="JSON list of label lists to score on, instead of the data's.")] = None,
    repeats: Annotated[int, typer.Option("--repeats", "-r", min=1, max=1000, help="Images for each condition, each from a seed of its own.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results as JSON ('-': to stdout, and no table).", show_default=False)] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write the results as CSV.", show_default=False)] = None,
    grid: Annotated[Path | None, typer.Option("--grid", help="Folder for grids of the pictures.", show_default=False)] = None,
    runs_dir: RunsDir = RUNS,
    config: ConfigFile = None,
    assume: Assume = None,
) -> None:
    """Score checkpoints on the lab's conditions: accuracy as the lab counts it, and exact match.

    Results are kept by content: a second call on unchanged files answers at once. A broken file is listed and does not stop the rest.
    """
    only_one_source(data, scenes)
    terminal = Terminal()
    changes, assumptions = overrides(given, "sampling", config_file=config), assumed(assume)
    machine_settings = overrides(given, "machine", config_file=config)
    _prepare(grid, json_file, csv_file)

    from ddpmctl.config import Config
    from ddpmctl.engine.evaluate import Task
    from ddpmctl.engine.machine import make_machine
    from ddpmctl.evaluator.classifiers import load_evaluator

    files = _conditions(conditions, data, scenes)
    checkpoints = _checkpoints(paths, runs_dir, terminal)
    machine = make_machine(Config().replace(**machine_settings).machine)
    judge = load_evaluator(evaluator, data, machine.device)
    task = Task(files, judge, machine, seed, repeats, changes, assumptions, grid, _titles(checkpoints))
    rows, failures = _collect(terminal, checkpoints, task)
    result = _as_dict(rows, failures, task)
    if str(json_file) == "-":
        terminal.result(json.dumps(result, indent=2))
    else:
        title = f"evaluator {describe_evaluator(judge)}; {_pictures(repeats)}; {machine.device.type}, {machine.precision}"
        _table(terminal, rows, list(files), title, task.titles)
        if json_file:
            _write(json_file, json.dumps(result, indent=2) + "\n")
    if csv_file:
        _write_csv(csv_file, result)
    if failures:
        raise DataError(f"{len(failures)} of {len(checkpoints)} checkpoints could not be scored; the reasons stand above")


def _prepare(grid: Path | None, json_file: Path | None, csv_file: Path | None) -> None:
    if json_file and json_file == csv_file:
        raise UsageError(f"--json and --csv: both name {json_file}, and one would overwrite the other")
    if grid:
        prepare_output(grid, "--grid", folder=True)
    for flag, file in (("--json", json_file), ("--csv", csv_file)):
        if file and str(file) != "-":
            prepare_output(file, flag, folder=False)


def _conditions(files: list[Path] | None, data: Path | None, scenes: int | None) -> dict[str, list[tuple[str, ...]]]:
    """Return the conditions by the name of their file: those named, else those of the data."""
    from ddpmctl.data.dataset import load_conditions
    from ddpmctl.data.lab import read_conditions

    if not files:
        return load_conditions(data, scenes=scenes).conditions
    named = {file.stem: read_conditions(file) for file in files}
    if len(named) < len(files):
        raise UsageError("--conditions: two files have the same name; their columns could not be told apart")
    return named


def _checkpoints(paths: list[Path] | None, runs_dir: Path, terminal: Terminal) -> list[Path]:
    from ddpmctl.engine.runs import find_checkpoints, newest_best

    if paths:
        return [file for path in paths for file in find_checkpoints(path)]
    newest = newest_best(runs_dir)
    terminal.say(f"checkpoint: {newest} (the newest run's best)")
    return [newest]


def _collect(terminal: Terminal, checkpoints: list[Path], task: Any) -> tuple[list[Judged], list[Any]]:
    from ddpmctl.engine.evaluate import evaluate as run
    from ddpmctl.engine.events import Failed, Judged

    rows, failures = [], []
    for event in terminal.follow(run(checkpoints, task)):
        if isinstance(event, Judged):
            rows.append(event)
        elif isinstance(event, Failed):
            failures.append(event)
    return rows, failures


def _pictures(repeats: int) -> str:
    return f"{repeats} image{'s' if repeats > 1 else ''} a condition"


def _mean(row: Judged) -> float:
    accuracies = [score.accuracy for score in row.scores.values()]
    return sum(accuracies) / len(accuracies)


def _titles(checkpoints: list[Path]) -> dict[Path, str]:
    """Return names that tell the checkpoints apart, for those that share a file name: run and file."""
    names = [path.name for path in checkpoints]
    folders = {path: path.parent.parent if path.parent.name == "checkpoints" else path.parent for path in checkpoints}
    return {path: f"{folders[path].resolve().name}-{path.stem}" for path in checkpoints if names.count(path.name) > 1}


def _table(terminal: Terminal, rows: list[Judged], files: list[str], title: str, titles: Mapping[Path, str]) -> None:
    from ddpmctl.engine.generate import in_words

    if not rows:
        return
    recorded = [name for name in files if any(name in row.recorded for row in rows)]
    with_loss = any(row.loss is not None for row in rows)
    columns = ["checkpoint", "epoch", *(["loss"] if with_loss else []), *(f"{name} recorded" for name in recorded)]
    columns += [text for name in files for text in (name, f"{name} exact")]
    lines = []
    for row in rows:
        line = [titles.get(row.path, row.path.name), "" if row.epoch is None else str(row.epoch)]
        line += [("" if row.loss is None else f"{row.loss:.6f}")] if with_loss else []
        line += [f"{row.recorded[name]:.4f}" if name in row.recorded else "" for name in recorded]
        line += [text for name in files for text in (f"{row.scores[name].accuracy:.4f}", f"{row.scores[name].exact_match:.4f}")]
        lines.append(line)
    best = max(range(len(rows)), key=lambda index: _mean(rows[index]))
    used = "; ".join(sorted({in_words(row.sampling) for row in rows}))
    kept = sum(row.kept for row in rows)
    marked = f"best by mean accuracy: {lines[best][0]}; {used}; {kept} of {len(rows)} from kept results"
    terminal.table(title, columns, lines, marked=best, caption=marked)


def _as_dict(rows: list[Judged], failures: list[Any], task: Any) -> dict[str, Any]:
    return {
        "evaluator": {"name": task.evaluator.name, "sha256": task.evaluator.sha256},
        "device": task.machine.device.type,
        "precision": task.machine.precision,
        "seed": task.seed,
        "repeats": task.repeats,
        "checkpoints": [
            {
                "path": str(row.path), "epoch": row.epoch, "loss": row.loss, "recorded": row.recorded, "sampling": dict(row.sampling.__dict__),
                "scores": {name: score.to_dict() for name, score in row.scores.items()},
            }
            for row in rows
        ],
        "failed": [{"path": str(failure.path), "reason": failure.reason} for failure in failures],
    }  # fmt: skip


def _write_csv(path: Path, result: dict[str, Any]) -> None:
    rows = [
        {
            "path": row["path"], "epoch": row["epoch"], "loss": row["loss"], "conditions": name, **score, "recorded": row["recorded"].get(name),
            **row["sampling"], "seed": result["seed"], "repeats": result["repeats"], "precision": result["precision"],
            "evaluator": result["evaluator"]["sha256"],
        }
        for row in result["checkpoints"]
        for name, score in row["scores"].items()
    ]  # fmt: skip
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["path"])
        writer.writeheader()
        writer.writerows(rows)


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
