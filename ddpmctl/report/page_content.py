"""The contents of the HTML pages of an evaluation and of a comparison."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from ddpmctl import __version__
from ddpmctl.comparison.verdict import Verdict
from ddpmctl.diffusion.schedules import Schedule, make_schedule
from ddpmctl.evaluation.evaluate import EvaluationSpec
from ddpmctl.evaluation.results import CheckpointResult, FileResults
from ddpmctl.report.evaluation_figures import save_class_bars, save_confusion, save_schedules
from ddpmctl.report.page import Gallery, Page, PageFigure, galleries, write_page
from ddpmctl.report.tables import Table, breakdown_tables

GALLERIES = 6  # checkpoints with images: about 300 KB each per condition file


def write_evaluation_page(
    path: Path, rows: Sequence[CheckpointResult], best: int, names: Sequence[str], table: Table, sentences: Sequence[str], spec: EvaluationSpec
) -> Path:
    """Write an evaluation's page: a table of all checkpoints, and the breakdown, figures and images of the best."""
    chosen = rows[best]
    tables = [table, *(replace(part, title=f"{names[best]}: {part.title}") for part in breakdown_tables(chosen.answers))]
    with tempfile.TemporaryDirectory() as folder:
        figures = evaluation_figures(Path(folder), chosen, names[best])
        page = Page("Evaluation", sentences, tables, figures, _galleries([names[best]], [chosen]), facts(rows, names, spec))
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
        images = _galleries([arm.name for arm in verdict.arms], [arm.rows[0] for arm in verdict.arms])
        return write_page(path, Page("Comparison", shown, tables, [*figures, *more], images, facts(rows, names, spec)))


def evaluation_figures(folder: Path, row: CheckpointResult, name: str) -> list[PageFigure]:
    """Write the figures of one checkpoint as PNG and SVG."""
    return [
        PageFigure(save_class_bars(folder / "classes.png", row.answers, name).with_suffix(".svg"), f"Requests met by class: {name}"),
        PageFigure(save_confusion(folder / "confusion.png", row.answers, name).with_suffix(".svg"), f"Classes shown in images that request each class: {name}"),
        _schedules(folder, [row]),
    ]


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


def _galleries(names: Sequence[str], rows: Sequence[CheckpointResult]) -> list[Gallery]:
    return [gallery for name, row in zip(names[:GALLERIES], rows, strict=False) for gallery in galleries(name, row.answers)]


def _schedules(folder: Path, rows: Sequence[CheckpointResult]) -> PageFigure:
    found: dict[str, Schedule] = {}
    for row in rows:
        diffusion = row.config.diffusion
        found.setdefault(f"{diffusion.schedule}, T = {diffusion.timesteps}", make_schedule(diffusion))
    return PageFigure(save_schedules(folder / "schedules.png", found).with_suffix(".svg"), f"Noise schedules: {'; '.join(found)}")
