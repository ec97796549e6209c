"""Export a checkpoint, and prove that the export makes the same images."""

from __future__ import annotations

import importlib.util
import itertools
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
from ddpmctl.task import LabelSet, Task

PROVEN_WITH = 8  # images
PARTS = (0.05, 0.5, 0.95)  # of T, at which one call is compared


class NotEqualError(DdpmctlError):
    """The export makes other images than the checkpoint."""


class Form(Protocol):
    """A form of export.

    Attributes:
        packages: the packages that it needs, beside those that ddpmctl always has.
        levels: the largest difference of an image's pixels that is allowed, in grey levels of 255.
        call: the largest difference of one call's predicted x0 that is allowed, relative to its largest value.
    """

    packages: tuple[str, ...]
    levels: int
    call: float

    def require(self, checkpoint: Checkpoint) -> None:
        """Raise UsageError if the form cannot express a setting of the checkpoint."""

    def write(self, folder: Path, checkpoint: Checkpoint, pipeline: SamplingPipeline) -> None:
        """Write the files, except the model card; ``pipeline`` is that of the checkpoint, with one particle, on the CPU."""

    def load(self, folder: Path) -> Any:
        """Load what was written, as another program does; the result is the first argument of the methods below."""

    def images(self, loaded: Any, pipeline: SamplingPipeline, requests: Sequence[ImageRequest]) -> Generator[Progress, None, Tensor]:
        """Return the images that the exported files make of requests, with the settings of a pipeline: uint8 (N, 3, H, W)."""

    def predict(self, loaded: Any, pipeline: SamplingPipeline, x_t: Tensor, labels: Tensor, t: int) -> Tensor:
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
    """Yield progress and return what was exported. If writing fails, or the images differ, nothing is left.

    Args:
        checkpoint: what is exported.
        name: a registered form.
        out: the folder to make; it may exist if it is empty.
        card: what the model card says.

    Raises:
        UsageError: the folder is in use or cannot be written to.
        NotEqualError: the export makes other images.
    """
    form = usable_form(name, checkpoint)
    require_new_folder(out, "--out")
    pipeline = pipeline_for(checkpoint, {"particles": 1}, ComputeDevice(torch.device("cpu"), "fp32"))
    need_room(out.parent, 2 * sum(value.nbytes for value in checkpoint.weights.values()), "for the export")
    made = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    try:
        form.write(made, checkpoint, pipeline)
        levels, call = yield from _differences(form, form.load(made), pipeline)
        if levels > form.levels or not call <= form.call:
            what = f"its images differ from those of {checkpoint.path} by up to {levels} of 255 levels, and one call of its network by {call:.1g}"
            raise NotEqualError(f"--to {name}: {what}; nothing was written")
        (made / CARD).write_text(card.text(checkpoint, name, levels), encoding="utf-8")
        made.chmod(0o755)  # temporary folders are for their owner alone
        if out.exists():
            out.rmdir()  # it is empty; Windows replaces no folder
        made.replace(out)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return Exported(out, PROVEN_WITH, levels, call)


def usable_form(name: str, checkpoint: Checkpoint) -> Form:
    """Return a form of export in which a checkpoint can be written.

    Raises:
        UsageError: there is no form of this name, a package is missing, or the form cannot express a setting.
    """
    form: Form = EXPORTS.get(name)()
    if missing := [package for package in form.packages if importlib.util.find_spec(package) is None]:
        raise UsageError(f"--to {name}: needs {', '.join(missing)}; install with: python -m pip install 'ddpmctl[export]'")
    form.require(checkpoint)
    return form


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
