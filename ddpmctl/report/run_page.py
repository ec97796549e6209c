"""The page of one run."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from ddpmctl.report.page import Page, PageFigure, write_page
from ddpmctl.report.run_figures import last_samples, save_curves_for_page
from ddpmctl.report.tables import Table
from ddpmctl.runs.record import Record


def write_run_page(path: Path, record: Record, sentences: Sequence[str], columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Path:
    """Write a run's page: its state, all scores, curves, the last samples, and every setting."""
    name = record.run.folder.resolve().name
    settings = {section: {key: str(value) for key, value in values.items()} for section, values in record.config.to_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        curves = save_curves_for_page(Path(folder) / "curves.png", record).with_suffix(".svg")
        figures = [PageFigure(curves, f"Accuracy and training loss of {name}"), *(PageFigure(file, f"{name}: {title}") for title, file in last_samples(record))]
        tables = [Table("Scores", columns, rows)] if rows else []
        return write_page(path, Page(f"Run {name}", sentences, tables, figures, (), settings))
