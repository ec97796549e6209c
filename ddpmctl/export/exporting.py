"""Export a checkpoint, and prove that the export makes the same images."""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
import tempfile
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ddpmctl.checkpoints.format import Checkpoint
from ddpmctl.device import ComputeDevice
from ddpmctl.diffusion.randomness import ImageNoise
from ddpmctl.errors import DdpmctlError, UsageError
from ddpmctl.evaluation.evaluate import pipeline_for
from ddpmctl.export.card import CARD, Card
from ddpmctl.files import need_room, require_new_folder
from ddpmctl.progress import Progress
from ddpmctl.registry import EXPORTS
from ddpmctl.sampling.pipeline import SamplingPipeline, label_tensor, sample_images
from ddpmctl.sampling.requests import ImageRequest, requests_for
from ddpmctl.task import LabelSet, Task, require_same_task

PROVEN_WITH = 8  # images
OTHER_BYTES = 16 * 2**20  # of an export beside its weights, at most: a page has programs
PARTS = (0.05, 0.5, 0.95)  # of T, at which one call is compared


class NotEqualError(DdpmctlError):
    """The export makes other images than the checkpoint."""


@dataclass(frozen=True)
class Original:
    """A model that is exported.

    Attributes:
        checkpoint: its weights and settings.
        pipeline: its sampling pipeline, with one particle, on the CPU.
        card: what is said of it.
    """

    checkpoint: Checkpoint
    pipeline: SamplingPipeline
    card: Card


class Form(Protocol):
    """A form of export.

    Attributes:
        packages: the packages that it needs, beside those that ddpmctl always has.
        file: the name of the file, where the export is one file; empty where it is a folder, which also gets a model card.
        most: how many models one export can hold.
        levels: the largest difference of an image's pixels that is allowed, in grey levels of 255.
        call: the largest difference of one call's predicted x0 that is allowed, relative to its largest value.
    """

    packages: tuple[str, ...]
    file: str
    most: int
    levels: int
    call: float

    def require(self, checkpoint: Checkpoint) -> None:
        """Raise UsageError if the form cannot express a setting of the checkpoint."""

    def write(self, folder: Path, originals: Sequence[Original]) -> None:
        """Write the files, except the model card."""

    def load(self, folder: Path) -> Sequence[Any]:
        """Load what was written, as another program does; the result for each original is the first argument of the methods below."""

    def images(self, loaded: Any, pipeline: SamplingPipeline, requests: Sequence[ImageRequest]) -> Generator[Progress, None, Tensor]:
        """Return the images that the exported files make of requests, with the settings of a pipeline: uint8 (N, 3, H, W)."""

    def predict(self, loaded: Any, pipeline: SamplingPipeline, x_t: Tensor, labels: Tensor, t: int) -> Tensor:
        """Return x0_hat (B, 3, H, W) for one call of the exported network."""


@dataclass(frozen=True)
class Exported:
    """An export that was proven equal.

    Attributes:
        out: its folder or file.
        images: how many images were compared.
        levels: the largest difference of their pixels, in grey levels of 255.
        call: the largest difference of x0_hat, relative to its largest value, of one call at each of a few times.
    """

    out: Path
    images: int
    levels: int
    call: float


def export(models: Sequence[tuple[Checkpoint, Card]], name: str, out: Path) -> Generator[Progress, None, Exported]:
    """Yield progress and return what was exported. If writing fails, or the images differ, nothing is left.

    Args:
        models: what is exported, and what is said of each: one model, or as many as fit in the form.
        name: a registered form.
        out: the folder or file to make; a folder may exist if it is empty.

    Raises:
        UsageError: the folder is in use or cannot be written to, or the form cannot hold so many models.
        DataError: the models are of different tasks.
        NotEqualError: the export makes other images.
    """
    checkpoints = [checkpoint for checkpoint, _ in models]
    form = usable_form(name, checkpoints)
    if not form.file:
        require_new_folder(out, "--out")
    compute = ComputeDevice(torch.device("cpu"), "fp32")
    originals = [Original(checkpoint, pipeline_for(checkpoint, {"particles": 1}, compute), card) for checkpoint, card in models]
    need_room(out.parent, OTHER_BYTES + 2 * sum(value.nbytes for one in checkpoints for value in one.weights.values()), "for the export")
    made = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    try:
        form.write(made, originals)
        levels, call = yield from _proven(form, name, form.load(made), originals)
        if form.file:
            os.replace(made / form.file, out)
        else:
            (checkpoint, card), *_ = models
            (made / CARD).write_text(card.text(checkpoint, name, levels), encoding="utf-8")
            made.chmod(0o755)  # temporary folders are for their owner alone
            if out.exists():
                out.rmdir()  # it is empty; Windows replaces no folder
            made.replace(out)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return Exported(out, PROVEN_WITH * len(models), levels, call)


