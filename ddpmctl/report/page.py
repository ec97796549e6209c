"""Results as one self-contained HTML file: sortable tables, figures, images with hits and misses, settings and hashes."""

from __future__ import annotations

import base64
import io
import itertools
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from ddpmctl import __version__
from ddpmctl.comparison.verdict import Arm, Verdict
from ddpmctl.diffusion.schedules import Schedule, make_schedule
from ddpmctl.errors import visible
from ddpmctl.evaluation.evaluate import EvaluationSpec
from ddpmctl.evaluation.results import CheckpointResult, FileResults
from ddpmctl.evaluation.scores import THRESHOLD
from ddpmctl.files import write_text
from ddpmctl.report.cells import apart, spans
from ddpmctl.report.dark import dark_svg
from ddpmctl.report.evaluation_figures import save_class_bars, save_confusion, save_schedules, save_spectra
from ddpmctl.report.names import checkpoint_names
from ddpmctl.report.tables import FOUND, SHOWN, Table, breakdown_tables
from ddpmctl.task import Task

if TYPE_CHECKING:
    from ddpmctl.evaluation.fidelity import Fidelity

MOST_VIEWS = 6  # arms with images: about 300 KB each per condition file


@dataclass(frozen=True)
class PageFigure:
    """An SVG figure or a PNG image with its caption, which is also the alternative text."""

    file: Path
    caption: str

    @property
    def light(self) -> str:
        """The figure as a data URI."""
        return _file_uri(self.file)

    @property
    def dark(self) -> str:
        """The figure for a dark page, as a data URI; an image is the same."""
        return _file_uri(self.file, dark_svg)


@dataclass(frozen=True)
class Mark:
    """A label under an image: ``kind`` is "hit" or "miss" for a requested one, "extra" for another that is shown."""

    label: str
    kind: str
    probability: float


@dataclass(frozen=True)
class View:
    """An image as a data URI, with a mark for each requested or shown object; the caption says whose image it is, where there are several."""

    source: str
    caption: str = ""
    marks: Sequence[Mark] = ()


@dataclass(frozen=True)
class Card:
    """The images of one condition, side by side."""

    labels: str
    views: Sequence[View]

    @property
    def right(self) -> bool:
        """Whether every image shows exactly the requested objects."""
        return all(mark.kind == "hit" for view in self.views for mark in view.marks)


@dataclass(frozen=True)
class Gallery:
    """The first image of each condition of a file."""

    title: str
    cards: Sequence[Card]


@dataclass(frozen=True)
class Page:
    """The contents of the page from top to bottom; ``facts`` are settings and hashes by section; ``paired``: the images are those of several arms."""

    title: str
    sentences: Sequence[str]
    tables: Sequence[Table]
    figures: Sequence[PageFigure] = ()
    galleries: Sequence[Gallery] = ()
    facts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    paired: bool = False


@dataclass(frozen=True)
class BesideReal:
    """The fidelity of all rows, and real images to show beside theirs.

    Attributes:
        fidelity: one for each row.
        tables: one for each row.
        real: one image of each condition, all files in order: uint8 (conditions, 3, H, W).
    """

    fidelity: Sequence[Fidelity]
    tables: Sequence[Table]
    real: npt.NDArray[np.uint8]


def write_evaluation_page(
    path: Path, rows: Sequence[CheckpointResult], best: int, names: Sequence[str], tables: Sequence[Table], sentences: Sequence[str], spec: EvaluationSpec,
    beside: BesideReal | None = None,
) -> Path:  # fmt: skip
    """Write an evaluation's page: ``tables`` of all checkpoints, and the breakdown, figures and images of the best."""
    chosen = rows[best]
    parts = [replace(part, title=f"{names[best]}: {part.title}") for part in breakdown_tables(chosen.answers)]
    with tempfile.TemporaryDirectory() as folder:
        figures = evaluation_figures(Path(folder), chosen, names[best], beside.fidelity[best] if beside else None)
        images = galleries(names[best], chosen.answers, None if beside is None else beside.real)
        return write_page(path, Page("Evaluation", sentences, [*tables, *parts], figures, images, facts(rows, names, spec)))


def write_comparison_page(
    path: Path, verdict: Verdict, tables: Sequence[Table], figures: Sequence[PageFigure], warnings: Sequence[str], spec: EvaluationSpec
) -> Path:
    """Write a comparison's page: the verdict, tables, figures, and the images of each arm's first checkpoint side by side."""
    rows = [row for arm in verdict.arms for row in arm.rows]
    names = checkpoint_names([row.path for row in rows], spec.titles)
    with tempfile.TemporaryDirectory() as folder:
        more = [
            PageFigure(
                save_class_bars(Path(folder) / f"classes-{number}.png", arm.rows[0].answers, arm.name).with_suffix(".svg"),
                f"Objects found, by class: {arm.name} (its first checkpoint); {FOUND}",
            )
            for number, arm in enumerate(verdict.arms)
        ]
        more.append(_schedules(Path(folder), rows))
        images = [_side_by_side(file, verdict.arms[:MOST_VIEWS]) for file in rows[0].answers]
        page = Page("Comparison", [*verdict.sentences(), *warnings], tables, [*figures, *more], images, facts(rows, names, spec), paired=True)
        return write_page(path, page)


def evaluation_figures(folder: Path, row: CheckpointResult, name: str, fidelity: Fidelity | None = None) -> list[PageFigure]:
    """Write the figures of one checkpoint as PNG and SVG."""
    found = answer_figures(folder, row.answers, name, fidelity)
    return [*found[:2], _schedules(folder, [row]), *found[2:]]


