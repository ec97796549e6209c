"""``ddpmctl.evaluate`` and ``ddpmctl.compare``: scores of checkpoints, and which of them is better, as records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpmctl.comparison.verdict import Verdict, checkpoint_of, pooled_files, score_arms, verdict
from ddpmctl.config import Value
from ddpmctl.data.dataset import Conditions
from ddpmctl.data.source import DataSource
from ddpmctl.errors import DataError, UsageError
from ddpmctl.evaluation.evaluate import EvaluationSpec, evaluate_checkpoints
from ddpmctl.evaluation.results import CheckpointResult, Failed
from ddpmctl.evaluation.selection import Selection, confirm_best
from ddpmctl.interface.choices import checkpoint_path, evaluation_spec, known_conditions, measured_fidelity, named_conditions, reference_images
from ddpmctl.interface.tasks import Listener, checked, finish
from ddpmctl.report.json_csv import as_dict, evaluation_rows, verdict_as_dict
from ddpmctl.runs.folder import find_checkpoints
from ddpmctl.runs.named import located_all
from ddpmctl.statistics.intervals import accuracy_interval

if TYPE_CHECKING:
    from ddpmctl.evaluation.fidelity import Fidelity

Names = str | Path | Sequence[str | Path]


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """Scores of checkpoints; made by ``ddpmctl.evaluate``.

    Attributes:
        results: of each checkpoint, with the classifier's outputs and the first image of each condition.
        failed: checkpoints that could not be scored, with the reasons.
        selection: the best of several checkpoints, scored again on other noise; None for one, or without ``confirm``.
        fidelity: how close the images are to real ones, for each of ``results``; empty without ``fidelity``.
        spec: the settings of the evaluation.
        trained: how many conditions of each file occur in training.
    """

    results: tuple[CheckpointResult, ...]
    failed: tuple[Failed, ...]
    selection: Selection | None
    fidelity: tuple[Fidelity, ...]
    spec: EvaluationSpec
    trained: Mapping[str, int]

    def __repr__(self) -> str:
        """Return a line for each checkpoint: its accuracy on each condition file, with the 95 % interval."""
        lines = []
        for row in self.results:
            found = {name: accuracy_interval(answers.tally) for name, answers in row.answers.items()}
            lines.append(f"{row.path}: " + ", ".join(f"{name} {one.estimate:.4f} ({one.low:.4f} to {one.high:.4f})" for name, one in found.items()))
        return "\n".join([*lines, *(f"{failure.path}: {failure.reason}" for failure in self.failed)])

    def to_dict(self) -> dict[str, Any]:
        """Return what ``ddpmctl evaluate --json`` writes."""
        return as_dict(self.results, self.failed, self.spec, self.trained, self.selection, self.fidelity)

    def to_pandas(self) -> Any:
        """Return a data frame with a row for each checkpoint and condition file, as ``ddpmctl evaluate --csv`` writes them.

        Raises:
            UsageError: pandas is not installed.
        """
        return _frame(evaluation_rows(self.to_dict()))


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """Which runs are better, on the same conditions and the same noise; made by ``ddpmctl.compare``.

    Attributes:
        verdict: the arms, every pair's difference with its interval and adjusted p-value, and effects of crossed factors.
        spec: the settings of the evaluation.
    """

    verdict: Verdict
    spec: EvaluationSpec

    def __repr__(self) -> str:
        """Return the verdict on each pair in a sentence."""
        return "\n".join(self.sentences)

    @property
    def sentences(self) -> list[str]:
        """The verdict on each pair in words."""
        return list(self.verdict.sentences())

    def to_dict(self) -> dict[str, Any]:
        """Return what ``ddpmctl compare --json`` writes."""
        return verdict_as_dict(self.verdict, self.spec)

    def to_pandas(self) -> Any:
        """Return a data frame with a row for each difference: between pairs, on held-out conditions, and of effects.

        Raises:
            UsageError: pandas is not installed.
        """
        found = self.to_dict()
        return _frame([{"kind": kind, **{k: v for k, v in one.items() if k != "spread"}} for kind in ("pairs", "heldout", "effects") for one in found[kind]])


def evaluate(
    checkpoints: Names = (), *, repeats: int = 1, seed: int = 0, conditions: Names = (), data: str | Path | None = None, scenes: int | None = None,
    evaluator: str | Path | None = None, fidelity: bool = False, confirm: bool = True, runs_dir: str | Path = "runs", device: str = "auto",
    precision: str = "auto", assume: Mapping[str, Any] | None = None, progress: Listener = None, **sampling: Any,
) -> Evaluation:  # fmt: skip
    """Score checkpoints as ``ddpmctl evaluate`` does; results are cached.

    Args:
        checkpoints: files, runs or folders of .pth files; none for the newest run's best.
        repeats: images for each condition, each from other noise.
        seed: of the noise.
        conditions: names of the data's condition files, or JSON files; none for all of the data.
        data: folder of the data; None for the run's own or the embedded benchmark.
        scenes: size of the embedded benchmark.
        evaluator: file of the classifier; None for the default one of the data.
        fidelity: compare the images with real ones, too.
        confirm: score the best of several checkpoints again, on other noise.
        runs_dir: where runs are looked for.
        device, precision: as on the command line.
        assume: settings of files that carry none.
        progress: is called with each event.
        sampling: sampling settings that replace those of the checkpoints.

    Raises:
        UsageError, DataError: an argument cannot be used, or no checkpoint could be scored.
    """
    named, place = _paths(checkpoints), Path(runs_dir)
    files = [file for path in located_all(named, place) for file in find_checkpoints(path)] if named else [checkpoint_path(None, place)[0]]
    where: dict[str, Any] = {"conditions": conditions, "data": data, "scenes": scenes, "evaluator": evaluator, "device": device, "precision": precision}
    spec, known, source = specified(files, seed=seed, repeats=repeats, assume=assume, sampling=sampling, **where)
    spec = replace(spec, every_image=fidelity)
    against = finish(reference_images(spec, source), progress)[0] if fidelity else None  # before sampling, so that data are refused at once
    rows, failures = finish(evaluate_checkpoints(files, spec), progress)
    if not rows:
        raise DataError(f"{failures[0].path}: {failures[0].reason}")
    selection = finish(confirm_best(rows, spec), progress) if confirm and len(rows) > 1 else None
    measured = finish(measured_fidelity([row.answers for row in rows], spec, against), progress) if against else []
    return Evaluation(tuple(rows), tuple(failures), selection, tuple(measured), spec, known.trained(spec.conditions))


def compare(
    runs: Sequence[str | Path], *, repeats: int = 4, seed: int = 0, at_epoch: int | None = None, conditions: Names = (), data: str | Path | None = None,
    scenes: int | None = None, evaluator: str | Path | None = None, anyway: bool = False, runs_dir: str | Path = "runs", device: str = "auto",
    precision: str = "auto", assume: Mapping[str, Any] | None = None, progress: Listener = None, **sampling: Any,
) -> Comparison:  # fmt: skip
    """Compare runs as ``ddpmctl compare`` does: each run's last checkpoint, on the same conditions and the same noise.

    Runs that differ only in the seed are one arm. Arguments are those of ``evaluate``, and:

    Args:
        runs: two or more runs, checkpoints or folders of .pth files.
        at_epoch: compare the checkpoints of this epoch.
        anyway: compare although sampling settings differ.

    Raises:
        UsageError, DataError: an argument cannot be used, or the runs form fewer than two arms.
    """
    from ddpmctl.comparison.recorded import short_names

    paths = located_all(_paths(runs), Path(runs_dir))
    if len(paths) < 2:
        raise UsageError("runs: give two or more runs")
    names = {checkpoint_of(path, at_epoch): name for path, name in zip(paths, short_names(paths), strict=True)}
    where: dict[str, Any] = {"conditions": conditions, "data": data, "scenes": scenes, "evaluator": evaluator, "device": device, "precision": precision}
    spec, _, _ = specified(list(names), seed=seed, repeats=repeats, assume=assume, sampling=sampling, **where)
    failures: list[Failed] = []

    def listen(event: Any) -> None:
        if isinstance(event, Failed):
            failures.append(event)
        if progress is not None:
            progress(event)

    arms = finish(score_arms(names, spec, anyway=anyway), listen)
    if failures:
        raise DataError(f"{failures[0].path}: {failures[0].reason}")
    if len(arms) < 2:
        raise UsageError("runs: they form one arm, because they differ only in the seed")
    return Comparison(verdict(arms, pooled_files(spec.conditions)), spec)


def specified(
    files: Sequence[Path], *, conditions: Names = (), data: str | Path | None = None, scenes: int | None = None, evaluator: str | Path | None = None,
    seed: int = 0, repeats: int = 1, device: str = "auto", precision: str = "auto", assume: Mapping[str, Any] | None = None,
    sampling: Mapping[str, Any] | None = None,
) -> tuple[EvaluationSpec, Conditions, DataSource]:  # fmt: skip
    """Return the settings of an evaluation, the conditions that are known, and the data that they are of."""
    if type(repeats) is not int or repeats < 1:
        raise UsageError(f"repeats: must be a number of images from 1 on, not {repeats!r}")
    given: dict[str, Value] = checked(sampling or {}, "sampling")
    known, source = known_conditions(DataSource.checked(path=None if data is None else Path(data), scenes=scenes), files)
    spec = evaluation_spec(
        named_conditions(_paths(conditions), known), None if evaluator is None else Path(evaluator), source.path, known.task,
        device=checked({"device": device, "precision": precision}, "device"), sampling=given,
        assumed=checked(assume or {}, "model", "diffusion", "sampling"), seed=seed, repeats=repeats,
    )  # fmt: skip
    return spec, known, source


def _paths(names: Names) -> list[Path]:
    return [Path(names)] if isinstance(names, str | Path) else [Path(name) for name in names]


def _frame(rows: Sequence[Mapping[str, Any]]) -> Any:
    try:
        import pandas as pd
    except ImportError:
        raise UsageError("pandas is not installed; install it with: python -m pip install pandas") from None
    return pd.DataFrame(list(rows))
