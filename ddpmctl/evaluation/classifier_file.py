"""The file of the classifier that scores the images, identified before torch is loaded."""

from __future__ import annotations

import contextlib
import functools
import importlib.resources
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpmctl.checkpoints.untrusted import TensorFile, checked, open_tensors
from ddpmctl.data.cache import cache_folder
from ddpmctl.errors import DataError, UsageError, show
from ddpmctl.iclevr import ICLEVR
from ddpmctl.task import Task, require_same_task

if TYPE_CHECKING:
    from ddpmctl.evaluation.classifiers import Classifier

BUILT_IN = "built-in"
LAB_FILE = "checkpoint.pth"  # the file name of the lab's classifier
OWN_FILE = "evaluator.pt"  # of one that was trained on the data of a folder
ENOUGH = 0.95  # of the labels of real images that a classifier must find


class NoClassifierError(UsageError):
    """There is no classifier for a task; the message says how to get one."""


@dataclass(frozen=True)
class KnownClassifier:
    """A classifier's identity.

    Attributes:
        name: "built-in" or the file's path.
        sha256: hash of the weight file.
        task: what it classifies.
        warning: a sentence on how little its scores are worth; empty where it finds enough of the labels of real images.
    """

    name: str
    sha256: str
    _: KW_ONLY
    task: Task = ICLEVR
    warning: str = ""

    def describe(self) -> str:
        """Return the name with the beginning of the hash."""
        return f"{self.name} ({self.sha256[:12]})"


@dataclass(frozen=True)
class ClassifierFile(KnownClassifier):
    """A classifier that is not loaded yet; ``path`` is None for the built-in one."""

    path: Path | None

    def load(self, device: str) -> Classifier:
        """Return the classifier on a device; a second call returns the same one.

        Raises:
            DataError: the file is not a classifier.
        """
        return _loaded(self, device)


@functools.lru_cache(maxsize=1)
def _loaded(file: ClassifierFile, device: str) -> Classifier:
    from ddpmctl.evaluation.classifiers import load_classifier

    return load_classifier(file.path, device=device)


def find_classifier(path: Path | None = None, root: Path | None = None, task: Task | None = None) -> ClassifierFile:
    """Return the file of the classifier that ``load_classifier`` would load. Arguments and errors are those of ``open_classifier``."""
    with open_classifier(path, root, task) as file:
        own, warning = about_classifier(file)
        return ClassifierFile(file.name, file.sha256, None if file.name == BUILT_IN else Path(file.name), task=own, warning=warning)


@contextmanager
def open_classifier(path: Path | None = None, root: Path | None = None, task: Task | None = None) -> Iterator[TensorFile]:
    """Open and check a classifier: ``path``; else ``checkpoint.pth`` or ``evaluator.pt`` in the data folder ``root``; else, for i-CLEVR's task, the
    built-in one, and for another the one that was trained for it and is kept in the cache folder.

    ``task`` None is i-CLEVR's, and is not compared with the classifier's.

    Raises:
        UsageError: there is no such file.
        NoClassifierError: there is no classifier for the task.
        DataError: the file is damaged, or is of another task.
    """
    path = path or _found(root, task or ICLEVR)
    with contextlib.nullcontext(_built_in()) if path is None else open_tensors(path) as file:
        if task is not None:
            require_same_task(f"the classifier {file.name}", about_classifier(file)[0], "the data", task)
        yield file


def about_classifier(file: TensorFile) -> tuple[Task, str]:
    """Return the task of an open classifier, i-CLEVR's where it names none, and its warning.

    Raises:
        DataError: they are damaged.
    """
    content: Any = file.outline if isinstance(file.outline, dict) else {}
    try:
        task = Task.from_dict(content["task"]) if "task" in content else ICLEVR
        known = content.get("known")
        heldout = known.get("heldout") if isinstance(known, dict) else None
        if heldout is None:
            return task, ""
        accuracy, low, high = (float(heldout[name]) for name in ("accuracy", "low", "high"))
    except (ValueError, TypeError, LookupError) as error:
        raise DataError(f"{file.name}: its task or its figures are invalid ({show(str(error))})") from None
    if accuracy >= ENOUGH:
        return task, ""
    return (
        task,
        f"the classifier finds only {accuracy:.1%} of the labels of real images (95 % interval {low:.1%} to {high:.1%}), so its scores are worth little",
    )


def stored_classifier(task: Task) -> Path:
    """Return where the classifier of a task is kept if its data folder cannot hold it."""
    return cache_folder() / "evaluators" / f"{task.key}.pt"


def _found(root: Path | None, task: Task) -> Path | None:
    """Return the classifier's file; None for the built-in one."""
    lab = task.key == ICLEVR.key
    places = [] if root is None else [root / name for name in ((LAB_FILE, OWN_FILE) if lab else (OWN_FILE,))]
    if not lab:
        places.append(stored_classifier(task))
    if found := next((place for place in places if place.is_file()), None):
        return found
    if lab:
        return None
    size = f" --size {task.size}" if task.size != ICLEVR.size else ""
    data = f" --data {root}" if root is not None else ""
    raise NoClassifierError(f"there is no classifier for these images; to train one: ddpmctl evaluator train{data}{size}")


def _built_in() -> TensorFile:
    data = (importlib.resources.files("ddpmctl.evaluation") / "assets" / "compact.pt").read_bytes()
    return checked(io.BytesIO(data), BUILT_IN)
