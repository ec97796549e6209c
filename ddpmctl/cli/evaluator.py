"""``ddpmctl evaluator train`` and ``ddpmctl evaluator check``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddpmctl.cli.commands import App
from ddpmctl.cli.completion import one_of
from ddpmctl.cli.data_options import DataFormat, Fit, LabelColumn, Repeated, Size, data_source
from ddpmctl.cli.options import ClassifierAlone, command
from ddpmctl.cli.outputs import Outputs, output_option, prepare_output
from ddpmctl.cli.terminal import Terminal
from ddpmctl.config_sources import overrides
from ddpmctl.data.source import DataSource
from ddpmctl.errors import DataError, UsageError
from ddpmctl.iclevr import ICLEVR
from ddpmctl.task import Task

if TYPE_CHECKING:
    from ddpmctl.evaluation.own_classifier import Checked
    from ddpmctl.evaluation.scores import Score

HELP = """The classifier that scores images: train one on a data set or on renders, and check it.

ddpmctl evaluator check
ddpmctl evaluator train --data photos
"""
app = App(help=HELP)


@app.command("train")
@command("device")
def train_classifier(
    given: dict[str, str],
    data: Annotated[
        Path | None, typer.Option("--data", envvar="DDPMCTL_DATA", help="Folder of images and labels; without it, new renders.", show_default=False)
    ] = None,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Minutes of training, with --data or --size.", show_default="5")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The file to write.", show_default="evaluator.pt in the data's folder, or here")
    ] = None,
    network: Annotated[
        str,
        typer.Option(help="compact, or resnet18: the lab's network, as a second classifier.", metavar="NAME", autocompletion=one_of(("compact", "resnet18"))),
    ] = "compact",
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps, instead of minutes.", show_default="2400 without --data")] = None,
    mirror: Annotated[bool | None, typer.Option("--mirror/--no-mirror", help="Also show mirrored images.", show_default="only i-CLEVR's")] = None,
    json_file: Annotated[Path | None, output_option("--json", "With --data or --size: write the figures as JSON.")] = None,
    scenes: Annotated[int, typer.Option(min=1, help="Without --data: training scenes, three images each.")] = 12_000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of scenes, weights and order.")] = 0,
    size: Size = None,
    fit: Fit = None,
    form: DataFormat = None,
    label_column: LabelColumn = None,
    repeated: Repeated = None,
) -> None:  # fmt: skip
    """Train a classifier, on nine tenths of a data set or on rendered images, and say how good it is on others.

    ddpmctl evaluator train --data photos --minutes 5
    ddpmctl evaluator train --out evaluator.pt
    ddpmctl evaluator train --network resnet18 --out second.pt

    In the folder of the data it is found by itself; so is the one that is kept in the cache, where that folder cannot be written.
    """
    terminal = Terminal()
    if data is not None or size not in (None, ICLEVR.size):
        source = data_source(data, size=size, fit=fit, form=form, label_column=label_column, repeated=repeated, hold_out=0)
        training = {"minutes": minutes, "steps": steps, "network": network, "mirror": mirror, "seed": seed}
        _on_data(terminal, given, source, out, Outputs(json=json_file), **{name: value for name, value in training.items() if value is not None})
        return
    if minutes is not None or json_file is not None:
        raise UsageError("--minutes, --json: need --data or --size; on renders of the usual size, give --steps")
    _on_renders(terminal, given, out or Path("evaluator.pt"), network=network, steps=steps, scenes=scenes, seed=seed)


def _on_data(terminal: Terminal, given: dict[str, str], source: DataSource, out: Path | None, outputs: Outputs, **training: Any) -> None:
    """Train a classifier on a data set's images, and tell how good it is."""
    if outputs.only_json:
        raise UsageError("--json -: the table stands on stdout; give --json the name of a file")
    outputs.prepare()
    if out is not None:
        prepare_output(out, "--out", folder=False)
    with terminal.busy("loading torch"):
        from ddpmctl.config import Config
        from ddpmctl.data.dataset import load_dataset
        from ddpmctl.device import make_compute_device
        from ddpmctl.evaluation.classifier_file import find_classifier
        from ddpmctl.evaluation.classifier_training import ClassifierStep
        from ddpmctl.evaluation.own_classifier import OwnTrained, train_on_images
        from ddpmctl.report.json_csv import write_json

    compute = make_compute_device(Config().replace(**overrides(given, "device")).device)
    dataset = terminal.finish(load_dataset(source))
    file = out or _place(source.path, dataset.task)
    for event in terminal.follow(train_on_images(file, dataset, compute, **training)):
        if isinstance(event, ClassifierStep):
            terminal.say(f"step {event.step}  loss {event.loss:.5f}  {event.seconds:.0f} s")
        if isinstance(event, OwnTrained):
            _checked_table(terminal, str(event.path), event.checked)
            figures = {"file": str(file), **event.checked.to_dict()}
            outputs.write(terminal, json=partial(write_json, result=figures))
    if warning := find_classifier(file).warning:
        terminal.warn(f"{warning}; more --minutes may help")


