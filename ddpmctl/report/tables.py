"""Results as tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from ddpmctl.comparison.recorded import Comparison, Point
from ddpmctl.comparison.verdict import HELDOUT, Verdict, arm_interval
from ddpmctl.evaluation.misses import account_for, breakdown, recall
from ddpmctl.evaluation.scores import THRESHOLD
from ddpmctl.sampling.requests import describe_sampling
from ddpmctl.statistics.intervals import Interval, accuracy_interval

if TYPE_CHECKING:
    from ddpmctl.comparison.fidelity import FidelityContrast
    from ddpmctl.evaluation.evaluate import EvaluationSpec
    from ddpmctl.evaluation.fidelity import Fidelity
    from ddpmctl.evaluation.results import CheckpointResult, FileResults
    from ddpmctl.evaluation.selection import Selection

MISS_WORDS = {
    "swapped": "colour exchanged with another requested object",
    "wrong_shape": "right colour, wrong shape",
    "wrong_colour": "right shape, wrong colour",
    "absent": "absent",
    "extra": "extra: shown, but not requested",
}


# Two questions to the classifier, whose answers can differ for the same images.
FOUND = "found: the object is among the k highest outputs of the classifier, where k objects were requested"
SHOWN = f"shown: the probability that the classifier gives the object is above {THRESHOLD}"
PARTS = "accuracy: share of the requested objects that are found; exact: share of the images that show exactly the requested objects"


@dataclass(frozen=True)
class Table:
    """A table of texts; the first column names the row.

    Attributes:
        groups: a name for each column, or none; neighbours of the same name stand below it.
        hover: what a page shows when the mouse is over a row's name, such as the whole path; or none.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    groups: Sequence[str] = ()
    hover: Sequence[str] = ()

    @property
    def labels(self) -> list[str]:
        """What each column holds, with its group."""
        return [" ".join(filter(None, pair)) for pair in zip(self.groups or [""] * len(self.columns), self.columns, strict=True)]


def in_brackets(interval: Interval) -> str:
    """Return an estimate with its interval, such as ``0.9410 (0.905-0.966)``."""
    return f"{interval.estimate:.4f} ({interval.low:.3f}-{interval.high:.3f})"


def verdict_tables(verdict: Verdict, title: str) -> Iterator[Table]:
    """Yield the arms' accuracies, the differences of all pairs, and, if any, those on held-out conditions and the effects of two crossed settings."""
    pooled, files = " + ".join(verdict.files), list(verdict.arms[0].rows[0].answers)
    rows = [
        [arm.name, str(len(arm.rows)), *(in_brackets(arm_interval(arm, [name])) for name in files), in_brackets(arm_interval(arm, verdict.files))]
        for arm in verdict.arms
    ]
    note = "accuracy with 95 % intervals over conditions; seeds: training seeds of the arm"
    yield Table(title, ["arm", "seeds", *files, pooled], rows, note, hover=[", ".join(str(row.path) for row in arm.rows) for arm in verdict.arms])
    differences = [finding for _, _, finding in verdict.pairs]
    families = (("differences", pooled, differences), ("differences", HELDOUT, verdict.heldout), ("effects of the two settings", pooled, verdict.effects))
    for name, conditions, family in families:
        if family:
            lines = [[f.name, *in_points(f.contrast.interval), f"{f.contrast.p:.4f}", f"{f.p_adjusted:.4f}"] for f in family]
            yield Table(f"{name}, points of accuracy on {conditions}", ["", "points", "from", "to", "p", "p (Holm)"], lines)


def settings_table(verdict: Verdict) -> Table | None:
    """Return the settings that differ between the arms; None if none are known."""
    names = dict.fromkeys(name for arm in verdict.arms for name in arm.settings)
    rows = [[name, *(str(arm.settings.get(name, "unknown")) for arm in verdict.arms)] for name in names]
    return Table("settings that differ", ["setting", *(arm.name for arm in verdict.arms)], rows) if rows else None


def in_points(interval: Interval) -> list[str]:
    """Return an estimate and the limits of its interval as texts, in percentage points."""
    return [f"{100 * value:+.1f}" for value in (interval.estimate, interval.low, interval.high)]


def images_per_condition(repeats: int) -> str:
    """Return the number of images as text."""
    return f"{repeats} image{'s' if repeats > 1 else ''} per condition"


def evaluation_table(rows: Sequence[CheckpointResult], names: Sequence[str], spec: EvaluationSpec, best: int) -> Table:
    """Return a table with one row for each checkpoint; the note names the ``best`` one and how the images were made."""
    files = list(spec.conditions)
    lines = [
        [name, *(text for file in files for text in (in_brackets(accuracy_interval(row.answers[file].tally)), f"{row.scores[file].exact_match:.3f}"))]
        for name, row in zip(names, rows, strict=True)
    ]
    used = "; ".join(sorted({describe_sampling(row.sampling) for row in rows}))
    kept = sum(row.kept for row in rows)
    marked = "; ".join(filter(None, (f"best by pooled accuracy: {names[best]}; {used}; {kept} of {len(rows)} from cached results", spec.classifier.warning)))
    compute = f"{spec.compute.kind}, {spec.compute.precision}"
    title = f"classifier {spec.classifier.describe()}; {images_per_condition(spec.repeats)}; {compute}; 95 % intervals in brackets"
    columns, groups = ["checkpoint", *["accuracy", "exact"] * len(files)], ["", *(file for file in files for _ in range(2))]
    return Table(title, columns, lines, marked, groups, [str(row.path) for row in rows])


