"""Results as one self-contained HTML file: sortable tables, figures, images with hits and misses, settings and hashes."""

from __future__ import annotations

import base64
import io
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from ddpmctl import __version__
from ddpmctl.comparison.verdict import Verdict
from ddpmctl.diffusion.schedules import Schedule, make_schedule
from ddpmctl.evaluation.evaluate import EvaluationSpec
from ddpmctl.evaluation.fidelity import Fidelity
from ddpmctl.evaluation.results import CheckpointResult, FileResults
from ddpmctl.evaluation.scores import THRESHOLD
from ddpmctl.files import write_text
from ddpmctl.labels import CLASSES
from ddpmctl.report.evaluation_figures import save_class_bars, save_confusion, save_schedules, save_spectra
from ddpmctl.report.tables import Table, breakdown_tables

GALLERIES = 6  # checkpoints with images: about 300 KB each per condition file


@dataclass(frozen=True)
class PageFigure:
    """A figure with its caption, which is also the alternative text."""

    file: Path
    caption: str

    @property
    def source(self) -> str:
        """The figure as a data URI."""
        kind = "svg+xml" if self.file.suffix == ".svg" else "png"
        return f"data:image/{kind};base64,{base64.b64encode(self.file.read_bytes()).decode()}"


@dataclass(frozen=True)
class Mark:
    """A label under an image: ``kind`` is "hit" or "miss" for a requested one, "extra" for another that is shown."""

    label: str
    kind: str
    probability: float


@dataclass(frozen=True)
class Card:
    """An image as a data URI, with a mark for each requested or shown object; ``real`` is a real image of the same labels, or empty."""

    source: str
    marks: Sequence[Mark]
    real: str = ""

    @property
    def right(self) -> bool:
        """Whether exactly the requested objects are shown."""
        return all(mark.kind == "hit" for mark in self.marks)


@dataclass(frozen=True)
class Gallery:
    """The first image of each condition of a file, for one checkpoint."""

    title: str
    cards: Sequence[Card]

    @property
    def right(self) -> int:
        """The number of images with exactly the requested objects."""
        return sum(card.right for card in self.cards)


@dataclass(frozen=True)
class Page:
    """The contents of the page from top to bottom; ``facts`` are settings and hashes by section."""

    title: str
    sentences: Sequence[str]
    tables: Sequence[Table]
    figures: Sequence[PageFigure] = ()
    galleries: Sequence[Gallery] = ()
    facts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class BesideReal:
    """The fidelity of all rows, and real images to show beside theirs.

    Attributes:
        fidelity: one for each row.
        tables: one for each row.
        real: one image of each condition, all files in order: uint8 (conditions, 3, 64, 64).
    """

    fidelity: Sequence[Fidelity]
    tables: Sequence[Table]
    real: npt.NDArray[np.uint8]


def write_evaluation_page(
    path: Path, rows: Sequence[CheckpointResult], best: int, names: Sequence[str], table: Table, sentences: Sequence[str], spec: EvaluationSpec,
    beside: BesideReal | None = None,
) -> Path:  # fmt: skip
    """Write an evaluation's page: tables of all checkpoints, and the breakdown, figures and images of the best."""
    chosen = rows[best]
    tables = [table, *(beside.tables if beside else ()), *(replace(part, title=f"{names[best]}: {part.title}") for part in breakdown_tables(chosen.answers))]
    with tempfile.TemporaryDirectory() as folder:
        figures = evaluation_figures(Path(folder), chosen, names[best], beside.fidelity[best] if beside else None)
        images = galleries([names[best]], [chosen.answers], None if beside is None else beside.real)
        page = Page("Evaluation", sentences, tables, figures, images, facts(rows, names, spec))
        return write_page(path, page)


