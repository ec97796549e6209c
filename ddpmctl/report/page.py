"""Results as one self-contained HTML file: sortable tables, figures, images with hits and misses, settings and hashes."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from ddpmctl import __version__
from ddpmctl.evaluation.results import FileResults
from ddpmctl.evaluation.scores import THRESHOLD
from ddpmctl.files import write_text
from ddpmctl.labels import CLASSES
from ddpmctl.report.tables import Table


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
    """A label under an image: whether it is requested, whether it is shown, and its probability."""

    label: str
    asked: bool
    shown: bool
    probability: float

    @property
    def sign(self) -> str:
        """Hit, miss or extra, as a symbol."""
        return "✓" if self.asked and self.shown else "✗" if self.asked else "+"

    @property
    def kind(self) -> str:
        """Hit, miss or extra, as a word."""
        return "hit" if self.asked and self.shown else "miss" if self.asked else "extra"


@dataclass(frozen=True)
class Card:
    """An image as a data URI, with a mark for each requested or shown object."""

    source: str
    marks: Sequence[Mark]

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


def write_page(path: Path, page: Page) -> Path:
    """Write the page; all texts are escaped."""
    environment = Environment(loader=PackageLoader("ddpmctl.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = environment.get_template("page.html.j2").render(page=page, version=__version__)
    return write_text(path, text)


def galleries(name: str, answers: Mapping[str, FileResults]) -> Iterator[Gallery]:
    """Yield a gallery for each condition file of a checkpoint."""
    for file, found in answers.items():
        cards = [
            Card(_data_uri(image), _marks(labels, outputs))
            for labels, image, outputs in zip(found.conditions, found.images, found.probabilities[:, 0], strict=True)
        ]
        yield Gallery(f"{name}: {file}", cards)


def _marks(labels: Sequence[str], outputs: npt.NDArray[np.float32]) -> list[Mark]:
    shown = {name for name, value in zip(CLASSES, outputs, strict=True) if value > THRESHOLD}
    listed = [*labels, *sorted(shown - set(labels))]
    return [Mark(label, label in labels, label in shown, float(outputs[CLASSES.index(label)])) for label in listed]


def _data_uri(image: npt.NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
