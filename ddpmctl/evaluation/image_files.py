"""Score image files that any program made: one or several for each condition, named by the condition's place in its file."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ddpmctl.data.images import decode_image, each_image, find_in
from ddpmctl.errors import DataError, UsageError
from ddpmctl.evaluation.classifiers import Classifier
from ddpmctl.evaluation.results import FileResults
from ddpmctl.progress import Progress
from ddpmctl.task import LabelSet

ONE, SEVERAL = "{index}.png", "{index}-{copy}.png"  # the lab's names, and ours for several images a condition
GRID = "grid.png"  # may lie beside the images
KINDS = (".png", ".jpg", ".jpeg")
CHUNK = 256  # images between two progress events


@dataclass(frozen=True)
class ImageFolder:
    """A folder with images of the conditions of one file; ``pattern`` makes file names, see ``file_name``."""

    folder: Path
    pattern: str
    conditions: Sequence[LabelSet]

    def files(self) -> list[list[Path]]:
        """Return the files of each condition: as many as condition 0 has.

        Raises:
            UsageError: there is no such folder.
            DataError: an image is missing, must not be opened, or is no condition's; names the first.
        """
        if not self.folder.is_dir():
            raise UsageError(f"--images: there is no folder {self.folder}")
        repeats = 1
        if "{copy}" in self.pattern:
            repeats = next(copy for copy in itertools.count() if not (self.folder / file_name(self.pattern, 0, copy)).exists()) or 1
        names = [[file_name(self.pattern, index, copy) for copy in range(repeats)] for index in range(len(self.conditions))]
        flat = list(itertools.chain(*names))
        needed = f"{len(names)} conditions with {repeats} image{'s' if repeats > 1 else ''} each need {flat[0]} to {flat[-1]}; give --pattern for other names"
        _, problems = find_in(self.folder, self.folder, flat)
        if problems:
            raise DataError(f"{problems[0].path}: {problems[0].what}{_others(len(problems))}; {needed}")
        wanted = {*flat, GRID}
        if extra := sorted(path for path in self.folder.iterdir() if path.suffix.lower() in KINDS and path.name not in wanted):
            raise DataError(f"{extra[0]}: is not the image of a condition{_others(len(extra))}; {needed}")
        return [[self.folder / name for name in group] for group in names]


@dataclass(frozen=True)
class ScoredFolder:
    """A folder's results; ``sha256`` is a hash of the pixels."""

    source: ImageFolder
    answers: FileResults
    sha256: str


def check_pattern(pattern: str) -> None:
    """Check that a pattern gives names of images in a folder.

    Raises:
        UsageError: it does not.
    """
    held = sorted(re.findall(r"\{.*?\}", pattern))
    wrong = re.search(r"[/\\]|\}\d*\{", pattern)  # another folder; two numbers that run together
    if held not in (["{index}"], ["{copy}", "{index}"]) or wrong or not pattern.lower().endswith(KINDS):
        raise UsageError(f"--pattern {pattern!r}: must name a .png or .jpg file by {{index}}, or by {{index}} and {{copy}}, such as {SEVERAL!r}")


def file_name(pattern: str, index: int, copy: int = 0) -> str:
    """Return the name of an image of the condition at place ``index`` in its file; both numbers count from 0."""
    return pattern.replace("{index}", str(index)).replace("{copy}", str(copy))


def score_folder(source: ImageFolder, classifier: Classifier) -> Generator[Progress, None, ScoredFolder]:
    """Yield progress and return what the classifier finds in the images.

    They are converted to RGB as training images are, and not resized: the classifier sees the pixels as they are.

    Raises:
        UsageError, DataError: see ``ImageFolder.files``; or an image cannot be decoded, or is not of the classifier's size.
    """
    files = source.files()
    paths = list(itertools.chain(*files))
    images: list[np.ndarray] = []
    probabilities = []
    for part in (paths[at : at + CHUNK] for at in range(0, len(paths), CHUNK)):
        yield Progress("scoring", len(images), len(paths))
        for made in each_image(part, lambda path: decode_image(path, size=classifier.task.size, resize=False)):
            if isinstance(made, DataError):
                raise made
            images.append(made)
        probabilities.append(classifier(torch.from_numpy(np.stack(images[-len(part) :])).float() / 127.5 - 1))
    yield Progress("scoring", len(paths), len(paths))
    pixels, shape, task = np.stack(images), (len(files), len(files[0])), classifier.task
    outputs = torch.cat(probabilities).numpy().reshape(*shape, task.columns)
    answers = FileResults(tuple(source.conditions), outputs, pixels.reshape(*shape, *pixels.shape[1:]), task)
    return ScoredFolder(source, answers, hashlib.sha256(pixels.data).hexdigest())


def _others(count: int) -> str:
    return f" (and {count - 1} more)" if count > 1 else ""
