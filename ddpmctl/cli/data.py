"""``ddpmctl data``: render the embedded benchmark; verify, count and convert data sets; the cache."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ddpmctl.cli.commands import App
from ddpmctl.cli.data_options import DataFormat, LabelColumn, Repeated, data_source
from ddpmctl.cli.options import SceneCount, command
from ddpmctl.cli.outputs import Outputs, figure_line, output_option, prepare_output
from ddpmctl.cli.terminal import Terminal
from ddpmctl.errors import DataError, UsageError

if TYPE_CHECKING:
    from ddpmctl.data.label_counts import LabelCounts

HELP = """The embedded benchmark as a folder; checks, labels and conversion of data sets.

ddpmctl data render FOLDER
ddpmctl data verify FOLDER
ddpmctl data labels FOLDER
"""
app = App(help=HELP)

DataFolder = Annotated[Path, typer.Argument(help="A folder of images and labels, or a zip file.")]

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
def verify(
    folder: DataFolder, form: DataFormat = None, label_column: LabelColumn = None, repeated: Repeated = None,
) -> None:  # fmt: skip
    """Name every missing or broken image and wrong label, in one pass; in the lab's layout also images that are not declared.

    ddpmctl data verify iclevr
    ddpmctl data verify photos --format classes

    The form is recognised by what is in the folder: lab, edm (dataset.json, zip), metadata (metadata.jsonl or .csv), clevr (scenes), classes, plain.
    """
    from ddpmctl.data.folders import Problem
    from ddpmctl.data.verify import verify_folder

    terminal = Terminal()

    def show(event: object) -> None:
        if isinstance(event, Problem):
            terminal.result(f"{event.path}: {event.what}")

    found = terminal.finish(verify_folder(data_source(folder, form=form, label_column=label_column, repeated=repeated)), show)
    declared = found.declared
    sizes = ", ".join(f"{count} of {size}" for size, count in found.label_sets_by_size.items())
    if declared.format == "lab":
        terminal.result(f"{found.images:,} images of {found.scenes:,} scenes; {found.label_sets:,} distinct label sets ({sizes})")
    else:
        sets = f"{len(declared.classes):,} labels in {found.label_sets:,} distinct label sets ({sizes})" if declared.classes else "without labels"
        terminal.result(f"{declared.format}: {found.images:,} images; {sets}")
    for note in declared.notes:
        terminal.result(note)
    for name, count in found.conditions.items():
        terminal.result(f"{name}: {count.conditions} conditions, {count.objects} objects; {count.in_training} of the label sets occur in training")
    if found.problems:
        raise DataError(f"{folder}: {found.problems} problem{'s' if found.problems > 1 else ''}, named above")
    terminal.result("no problems")


@app.command("labels")
@command()
def labels(
    folder: DataFolder,
    form: DataFormat = None,
    label_column: LabelColumn = None,
    repeated: Repeated = None,
    json_file: Annotated[Path | None, output_option("--json", "Write the counts as JSON ('-': to stdout, without tables).")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Draw which labels occur together, as PNG and SVG.", show_default=False)] = None,
) -> None:
    """Count the labels of a data set, and how often they occur together.

    ddpmctl data labels photos
    ddpmctl data labels photos --out labels.png
    """
    from ddpmctl.data.declared import read_declared
    from ddpmctl.data.label_counts import count_labels
    from ddpmctl.files import json_text
    from ddpmctl.report.json_csv import write_json

    terminal, outputs = Terminal(), Outputs(json=json_file)
    outputs.prepare()
    if out:
        prepare_output(out, "--out", folder=False, suffix=".png")
    declared = read_declared(data_source(folder, form=form, label_column=label_column, repeated=repeated))
    found = count_labels(declared)
    result = {"format": declared.format, **found.to_dict()}
    if outputs.only_json:
        terminal.document(json_text(result))
    else:
        _tell_labels(terminal, str(folder), found)
        for note in declared.notes:
            terminal.result(note)
    outputs.write(terminal, json=lambda file: write_json(file, result))
    if out:
        from ddpmctl.report.label_figure import save_label_figure

        terminal.say(figure_line(save_label_figure(out, found)))


def _tell_labels(terminal: Terminal, name: str, found: LabelCounts) -> None:
    if not found.counts:
        terminal.result(f"{name}: {found.images:,} images without labels")
        return
    rows = []
    for label, count in sorted(found.counts.items(), key=lambda item: -item[1]):
        partner = found.partner(label)
        rows.append([label, f"{count:,}", f"{count / found.images:.1%}", f"{partner[0]} ({partner[1]:,})" if partner else "-"])
    sizes = ", ".join(f"{count:,} with {size}" for size, count in found.sizes.items())
    terminal.table(f"{name}: {found.images:,} images", ["label", "images", "share", "most often with"], rows, caption=f"labels in an image: {sizes}")


@app.command("convert")
@command()
def convert_folder(
    folder: DataFolder,
    out: Annotated[Path, typer.Argument(help="A new or empty folder.")],
    target: Annotated[str, typer.Option("--format", help="metadata (metadata.jsonl), or classes: one folder for each.", metavar="NAME")] = "metadata",
    source_format: Annotated[str | None, typer.Option("--from", help="Form of the source.", metavar="NAME", show_default="recognised")] = None,
    label_column: LabelColumn = None,
    repeated: Repeated = None,
) -> None:
    """Write a data set in another form, with its images byte for byte.

    ddpmctl data convert iclevr photos
    ddpmctl data convert set.zip folders --format classes
    """
    from ddpmctl.data.convert import convert
    from ddpmctl.data.declared import read_declared

    terminal = Terminal()
    declared = read_declared(data_source(folder, form=source_format, label_column=label_column, repeated=repeated))
    terminal.finish(convert(declared, out, target))
    terminal.result(str(out))


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
