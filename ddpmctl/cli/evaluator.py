"""``ddpmctl evaluator train`` and ``ddpmctl evaluator check``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ddpmctl.cli.commands import App
from ddpmctl.cli.completion import one_of
from ddpmctl.cli.options import ClassifierAlone, command
from ddpmctl.cli.outputs import prepare_output
from ddpmctl.cli.terminal import Terminal
from ddpmctl.config_sources import overrides

if TYPE_CHECKING:
    from ddpmctl.evaluation.scores import Score

HELP = """The classifier that scores images on the embedded benchmark.

ddpmctl evaluator check
ddpmctl evaluator train --out evaluator.pt
"""
app = App(help=HELP)


@app.command("train")
@command("device")
def train_on_renders(
    given: dict[str, str],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")] = Path("evaluator.pt"),
    network: Annotated[
        str,
        typer.Option(help="compact, or resnet18: the lab's network, as a second classifier.", metavar="NAME", autocompletion=one_of(("compact", "resnet18"))),
    ] = "compact",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 2400,
    scenes: Annotated[int, typer.Option(min=1, help="Training scenes, three images each.")] = 12_000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of scenes, weights and order.")] = 0,
) -> None:
    """Train a classifier on rendered images.

    ddpmctl evaluator train --out evaluator.pt
    ddpmctl evaluator train --network resnet18 --out second.pt
    """
    terminal = Terminal()
    prepare_output(out, "--out", folder=False)
    with terminal.busy("loading torch"):
        from ddpmctl.config import Config
        from ddpmctl.device import make_compute_device
        from ddpmctl.evaluation.classifier_training import ClassifierStep, ClassifierTrained, train_classifier

    compute = make_compute_device(Config().replace(**overrides(given, "device")).device)
    for event in terminal.follow(train_classifier(out, network=network, steps=steps, scenes=scenes, seed=seed, compute=compute)):
        if isinstance(event, ClassifierStep):
            terminal.say(f"step {event.step}  loss {event.loss:.5f}  {event.seconds:.0f} s")
        if isinstance(event, ClassifierTrained):
            _table(terminal, str(event.path), event.scores)


@app.command("check")
@command()
def check(
    evaluator: ClassifierAlone = None,
    scenes: Annotated[int, typer.Option(min=1, help="Scenes; each gives one image with one, two and three objects.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the scenes.")] = 0,
) -> None:
    """Score a classifier on new renders, whose objects are known, and on images that are half right, where it should be unsure.

    ddpmctl evaluator check
    ddpmctl evaluator check --evaluator checkpoint.pth --scenes 500
    """
    terminal = Terminal()
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
    columns = ["one object", "images", f"sure of a shape (above {SURE:g})", "finds one of two shapes"]
    terminal.table("images that are half right", columns, rows)


def _table(terminal: Terminal, title: str, scores: Mapping[int, Score]) -> None:
    from ddpmctl.evaluation.scores import pooled

    named = {**{str(count): score for count, score in scores.items()}, "all": pooled(list(scores.values()))}
    rows = [[name, f"{s.images}", f"{s.accuracy:.4%}", f"{s.exact_match:.2%}"] for name, s in named.items()]
    terminal.table(f"{title} on new renders", ["objects", "images", "accuracy", "exact match"], rows)