def usable_form(name: str, checkpoints: Sequence[Checkpoint]) -> Form:
    """Return a form of export in which checkpoints can be written.

    Raises:
        UsageError: there is no form of this name, a package is missing, or the form cannot express a setting, or hold so many models.
        DataError: the checkpoints are of different tasks.
    """
    form: Form = EXPORTS.get(name)()
    if missing := [package for package in form.packages if importlib.util.find_spec(package) is None]:
        raise UsageError(f"--to {name}: needs {', '.join(missing)}; install with: python -m pip install 'ddpmctl[export]'")
    if len(checkpoints) > form.most:
        raise UsageError(f"--beside: --to {name} exports one model; only --to page can show a second one")
    first = checkpoints[0]
    for checkpoint in checkpoints:
        require_same_task(str(first.path), first.task, str(checkpoint.path), checkpoint.task)
        form.require(checkpoint)
    return form


def _proven(form: Form, name: str, loaded: Sequence[Any], originals: Sequence[Original]) -> Generator[Progress, None, tuple[int, float]]:
    """Return the largest differences of all models; NotEqualError if one is over the form's limit."""
    found = []
    for one, original in zip(loaded, originals, strict=True):
        levels, call = yield from _differences(form, one, original.pipeline)
        if levels > form.levels or not call <= form.call:
            what = f"its images differ from those of {original.checkpoint.path} by up to {levels} of 255 levels, and one call of its network by {call:.1g}"
            raise NotEqualError(f"--to {name}: {what}; nothing was written")
        found.append((levels, call))
    return max(levels for levels, _ in found), max(call for _, call in found)


def _differences(form: Form, loaded: Any, pipeline: SamplingPipeline) -> Generator[Progress, None, tuple[int, float]]:
    """Sample from the checkpoint and from the export, on the same noise; return the largest differences of the images, in levels, and of one call."""
    requests = requests_for("export", _some_sets(pipeline.task), seed=0)
    before = yield from sample_images(pipeline, requests)
    after = yield from form.images(loaded, pipeline, requests)
    if after.shape != before.shape:
        raise NotEqualError(f"its images have the shape {tuple(after.shape)}, not {tuple(before.shape)}")
    return int((before.int() - after.int()).abs().max()), max(_call_difference(form, loaded, pipeline, requests, part) for part in PARTS)


def _call_difference(form: Form, loaded: Any, pipeline: SamplingPipeline, requests: Sequence[ImageRequest], part: float) -> float:
    """Return the largest difference of x0_hat at t = ``part`` T, relative to its largest value."""
    t = max(1, round(part * pipeline.diffusion.schedule.timesteps))
    x_t, labels = ImageNoise([one.key for one in requests], pipeline.task.image_shape, torch.device("cpu"))(), label_tensor(requests, pipeline.task)
    with torch.inference_mode():
        expected = pipeline.diffusion.denoiser(pipeline.net, labels)(x_t.contiguous(memory_format=torch.channels_last), t).x0
        found = form.predict(loaded, pipeline, x_t, labels, t)
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1))


def _some_sets(task: Task) -> list[LabelSet]:
    """Return label sets of one, two and three labels, among them the first and the last label."""
    if not task.classes:
        return [()] * PROVEN_WITH
    names = itertools.cycle(task.classes)
    sets = [tuple(dict.fromkeys(itertools.islice(names, 1 + index % 3))) for index in range(PROVEN_WITH - 1)]
    return [*sets, task.classes[-1:]]