def answer_figures(folder: Path, answers: Mapping[str, FileResults], name: str, fidelity: Fidelity | None = None) -> list[PageFigure]:
    """Write the figures of a classifier's answers, and the power spectra if there are any, as PNG and SVG."""
    found = [
        PageFigure(save_class_bars(folder / "classes.png", answers, name).with_suffix(".svg"), f"Objects found, by class: {name}; {FOUND}"),
        PageFigure(
            save_confusion(folder / "confusion.png", answers, name).with_suffix(".svg"), f"Classes shown in images that request each class: {name}; {SHOWN}"
        ),
    ]
    if fidelity is not None:
        spectra = dict(zip((name, "real images"), fidelity.spectra, strict=True))
        found.append(
            PageFigure(save_spectra(folder / "spectra.png", spectra, "power spectra").with_suffix(".svg"), f"Power spectra of {name} and of real images")
        )
    return found


def facts(rows: Sequence[CheckpointResult], names: Sequence[str], spec: EvaluationSpec) -> dict[str, dict[str, str]]:
    """Return the settings and hashes of an evaluation, by section."""
    answers: Mapping[str, FileResults] = rows[0].answers
    found = {
        "Evaluation": {
            "classifier": f"{spec.classifier.name}, sha256 {spec.classifier.sha256}",
            "conditions": ", ".join(f"{name} ({len(one.conditions)})" for name, one in answers.items()),
            "images per condition": str(spec.repeats),
            "seed": str(spec.seed),
            "device": f"{spec.compute.kind}, {spec.compute.precision}",
            "ddpmctl": __version__,
        }
    }
    for row, name in zip(rows, names, strict=True):
        settings = {f"{section}.{key}": str(value) for section, values in asdict(row.config).items() for key, value in values.items()}
        found[name] = {"file": str(row.path), "sha256": row.sha256, "epoch": str(row.epoch), **settings}
    return found


def galleries(name: str, answers: Mapping[str, FileResults], real: npt.NDArray[np.uint8] | None = None) -> list[Gallery]:
    """Return the images of each condition file, beside ``real`` images of the conditions (all files in order)."""
    rest = None if real is None else iter(real)
    return [_gallery(name, file, of, None if rest is None else itertools.islice(rest, len(of.conditions))) for file, of in answers.items()]


def _gallery(name: str, file: str, answers: FileResults, real: Iterable[npt.NDArray[np.uint8]] | None) -> Gallery:
    """Return a checkpoint's images of one condition file, beside ``real`` images of the conditions."""
    views = _views(answers, "" if real is None else "sampled")
    beside = [()] * len(views) if real is None else [(View(_data_uri(image), "real"),) for image in real]
    cards = [Card(", ".join(labels), [view, *more]) for labels, view, more in zip(answers.conditions, views, beside, strict=True)]
    return Gallery(f"{name}: {file}: {sum(card.right for card in cards)} of {len(cards)} are right", cards)


def _side_by_side(file: str, arms: Sequence[Arm]) -> Gallery:
    """Return the images of each arm's first checkpoint for one condition file, condition by condition."""
    views = [_views(arm.rows[0].answers[file], arm.name) for arm in arms]
    conditions = arms[0].rows[0].answers[file].conditions
    cards = [Card(", ".join(labels), together) for labels, *together in zip(conditions, *views, strict=True)]
    right = [sum(all(mark.kind == "hit" for mark in view.marks) for view in of) for of in views]
    counts = ", ".join(f"{arm.name} {count}" for arm, count in zip(arms, right, strict=True))
    return Gallery(f"{file}: {len(cards)} conditions; images that are right: {counts}", cards)


def _views(answers: FileResults, caption: str) -> list[View]:
    """Return the first image of each condition, with the labels that it shows and those that it lacks."""
    found = zip(answers.images[:, 0], answers.conditions, answers.probabilities[:, 0], strict=True)
    return [View(_data_uri(image), caption, _marks(labels, outputs, answers.task)) for image, labels, outputs in found]


def _marks(labels: Sequence[str], outputs: npt.NDArray[np.float32], task: Task) -> list[Mark]:
    shown = {name for name, value in zip(task.classes, outputs, strict=False) if value > THRESHOLD}
    kinds = {**{label: "hit" if label in shown else "miss" for label in labels}, **dict.fromkeys(sorted(shown - set(labels)), "extra")}
    return [Mark(label, kind, float(outputs[task.index[label]])) for label, kind in kinds.items()]


def _schedules(folder: Path, rows: Sequence[CheckpointResult]) -> PageFigure:
    found: dict[str, Schedule] = {}
    for row in rows:
        diffusion = row.config.diffusion
        found.setdefault(f"{diffusion.schedule}, T = {diffusion.timesteps}", make_schedule(diffusion))
    return PageFigure(save_schedules(folder / "schedules.png", found).with_suffix(".svg"), f"Noise schedules: {'; '.join(found)}")


def write_page(path: Path, page: Page) -> Path:
    """Write the page; all texts are escaped, as HTML and by ``visible``."""
    environment = Environment(
        loader=PackageLoader("ddpmctl.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        finalize=lambda value: visible(value) if isinstance(value, str) else value,
    )  # fmt: skip
    environment.filters |= {"apart": apart, "spans": spans}
    text = environment.get_template("page.html.j2").render(page=page, version=__version__)
    return write_text(path, text)


def _file_uri(file: Path, recolour: Callable[[str], str] = str) -> str:
    """Return a figure as a data URI: an SVG after ``recolour`` has changed its text, or a PNG unchanged."""
    if file.suffix == ".png":
        return _uri("png", file.read_bytes())
    return _uri("svg+xml", recolour(file.read_text(encoding="utf-8")).encode())


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _data_uri(image: npt.NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(buffer, "PNG", optimize=True)
    return _uri("png", buffer.getvalue())
