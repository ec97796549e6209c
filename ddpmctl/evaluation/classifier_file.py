"""The file of the classifier that scores the images, identified before torch is loaded."""

from __future__ import annotations

import contextlib
import functools
import importlib.resources
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ddpmctl.checkpoints.untrusted import TensorFile, checked, open_tensors
from ddpmctl.iclevr import ICLEVR
from ddpmctl.task import Task

if TYPE_CHECKING:
    from ddpmctl.evaluation.classifiers import Classifier

BUILT_IN = "built-in"
LAB_FILE = "checkpoint.pth"  # the file name of the lab's classifier


@dataclass(frozen=True)
class KnownClassifier:
    """A classifier's identity.

    Attributes:
        name: "built-in" or the file's path.
        sha256: hash of the weight file.
    """

    name: str
    sha256: str

    @property
    def task(self) -> Task:
        """What it classifies."""
        return ICLEVR

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
            DataError: the file is not a classifier of the 24 classes.
        """
        return _loaded(self, device)


@functools.lru_cache(maxsize=1)
def _loaded(file: ClassifierFile, device: str) -> Classifier:
    from ddpmctl.evaluation.classifiers import load_classifier

    return load_classifier(file.path, device=device)


def find_classifier(path: Path | None = None, root: Path | None = None) -> ClassifierFile:
    """Return the file of the classifier that ``load_classifier`` would load.

    Raises:
        UsageError: there is no such file.
        DataError: the file is damaged.
    """
    with open_classifier(path, root) as file:
        return ClassifierFile(file.name, file.sha256, None if file.name == BUILT_IN else Path(file.name))


@contextmanager
def open_classifier(path: Path | None = None, root: Path | None = None) -> Iterator[TensorFile]:
    """Open and check ``path``, else ``checkpoint.pth`` in the data folder ``root``, else the built-in classifier. Errors as for ``find_classifier``."""
    if path is None and root is not None and (root / LAB_FILE).is_file():
        path = root / LAB_FILE
    with contextlib.nullcontext(_built_in()) if path is None else open_tensors(path) as file:
        yield file


def _built_in() -> TensorFile:
    data = (importlib.resources.files("ddpmctl.evaluation") / "assets" / "compact.pt").read_bytes()
    return checked(io.BytesIO(data), BUILT_IN)
