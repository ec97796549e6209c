"""Results as JSON and CSV, for other programs. Names of files are exact in JSON, and escaped by ``visible`` in CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpmctl.comparison.verdict import Finding, Verdict, arm_interval
from ddpmctl.errors import visible
from ddpmctl.evaluation.misses import Misses, breakdown, recall
from ddpmctl.files import atomic_write, json_text, write_text
from ddpmctl.report.tables import Table
from ddpmctl.statistics.intervals import accuracy_interval

if TYPE_CHECKING:
    from ddpmctl.comparison.fidelity import FidelityContrast
    from ddpmctl.evaluation.evaluate import EvaluationSpec
    from ddpmctl.evaluation.fidelity import Fidelity
    from ddpmctl.evaluation.results import CheckpointResult, Failed, FileResults
    from ddpmctl.evaluation.selection import Selection


def as_dict(
    rows: Sequence[CheckpointResult], failures: Sequence[Failed], spec: EvaluationSpec, trained: Mapping[str, int], selection: Selection | None,
    fidelity: Sequence[Fidelity] = (),
) -> dict[str, Any]:  # fmt: skip
    """Return an evaluation in the form of ``--json``; with ``fidelity`` of all rows or of none."""
    return {
        "evaluator": {"name": spec.classifier.name, "sha256": spec.classifier.sha256},
        "device": spec.compute.kind,
        "precision": spec.compute.precision,
        "seed": spec.seed,
        "repeats": spec.repeats,
        "conditions": {name: {"count": len(sets), "in_training": trained.get(name)} for name, sets in spec.conditions.items()},
        "checkpoints": [
            {
                "path": str(row.path), "sha256": row.sha256, "epoch": row.epoch, "loss": row.loss, "recorded": row.recorded,
                "sampling": asdict(row.sampling),
                "scores": {name: file_as_dict(answers) for name, answers in row.answers.items()},
                **({"fidelity": fidelity_as_dict(fidelity[number])} if fidelity else {}),
            }
            for number, row in enumerate(rows)
        ],
        "selection": None if selection is None else {
            "path": str(selection.best.path), "chosen_by": selection.choosing, "confirmed": asdict(selection.confirming),
            "difference": selection.confirming.estimate - selection.choosing,
        },
        "failed": [{"path": str(failure.path), "reason": failure.reason} for failure in failures],
    }  # fmt: skip


def fidelity_as_dict(fidelity: Fidelity) -> dict[str, Any]:
    """Return the measures with their intervals and floors in the form of ``--json``."""
    return {"images": fidelity.images, **{m.key: {"samples": asdict(m.samples), "floor": asdict(m.floor)} for m in fidelity.measures}}


def _contrast_as_dict(contrast: FidelityContrast) -> dict[str, Any]:
    return {
        "first": contrast.first, "second": contrast.second,
        **{d.key: {"first": d.first, "second": d.second, "difference": asdict(d.difference), "floor": d.floor} for d in contrast.differences},
    }  # fmt: skip


def file_as_dict(answers: FileResults) -> dict[str, Any]:
    """Return the scores on one condition file in the form of ``--json``."""
    interval, flat, requested, task = accuracy_interval(answers.tally), answers.flat, answers.requested, answers.task
    misses: Misses = answers.misses
    by = {aspect: {name: s.to_dict() for name, s in parts.items()} for aspect, parts in breakdown(flat, requested, task).items()}
    by |= {
        aspect: {name: {"hits": hits, "labels": n, "accuracy": hits / n} for name, (hits, n) in counts.items()}
        for aspect, counts in recall(flat, requested, task).items()
    }
    return {**answers.score.to_dict(), "interval": [interval.low, interval.high], "by": by, "misses": asdict(misses)}


def verdict_as_dict(verdict: Verdict, spec: EvaluationSpec, fidelity: Sequence[FidelityContrast] = ()) -> dict[str, Any]:
    """Return a comparison in the form of ``--json``."""

    def finding(found: Finding) -> dict[str, Any]:
        return {
            "name": found.name, **asdict(found.contrast.interval), "p": found.contrast.p, "p_adjusted": found.p_adjusted, "told": found.significant,
            "detectable": found.contrast.spread.detectable(), "spread": asdict(found.contrast.spread),
        }  # fmt: skip

    return {
        "evaluator": {"name": spec.classifier.name, "sha256": spec.classifier.sha256},
        "seed": spec.seed,
        "repeats": spec.repeats,
        "files": list(verdict.files),
        "arms": [
            {
                "name": arm.name, "settings": dict(arm.settings), "checkpoints": [{"path": str(row.path), "sha256": row.sha256} for row in arm.rows],
                "scores": {name: asdict(arm_interval(arm, [name])) for name in arm.rows[0].answers}, "pooled": asdict(arm_interval(arm, verdict.files)),
            }
            for arm in verdict.arms
        ],
        "pairs": [finding(found) for _, _, found in verdict.pairs],
        "heldout": [finding(found) for found in verdict.heldout],
        "effects": [finding(found) for found in verdict.effects],
        "sentences": list(verdict.sentences()),
        **({"fidelity": [_contrast_as_dict(contrast) for contrast in fidelity]} if fidelity else {}),
    }  # fmt: skip


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write results as JSON."""
    write_text(path, json_text(result) + "\n")


def evaluation_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return an evaluation as one flat row for each checkpoint and condition file."""
    return [
        {
            "path": row["path"], "epoch": row["epoch"], "loss": row["loss"], "conditions": name,
            **{key: value for key, value in score.items() if key not in ("interval", "by", "misses")},
            "low": score["interval"][0], "high": score["interval"][1], **score["misses"], "recorded": row["recorded"].get(name),
            **row["sampling"], "seed": result["seed"], "repeats": result["repeats"], "precision": result["precision"],
            "evaluator": result["evaluator"]["sha256"],
        }
        for row in result["checkpoints"]
        for name, score in row["scores"].items()
    ]  # fmt: skip


def write_csv(path: Path, result: Mapping[str, Any]) -> None:
    """Write an evaluation as CSV, one row per checkpoint and condition file."""
    rows = evaluation_rows(result)
    _write_rows(path, [list(rows[0]), *(row.values() for row in rows)] if rows else [["path"]])


def write_table_csv(path: Path, table: Table) -> None:
    """Write one table as CSV."""
    _write_rows(path, [table.columns, *table.rows])


def _write_rows(path: Path, rows: Iterable[Iterable[object]]) -> None:
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([visible(cell) if isinstance(cell, str) else cell for cell in row] for row in rows)
