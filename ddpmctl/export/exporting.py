"""Export a checkpoint, and prove that the export makes the same images."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ddpmctl.checkpoints.format import Checkpoint
from ddpmctl.device import ComputeDevice
from ddpmctl.diffusion.randomness import ImageNoise
from ddpmctl.errors import UsageError
from ddpmctl.evaluation.evaluate import pipeline_for
from ddpmctl.export.card import CARD, Card
from ddpmctl.files import need_room, require_new_folder
from ddpmctl.progress import Progress
from ddpmctl.registry import EXPORTS
from ddpmctl.sampling.pipeline import SamplingPipeline, label_tensor, sample_images
from ddpmctl.sampling.requests import ImageRequest, requests_for
from ddpmctl.task import LabelSet, Task

PROVEN_WITH = 8  # images
PARTS = (0.05, 0.5, 0.95)  # of T, at which one call is compared


class NotEqualError(UsageError):
    """The export makes other images than the checkpoint."""

    exit_code = 1


class Form(Protocol):
    """A form of export.

    Attributes:
        levels: the largest difference of an image's pixels that is allowed, in grey levels of 255.
        call: the largest difference of one call's predicted x0 that is allowed, relative to its largest value.
    """

    levels: int
    call: float

    def require(self, checkpoint: Checkpoint) -> None:
        """Raise UsageError if the form cannot be written: a package is missing, or it has no place for a setting."""

    def write(self, folder: Path, checkpoint: Checkpoint) -> None:
        """Write the files, except the model card."""

    def images(self, folder: Path, pipeline: SamplingPipeline, requests: Sequence[ImageRequest]) -> Generator[Progress, None, Tensor]:
        """Return the images that the exported files make of requests, with the settings of a pipeline: uint8 (N, 3, H, W)."""

    def predict(self, folder: Path, pipeline: SamplingPipeline, x_t: Tensor, labels: Tensor, t: int) -> Tensor:
        """Return x0_hat (B, 3, H, W) for one call of the exported network."""


@dataclass(frozen=True)
class Exported:
    """An export that was proven equal.

    Attributes:
        folder: its folder.
        images: how many images were compared.
        levels: the largest difference of their pixels, in grey levels of 255.
        call: the largest difference of x0_hat, relative to its largest value, of one call at each of a few times.
    """

    folder: Path
    images: int
    levels: int
    call: float


def export(checkpoint: Checkpoint, name: str, out: Path, card: Card) -> Generator[Progress, None, Exported]:
    """Yield progress and return what was exported. A folder that is not whole, or not equal, is removed.

    Args:
        checkpoint: what is exported.
        name: a registered form.
        out: the folder to make; it may exist if it is empty.
        card: what the model card says.

    Raises:
        UsageError: the folder is in use or cannot be written to.
        NotEqualError: the export makes other images.
    """
    form: Form = EXPORTS.get(name)()
    form.require(checkpoint)
    require_new_folder(out, "--out")
    need_room(out.parent, 2 * sum(value.nbytes for value in checkpoint.weights.values()), "for the export")
    made = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    try:
        form.write(made, checkpoint)
        levels, call = yield from _differences(form, made, checkpoint)
        if levels > form.levels or not call <= form.call:
            what = f"its images differ from those of {checkpoint.path} by up to {levels} of 255 levels, and one call of its network by {call:.1g}"
            raise NotEqualError(f"--to {name}: {what}; nothing was written")
        (made / CARD).write_text(card.text(checkpoint, name, levels), encoding="utf-8")
        made.chmod(0o755)  # temporary folders are for their owner alone
        made.replace(out)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return Exported(out, PROVEN_WITH, levels, call)


def _differences(form: Form, folder: Path, checkpoint: Checkpoint) -> Generator[Progress, None, tuple[int, float]]:
    """Sample from the checkpoint and from the export, on the same noise; return the largest differences of the images, in levels, and of one call."""
    compute = ComputeDevice(torch.device("cpu"), "fp32")
    pipeline = pipeline_for(checkpoint, {"particles": 1}, compute)
    requests = [replace(one, key=(0, "export", index)) for index, one in enumerate(requests_for("export", _some_sets(checkpoint.task), seed=0))]
    before = yield from sample_images(pipeline, requests)
    after = yield from form.images(folder, pipeline, requests)
    if after.shape != before.shape:
        raise NotEqualError(f"its images have the shape {tuple(after.shape)}, not {tuple(before.shape)}")
    return int((before.int() - after.int()).abs().max()), max(_call_difference(form, folder, pipeline, requests, part) for part in PARTS)


def _call_difference(form: Form, folder: Path, pipeline: SamplingPipeline, requests: Sequence[ImageRequest], part: float) -> float:
    """Return the largest difference of x0_hat at t = ``part`` T, relative to its largest value."""
    t = max(1, round(part * pipeline.diffusion.schedule.timesteps))
    x_t, labels = ImageNoise([one.key for one in requests], pipeline.task.image_shape, torch.device("cpu"))(), label_tensor(requests, pipeline.task)
    with torch.inference_mode():
        expected = pipeline.diffusion.denoiser(pipeline.net, labels)(x_t.contiguous(memory_format=torch.channels_last), t).x0
        found = form.predict(folder, pipeline, x_t, labels, t)
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1))


def _some_sets(task: Task) -> list[LabelSet]:
    """Return label sets of one, two and three labels, among them the first and the last label."""
    if not task.classes:
        return [()] * PROVEN_WITH
    count = len(task.classes)
    return [tuple(dict.fromkeys(task.classes[(index * 5 + step * 7) % count] for step in range(1 + index % 3))) for index in range(PROVEN_WITH - 1)] + [
        (task.classes[-1],)
    ]