def _place(data: Path | None, task: Task) -> Path:
    """Return where a classifier is found by itself: in the folder of the data, or in the cache where that cannot hold it.

    Raises:
        UsageError: another file has its name, or i-CLEVR's classifier, which would replace the built-in one everywhere, finds no place in the folder.
    """
    from ddpmctl.evaluation.classifier_file import OWN_FILE, find_classifier, stored_classifier

    in_folder = data is not None and data.is_dir() and os.access(data, os.W_OK)
    if not in_folder and task.key == ICLEVR.key:
        raise UsageError(f"--out: cannot write the classifier to {data}; give the name of a file")
    file = data / OWN_FILE if data is not None and in_folder else stored_classifier(task)
    if file.exists():
        try:
            find_classifier(file)
        except DataError as error:
            raise UsageError(f"--out: {file} exists, and is no classifier ({error}); name another file") from None
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def _on_renders(terminal: Terminal, given: dict[str, str], out: Path, *, network: str, steps: int | None, scenes: int, seed: int) -> None:
    prepare_output(out, "--out", folder=False)
    with terminal.busy("loading torch"):
        from ddpmctl.config import Config
        from ddpmctl.device import make_compute_device
        from ddpmctl.evaluation.classifier_training import STEPS, ClassifierStep, ClassifierTrained, train_classifier

    compute = make_compute_device(Config().replace(**overrides(given, "device")).device)
    for event in terminal.follow(train_classifier(out, network=network, steps=steps or STEPS, scenes=scenes, seed=seed, compute=compute)):
        if isinstance(event, ClassifierStep):
            terminal.say(f"step {event.step}  loss {event.loss:.5f}  {event.seconds:.0f} s")
        if isinstance(event, ClassifierTrained):
            _table(terminal, str(event.path), event.scores)


@app.command("check")
@command()
def check(
    evaluator: ClassifierAlone = None,
    data: Annotated[Path | None, typer.Option("--data", help="Data set whose last tenth is scored, instead of renders.", show_default=False)] = None,
    size: Size = None,
    fit: Fit = None,
    form: DataFormat = None,
    label_column: LabelColumn = None,
    repeated: Repeated = None,
    scenes: Annotated[int, typer.Option(min=1, help="Scenes; each gives one image with one, two and three objects.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the scenes.")] = 0,
) -> None:
    """Score a classifier on new renders, whose objects are known, and on images that are half right, where it should be unsure.

    ddpmctl evaluator check
    ddpmctl evaluator check --evaluator checkpoint.pth --scenes 500
    ddpmctl evaluator check --data photos
    """
    terminal = Terminal()
    if data is not None or size not in (None, ICLEVR.size):
        source = data_source(data, size=size, fit=fit, form=form, label_column=label_column, repeated=repeated, hold_out=0)
        _check_on_data(terminal, evaluator, source)
        return
    with terminal.busy("loading torch and the classifier"):
        from ddpmctl.evaluation.classifier_training import check_classifier
        from ddpmctl.evaluation.classifiers import load_classifier
        from ddpmctl.evaluation.half_right import SURE, check_half_right

        loaded = load_classifier(evaluator)
    with terminal.busy("rendering images and scoring them"):
        scores = check_classifier(loaded, scenes, seed=seed)
    _table(terminal, loaded.describe(), scores)
    with terminal.busy("rendering images that are half right and scoring them"):
        half_right = check_half_right(loaded, seed=seed)
    rows = [[kind.name, str(kind.images), f"{kind.sure:.2%}", f"{kind.one_of_two:.2%}"] for kind in half_right]
    heads = ["one object", "images", f"sure of a shape (above {SURE:g})", "finds one of two shapes"]
    terminal.table("images that are half right", heads, rows)


def _check_on_data(terminal: Terminal, evaluator: Path | None, source: DataSource) -> None:
    with terminal.busy("loading torch"):
        from ddpmctl.data.dataset import load_dataset
        from ddpmctl.evaluation.classifiers import load_classifier
        from ddpmctl.evaluation.own_classifier import check_on_images

    dataset = terminal.finish(load_dataset(source))
    loaded = load_classifier(evaluator, source.path, task=dataset.task)
    _checked_table(terminal, loaded.describe(), check_on_images(loaded, dataset))


def _checked_table(terminal: Terminal, name: str, checked: Checked) -> None:
    from ddpmctl.report.tables import in_brackets

    rows = [["all labels", str(checked.score.images), in_brackets(checked.accuracy), in_brackets(checked.exact)]]
    rows += [[label, str(shown), f"{found / shown:.4f}", ""] for label, (found, shown) in checked.classes.items()]
    note = "the last tenth of the data, which did not train it; 95 % intervals over images; of a class: images that show it, and the share in which it is found"
    terminal.table(f"{name} on real images", ["", "images", "accuracy", "exact match"], rows, caption=note)


def _table(terminal: Terminal, title: str, scores: Mapping[int, Score]) -> None:
    from ddpmctl.evaluation.scores import pooled

    named = {**{str(count): score for count, score in scores.items()}, "all": pooled(list(scores.values()))}
    rows = [[name, f"{s.images}", f"{s.accuracy:.4%}", f"{s.exact_match:.2%}"] for name, s in named.items()]
    terminal.table(f"{title} on new renders", ["objects", "images", "accuracy", "exact match"], rows)
