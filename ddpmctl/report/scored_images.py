"""The scores of image files: table, JSON, CSV and page."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddpmctl import __version__
from ddpmctl.evaluation.classifier_file import KnownClassifier
from ddpmctl.evaluation.image_files import ScoredFolder
from ddpmctl.evaluation.results import FileResults, pooled_tally
from ddpmctl.evaluation.scores import pooled
from ddpmctl.report.json_csv import fidelity_as_dict, file_as_dict, write_table_csv
from ddpmctl.report.page import BesideReal, Page, answer_figures, galleries, write_page
from ddpmctl.report.tables import Table, breakdown_tables, images_per_condition, in_brackets
from ddpmctl.statistics.intervals import accuracy_interval

Scored = Mapping[str, ScoredFolder]
"""Scored folders by the name of their condition file, all with equally many images per condition."""


def answers_of(scored: Scored) -> dict[str, FileResults]:
    """Return the classifier's answers by condition file."""
    return {name: one.answers for name, one in scored.items()}


def images_table(scored: Scored, classifier: KnownClassifier) -> Table:
    """Return a table with a row for each condition file, and one for all of them."""
    answers = answers_of(scored)
    rows = [(name, one.score, accuracy_interval(one.tally)) for name, one in answers.items()]
    if len(rows) > 1:
        rows.append((" + ".join(answers), pooled([one.score for one in answers.values()]), accuracy_interval(pooled_tally(answers, list(answers)))))
    lines = [[name, str(score.images), f"{score.hits} of {score.labels}", in_brackets(interval), f"{score.exact_match:.4f}"] for name, score, interval in rows]
    title = f"classifier {classifier.describe()}; {images_per_condition(_repeats(scored))}; 95 % intervals in brackets"
    files = "; ".join([*(f"{name}: {one.source.folder / one.source.pattern}" for name, one in scored.items()), *filter(None, [classifier.warning])])
    return Table(title, ["conditions", "images", "objects found", "accuracy", "exact"], lines, files)


def images_as_dict(scored: Scored, classifier: KnownClassifier, trained: Mapping[str, int], beside: BesideReal | None) -> dict[str, Any]:
    """Return the scores in the form of ``--json``; "scores" has the form of a checkpoint's."""
    return {
        "evaluator": {"name": classifier.name, "sha256": classifier.sha256},
        "repeats": _repeats(scored),
        "conditions": {name: {"count": len(one.source.conditions), "in_training": trained[name]} for name, one in scored.items()},
        "images": {name: {"folder": str(one.source.folder), "pattern": one.source.pattern, "sha256": one.sha256} for name, one in scored.items()},
        "scores": {name: file_as_dict(answers) for name, answers in answers_of(scored).items()},
        **({"fidelity": fidelity_as_dict(beside.fidelity[0])} if beside else {}),
    }


def write_images_csv(path: Path, result: Mapping[str, Any]) -> None:
    """Write the scores, as ``images_as_dict`` returns them, as CSV: one row per condition file."""
    rows = [
        {
            "conditions": name, **result["images"][name],
            **{key: value for key, value in score.items() if key not in ("interval", "by", "misses")},
            "low": score["interval"][0], "high": score["interval"][1], **score["misses"], "repeats": result["repeats"],
            "evaluator": result["evaluator"]["sha256"],
        }
        for name, score in result["scores"].items()
    ]  # fmt: skip
    write_table_csv(path, Table("", list(rows[0]), [list(map(str, row.values())) for row in rows]))


def write_images_page(
    path: Path, scored: Scored, table: Table, sentences: Sequence[str], classifier: KnownClassifier, beside: BesideReal | None = None
) -> Path:
    """Write the page: tables, figures, and the first image of each condition with hits and misses."""
    answers = answers_of(scored)
    facts = {
        "Evaluation": {"classifier": f"{classifier.name}, sha256 {classifier.sha256}", "images per condition": str(_repeats(scored)), "ddpmctl": __version__},
        **{
            name: {
                "folder": str(one.source.folder),
                "files": one.source.pattern,
                "conditions": str(len(one.source.conditions)),
                "sha256 of the pixels": one.sha256,
            }
            for name, one in scored.items()
        },
    }
    tables = [table, *(beside.tables if beside else ()), *breakdown_tables(answers)]
    with tempfile.TemporaryDirectory() as folder:
        figures = answer_figures(Path(folder), answers, "images", beside.fidelity[0] if beside else None)
        shown = galleries("images", answers, None if beside is None else beside.real)
        return write_page(path, Page("Evaluation of images", sentences, tables, figures, shown, facts))


def _repeats(scored: Scored) -> int:
    return next(iter(scored.values())).answers.repeats
