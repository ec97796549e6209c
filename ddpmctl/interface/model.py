"""``ddpmctl.load``: a trained model, its images, how they are denoised, and how images are scored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ddpmctl.checkpoints.format import Checkpoint, load_checkpoint
from ddpmctl.config import Config
from ddpmctl.device import ComputeDevice
from ddpmctl.errors import UsageError
from ddpmctl.evaluation.classifiers import Classifier, load_classifier
from ddpmctl.evaluation.evaluate import pipeline_for
from ddpmctl.evaluation.results import FileResults
from ddpmctl.evaluation.scores import Score
from ddpmctl.interface.choices import agreed_device, checkpoint_path
from ddpmctl.interface.tasks import Listener, checked, finish
from ddpmctl.label_lists import label_set, parse_labels
from ddpmctl.runs.folder import Run
from ddpmctl.runs.sources import RunSources
from ddpmctl.sampling.pipeline import SamplingPipeline, sample_images
from ddpmctl.sampling.recognition import require_recogniser
from ddpmctl.sampling.requests import requests_for
from ddpmctl.sampling.trajectory import as_recorded
from ddpmctl.statistics.intervals import Interval, accuracy_interval
from ddpmctl.task import LabelSet, Task

Labels: TypeAlias = str | Sequence[str | Sequence[str]]
"""The labels of one image as a text, ``"red cube, blue sphere"``; or of several images, as a list of such texts or of lists of labels."""


@dataclass(frozen=True)
class DenoisingFrame:
    """One frame of an image that is denoised.

    Attributes:
        t: the timestep, T for pure noise and 0 for the image.
        log_snr: the logarithm of the signal-to-noise ratio of x_t.
        x_t: the noisy image.
        x0_hat: the predicted clean image; None for pure noise.
    """

    t: int
    log_snr: float
    x_t: Image.Image
    x0_hat: Image.Image | None


@dataclass(frozen=True)
class ImageScores:
    """What a classifier finds in images.

    Attributes:
        score: pooled counts and accuracies.
        interval: the accuracy with its 95 % interval over images.
        probabilities: of every class in each image, float32 (N, C).
        classes: their names.
        classifier: its name and hash.
    """

    score: Score
    interval: Interval
    probabilities: NDArray[np.float32]
    classes: tuple[str, ...]
    classifier: str

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        probabilities = [dict(zip(self.classes, map(float, row), strict=True)) for row in self.probabilities]
        return {**self.score.to_dict(), "interval": [self.interval.low, self.interval.high], "classifier": self.classifier, "probabilities": probabilities}


@dataclass(frozen=True, eq=False, repr=False)
class Model:
    """A trained model; made by ``ddpmctl.load``.

    Attributes:
        checkpoint: weights and settings.
        compute: the device and the precision it works in.
    """

    checkpoint: Checkpoint
    compute: ComputeDevice

    def __repr__(self) -> str:
        """Return the file, the network and the number of labels."""
        return f"Model({str(self.path)!r}, {self.config.model.net}, {len(self.labels)} labels, {self.task.size}x{self.task.size})"

    @property
    def path(self) -> Path:
        """The file of the checkpoint."""
        return self.checkpoint.path

    @property
    def config(self) -> Config:
        """Every setting that it was trained with, and its sampling settings."""
        return self.checkpoint.config

    @property
    def task(self) -> Task:
        """The labels and the size of its images."""
        return self.checkpoint.task

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels that it knows, in order."""
        return self.task.classes

    @cached_property
    def _own(self) -> SamplingPipeline:
        return pipeline_for(self.checkpoint, {}, self.compute)

    def sample(self, labels: Labels | None = None, n: int = 1, *, seed: int = 0, progress: Listener = None, **sampling: Any) -> list[Image.Image]:
        """Sample images: those of ``ddpmctl sample`` with the same labels, seed and settings.

        Args:
            labels: of one image, as a text with commas, or a list of such texts for several images; None for a model of images without labels.
            n: images for each label set.
            seed: of the noise.
            progress: is called with each ``Progress``.
            sampling: sampling settings that replace the model's: ``steps=50``, ``guidance=2.0``, ``sampler="ddim"``.

        Returns:
            The images, label set by label set.

        Raises:
            UsageError: labels or settings that the model does not know.
        """
        if type(n) is not int or n < 1:
            raise UsageError(f"n: must be a number of images from 1 on, not {n!r}")
        requests = requests_for("sample", self._label_sets(labels), seed=seed, repeats=n)
        made = finish(sample_images(self._pipeline(sampling), requests), progress)
        return [Image.fromarray(image) for image in made.permute(0, 2, 3, 1).contiguous().numpy()]

    def denoise(self, labels: Labels | None = None, *, seed: int = 0, **sampling: Any) -> Iterator[DenoisingFrame]:
        """Yield the frames of one image from pure noise to the end: those of ``ddpmctl denoise-grid``. Arguments are those of ``sample``.

        Raises:
            UsageError: labels or settings that the model does not know, or labels of several images.
        """
        sets, pipeline = self._label_sets(labels), self._pipeline(sampling)
        if len(sets) > 1:
            raise UsageError("labels: denoise shows one image at a time; give the labels of one")
        return self._frames(pipeline, sets, seed)

    def _frames(self, pipeline: SamplingPipeline, sets: list[LabelSet], seed: int) -> Iterator[DenoisingFrame]:
        requests = finish(pipeline.choose(requests_for("sample", sets, seed=seed)), None)
        for frame in pipeline.frames(requests):
            one = as_recorded(frame, pipeline.diffusion.schedule)
            yield DenoisingFrame(one.t, one.log_snr, Image.fromarray(one.x_t[0]), None if one.x0_hat is None else Image.fromarray(one.x0_hat[0]))

    def score(self, images: Sequence[Image.Image | NDArray[np.uint8]], labels: Labels, *, classifier: str | Path | None = None) -> ImageScores:
        """Score images by the classifier that ``ddpmctl evaluate`` would use, or by one that is named.

        Args:
            images: of the model's size, as PIL images or as uint8 arrays (H, W, 3).
            labels: what each image was to show, as in ``sample``; one text stands for all images.
            classifier: the file of a classifier.

        Raises:
            UsageError: images of another size, another number of label sets, or no classifier for them.
            DataError: the classifier's file is damaged, or is of other images.
        """
        sets, side = self._label_sets(labels), self.task.size
        sets = sets * len(images) if len(sets) == 1 else sets
        if len(sets) != len(images) or not images:
            raise UsageError(f"labels: {len(sets)} label sets for {len(images)} images")
        each = [np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image) for image in images]
        if unfit := [image for image in each if image.dtype != np.uint8 or image.shape != (side, side, 3)]:
            raise UsageError(f"images: must be uint8 of {side}x{side} pixels with 3 channels, not {unfit[0].dtype} {unfit[0].shape}")
        pixels = np.stack(each)
        judge, planes = self._classifier(None if classifier is None else Path(classifier)), np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
        outputs = judge(torch.from_numpy(planes).to(self.compute.device).float() / 127.5 - 1).cpu().numpy()
        found = FileResults(tuple(sets), outputs[:, None], planes[:, None], self.task)
        return ImageScores(found.score, accuracy_interval(found.tally), outputs, self.labels, judge.describe())

    def _classifier(self, named: Path | None) -> Classifier:
        run, root = Run(self.path.parent.parent), None
        if named is None and run.data_file.is_file():
            sources = RunSources.load(run.data_file)
            named, root = sources.evaluator, sources.source.path
        return load_classifier(named, root, self.compute.device, self.task)

    def _label_sets(self, labels: Labels | None) -> list[LabelSet]:
        if labels is None:
            if self.labels:
                raise UsageError(f"labels: are missing; the model knows {', '.join(self.labels[:5])}, ...")
            return [()]
        each = [labels] if isinstance(labels, str) else labels
        return [parse_labels([one], self.task)[0] if isinstance(one, str) else label_set(one, self.task) for one in each]

    def _pipeline(self, sampling: Mapping[str, Any]) -> SamplingPipeline:
        config = self.config.replace(**checked(sampling, "sampling"))
        require_recogniser(config)
        return replace(self._own, sampling=config.sampling)


def load(
    name: str | Path | None = None, *, runs_dir: str | Path = "runs", device: str = "auto", precision: str = "auto", assume: Mapping[str, Any] | None = None
) -> Model:
    """Return a trained model.

    Args:
        name: a checkpoint, or a run, whose best checkpoint is used; None for the newest run, or where there is none for ``pretrained``, the
            model that comes with ddpmctl.
        runs_dir: where runs are looked for.
        device, precision: as on the command line.
        assume: settings of a file that carries none, such as ``{"act": "relu"}``.

    Raises:
        UsageError: there is no such file or run.
        DataError: the file is damaged, or is not a checkpoint of a known network.
    """
    path, _ = checkpoint_path(None if name is None else Path(name), Path(runs_dir))
    checkpoint = load_checkpoint(path, checked(assume or {}, "model", "diffusion", "sampling"))
    return Model(checkpoint, agreed_device(checked({"device": device, "precision": precision}, "device")))