def training_table(rows: Sequence[CheckpointResult], names: Sequence[str], spec: EvaluationSpec) -> Table:
    """Return what training recorded for each checkpoint, in the file or in its name: epoch, loss, accuracies."""
    lines = [
        [
            name, "-" if row.epoch is None else str(row.epoch), "-" if row.loss is None else f"{row.loss:.6f}",
            *(f"{row.recorded[file]:.4f}" if file in row.recorded else "-" for file in spec.conditions),
        ]
        for name, row in zip(names, rows, strict=True)
    ]  # fmt: skip
    return Table("recorded in training", ["checkpoint", "epoch", "loss", *spec.conditions], lines, hover=[str(row.path) for row in rows])


def fidelity_table(name: str, fidelity: Fidelity, source: str) -> Table:
    """Return the measures of one checkpoint beside those of real images."""

    def cell(interval: Interval) -> str:
        return f"{interval.estimate:.3f} ({interval.low:.3f} to {interval.high:.3f})"

    lines = [[measure.name, cell(measure.samples), cell(measure.floor), measure.best] for measure in fidelity.measures]
    title = f"{name}: fidelity of {fidelity.images} images"
    return Table(title, ["measure", "samples", "real images (floor)", "best value"], lines, f"real images: {source}; 95 % intervals over conditions")


def fidelity_contrast_table(contrast: FidelityContrast) -> Table:
    """Return the fidelity of two arms and their differences."""
    lines = [
        [d.name, f"{d.first:.3f}", f"{d.second:.3f}", f"{d.difference.estimate:+.3f} ({d.difference.low:+.3f} to {d.difference.high:+.3f})", f"{d.floor:.3f}"]
        for d in contrast.differences
    ]
    columns = ["measure", contrast.first, contrast.second, "difference", "real images (floor)"]
    return Table(f"fidelity: {contrast.first} - {contrast.second}", columns, lines, "95 % intervals over conditions and training seeds; not adjusted")


def selection_sentence(selection: Selection, name: str) -> str:
    """Return both scores of the chosen checkpoint, which is called ``name``, as text."""
    found = selection.confirming
    return (
        f"{name} was selected with a pooled accuracy of {selection.choosing:.4f}; on new noise it has "
        f"{found.estimate:.4f} ({found.low:.3f} to {found.high:.3f}), {100 * (found.estimate - selection.choosing):+.1f} points: report this one"
    )


def breakdown_tables(answers: Mapping[str, FileResults]) -> Iterator[Table]:
    """Yield tables over all condition files: by number of objects, shared colours, class, colour and shape, and the misses; each says what it counts."""
    flat, requested = np.concatenate([a.flat for a in answers.values()]), [labels for a in answers.values() for labels in a.requested]
    task = next(iter(answers.values())).task
    for aspect, parts in breakdown(flat, requested, task).items():
        lines = [[name, str(s.images), f"{s.accuracy:.4f}", f"{s.exact_match:.4f}"] for name, s in parts.items()]
        yield Table(f"by {aspect}", [aspect, "images", "accuracy", "exact"], lines, PARTS)
    for aspect, counts in recall(flat, requested, task).items():
        lines = [[name, str(n), f"{hits / n:.4f}"] for name, (hits, n) in counts.items()]
        yield Table(f"by {aspect}", [aspect, "requested", "found"], lines, FOUND)
    account = account_for(flat, requested, task)
    labels = sum(map(len, requested))
    kinds = {name: count for name, count in asdict(account).items() if task.aspects or name in ("absent", "extra")}
    lines = [[MISS_WORDS[name], str(count), f"{count / labels:.4f}" if labels else "-"] for name, count in kinds.items()]
    title = f"the {account.missed} requested objects that are not shown, and extra objects"
    yield Table(title, ["what is shown instead", "objects", "of those requested"], lines, SHOWN)


def recorded_table(comparison: Comparison, file: str) -> Table:
    """Return the recorded accuracies of all runs on one condition file."""
    at_epoch = [f"at epoch {comparison.epoch}"] if comparison.epoch is not None else []
    columns = ["run", *at_epoch, "last", "best", f"mean of last {comparison.last}", "sd"]
    rows = []
    for arm in comparison.arms:
        mean, deviation = arm.last_mean(file, comparison.last)
        cells = [arm.name]
        for point, expected in ((arm.at(comparison.epoch), comparison.epoch), (arm.points[-1], None), (arm.best(file), None)):
            cells += [] if point is None else [_accuracy(point, file, expected)]
        rows.append([*cells, _number(mean, 4), _number(deviation, 4)])
    return Table(f"accuracy on {file}", columns, rows)


def loss_table(comparison: Comparison) -> Table | None:
    """Return the recorded training losses at the epoch of the comparison, or the last ones; None if none is recorded."""
    points = [arm.at(comparison.epoch) or arm.points[-1] for arm in comparison.arms]
    if all(math.isnan(point.loss) for point in points):
        return None
    rows = [[arm.name, str(point.epoch), _number(point.loss, 6)] for arm, point in zip(comparison.arms, points, strict=True)]
    return Table("training loss", ["run", "epoch", "loss"], rows)


def _accuracy(point: Point, file: str, expected: int | None) -> str:
    """Return an accuracy, with its epoch where that is not the one in the heading."""
    where = "" if point.epoch == expected else f" ({point.epoch})"
    return f"{_number(point.accuracy[file], 4)}{where}"


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"
