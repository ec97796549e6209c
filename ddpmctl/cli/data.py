"""``ddpmctl data render`` and ``ddpmctl data verify``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from ddpmctl.cli.commands import App
from ddpmctl.cli.options import SceneCount, command
from ddpmctl.cli.terminal import Terminal
from ddpmctl.errors import DataError, UsageError

HELP = """The embedded benchmark as a folder, and checks of a folder.

ddpmctl data render FOLDER
ddpmctl data verify FOLDER
ddpmctl data cache list
"""
app = App(help=HELP)

CACHE_HELP = """The cache of decoded images and of evaluation results.

ddpmctl data cache list
ddpmctl data cache clear --older-than 30
"""
cache = App(help=CACHE_HELP)
app.add_typer(cache, name="cache")


@app.command("render")
@command()
def render_folder(
    folder: Annotated[Path, typer.Argument(help="A new or empty folder.")],
    scenes: SceneCount = None,
    size: Annotated[str, typer.Option(help="Width x height of the images in pixels.")] = "320x240",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the scenes; 0 is the benchmark.")] = 0,
) -> None:
    """Write the embedded benchmark in the lab's layout, with real PNGs.

    ddpmctl data render benchmark
    ddpmctl data render small --scenes 100 --size 64x64
    """
    from ddpmctl.benchmark.embedded import scene_count
    from ddpmctl.benchmark.writer import write_benchmark

    terminal = Terminal()
    width, height = _size(size)
    terminal.finish(write_benchmark(folder, scenes=scene_count(scenes), width=width, height=height, seed=seed))
    terminal.result(str(folder))


@app.command("verify")
@command()
def verify(folder: Annotated[Path, typer.Argument(help="A folder in the lab's layout.")]) -> None:
    """Name every missing, broken or undeclared image and label, in one pass.

    ddpmctl data verify iclevr
    ddpmctl data verify benchmark
    """
    from ddpmctl.data.folders import Problem
    from ddpmctl.data.verify import verify_folder

    terminal = Terminal()

    def show(event: object) -> None:
        if isinstance(event, Problem):
            terminal.result(f"{event.path}: {event.what}")

    found = terminal.finish(verify_folder(folder), show)
    sizes = ", ".join(f"{count} of {size}" for size, count in found.label_sets_by_size.items())
    terminal.result(f"{found.images:,} images of {found.scenes:,} scenes; {found.label_sets:,} distinct label sets ({sizes})")
    for name, count in found.conditions.items():
        terminal.result(f"{name}: {count.conditions} conditions, {count.objects} objects; {count.in_training} of the label sets occur in training")
    if found.problems:
        raise DataError(f"{folder}: {found.problems} problem{'s' if found.problems > 1 else ''}, named above")
    terminal.result("no problems")


def _size(text: str) -> tuple[int, int]:
    from ddpmctl.benchmark.writer import SIDES

    match = re.fullmatch(r"([0-9]{1,5})[xX]([0-9]{1,5})", text)
    sides = [int(side) for side in match.groups()] if match else []
    if not match or not all(SIDES[0] <= side <= SIDES[1] for side in sides):
        raise UsageError(f"--size: {text!r} is not a size; give width x height in pixels, e.g. 320x240, each from {SIDES[0]} to {SIDES[1]}")
    return sides[0], sides[1]


@cache.command("list")
@command()
def list_cache() -> None:
    """List the files in the cache with their sizes and the days since they were last used.

    ddpmctl data cache list
    DDPMCTL_CACHE_DIR=cache ddpmctl data cache list
    """
    from ddpmctl.data.cache import cache_files, cache_folder
    from ddpmctl.files import in_bytes

    folder, files = cache_folder(), cache_files()
    rows = [[str(file.path.relative_to(folder)), in_bytes(file.size), f"{file.days:.1f}"] for file in files]
    terminal = Terminal()
    if rows:
        terminal.table(str(folder), ["file", "size", "days unused"], rows)
    terminal.result(f"{folder}: {len(rows)} files, {in_bytes(sum(file.size for file in files))}")


@cache.command("clear")
@command()
def clear_cache(older_than: Annotated[float, typer.Option("--older-than", min=0, help="Only files that were not used for so many days.")] = 0) -> None:
    """Remove the files in the cache; they are made again when they are needed.

    ddpmctl data cache clear
    ddpmctl data cache clear --older-than 30
    """
    from ddpmctl.data.cache import cache_folder, remove_unused
    from ddpmctl.files import in_bytes

    removed = remove_unused(older_than)
    Terminal().result(f"{cache_folder()}: removed {len(removed)} files, {in_bytes(sum(file.size for file in removed))}")