def write_comparison_page(
    path: Path, verdict: Verdict, tables: Sequence[Table], figures: Sequence[PageFigure], warnings: Sequence[str], spec: EvaluationSpec
) -> Path:
    """Write a comparison's page: the verdict, tables, figures, and the images of each arm's first checkpoint."""
    rows = [row for arm in verdict.arms for row in arm.rows]
    names = [f"{arm.name}, {row.path.name}" for arm in verdict.arms for row in arm.rows]
    with tempfile.TemporaryDirectory() as folder:
        more = [
            PageFigure(
                save_class_bars(Path(folder) / f"classes-{number}.png", arm.rows[0].answers, arm.name).with_suffix(".svg"),
                f"Requests met by class: {arm.name} (its first checkpoint)",
            )
            for number, arm in enumerate(verdict.arms)
        ]
        more.append(_schedules(Path(folder), rows))
        shown = [*verdict.sentences(), *warnings]
        images = galleries([arm.name for arm in verdict.arms], [arm.rows[0].answers for arm in verdict.arms])
        return write_page(path, Page("Comparison", shown, tables, [*figures, *more], images, facts(rows, names, spec)))


def evaluation_figures(folder: Path, row: CheckpointResult, name: str, fidelity: Fidelity | None = None) -> list[PageFigure]:
    """Write the figures of one checkpoint as PNG and SVG."""
    found = answer_figures(folder, row.answers, name, fidelity)
    return [*found[:2], _schedules(folder, [row]), *found[2:]]


def answer_figures(folder: Path, answers: Mapping[str, FileResults], name: str, fidelity: Fidelity | None = None) -> list[PageFigure]:
    """Write the figures of a classifier's answers, and the power spectra if there are any, as PNG and SVG."""
    found = [
        PageFigure(save_class_bars(folder / "classes.png", answers, name).with_suffix(".svg"), f"Requests met by class: {name}"),
        PageFigure(save_confusion(folder / "confusion.png", answers, name).with_suffix(".svg"), f"Classes shown in images that request each class: {name}"),
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
            "device": f"{spec.compute.device.type}, {spec.compute.precision}",
            "ddpmctl": __version__,
        }
    }
    for row, name in zip(rows, names, strict=True):
        settings = {f"{section}.{key}": str(value) for section, values in asdict(row.config).items() for key, value in values.items()}
        found[name] = {"file": str(row.path), "sha256": row.sha256, "epoch": str(row.epoch), **settings}
    return found


def galleries(names: Sequence[str], rows: Sequence[Mapping[str, FileResults]], real: npt.NDArray[np.uint8] | None = None) -> list[Gallery]:
    """Return a gallery for each condition file of the first rows' answers, beside ``real`` images of the conditions (all files in order)."""
    galleries = []
    for name, answers in zip(names[:GALLERIES], rows, strict=False):
        beside = iter([""] * sum(len(of.conditions) for of in answers.values()) if real is None else map(_data_uri, real))
        for file, of in answers.items():
            shown = zip(of.images[:, 0], of.conditions, of.probabilities[:, 0], strict=True)
            galleries.append(Gallery(f"{name}: {file}", [Card(_data_uri(image), _marks(*pair), next(beside)) for image, *pair in shown]))
    return galleries


def _marks(labels: Sequence[str], outputs: npt.NDArray[np.float32]) -> list[Mark]:
    shown = {name for name, value in zip(CLASSES, outputs, strict=True) if value > THRESHOLD}
    kinds = {**{label: "hit" if label in shown else "miss" for label in labels}, **dict.fromkeys(sorted(shown - set(labels)), "extra")}
    return [Mark(label, kind, float(outputs[CLASSES.index(label)])) for label, kind in kinds.items()]


def _schedules(folder: Path, rows: Sequence[CheckpointResult]) -> PageFigure:
    found: dict[str, Schedule] = {}
    for row in rows:
        diffusion = row.config.diffusion
        found.setdefault(f"{diffusion.schedule}, T = {diffusion.timesteps}", make_schedule(diffusion))
    return PageFigure(save_schedules(folder / "schedules.png", found).with_suffix(".svg"), f"Noise schedules: {'; '.join(found)}")


def write_page(path: Path, page: Page) -> Path:
    """Write the page; all texts are escaped."""
    environment = Environment(loader=PackageLoader("ddpmctl.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = environment.get_template("page.html.j2").render(page=page, version=__version__)
    return write_text(path, text)


def _data_uri(image: npt.NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
