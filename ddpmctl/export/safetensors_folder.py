"""``--to safetensors``: weights and settings, which ``sample``, ``evaluate`` and ``train --weights`` read again."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ddpmctl.checkpoints.exported import write_exported
from ddpmctl.checkpoints.format import Checkpoint, load_checkpoint
from ddpmctl.checkpoints.names import WEIGHTS
from ddpmctl.evaluation.evaluate import pipeline_for
from ddpmctl.export.exporting import Original
from ddpmctl.export.half import as_half, is_half
from ddpmctl.progress import Progress
from ddpmctl.registry import EXPORTS
from ddpmctl.sampling.pipeline import SamplingPipeline, sample_images
from ddpmctl.sampling.requests import ImageRequest


@EXPORTS.register("safetensors")
class Safetensors:
    """model.safetensors and config.json."""

    packages = ()
    file = ""
    most = 1
    levels = 0
    call = 0.0

    def require(self, checkpoint: Checkpoint) -> None:
        """Do nothing: every checkpoint can be written."""

    def write(self, folder: Path, originals: Sequence[Original]) -> None:
        """Write the weights, in float16 if it holds them without rounding, and the settings."""
        (original,) = originals
        checkpoint = original.checkpoint
        write_exported(folder, checkpoint, as_half(checkpoint) if is_half(checkpoint) else checkpoint.weights)

    def load(self, folder: Path) -> list[Checkpoint]:
        """Return the checkpoint in the folder."""
        return [load_checkpoint(folder / WEIGHTS)]

    def images(self, loaded: Checkpoint, pipeline: SamplingPipeline, requests: Sequence[ImageRequest]) -> Generator[Progress, None, Tensor]:
        """Return the images of the folder's network."""
        return (yield from sample_images(pipeline_for(loaded, {"particles": 1}, pipeline.compute), requests))

    def predict(self, loaded: Checkpoint, pipeline: SamplingPipeline, x_t: Tensor, labels: Tensor, t: int) -> Tensor:
        """Return x0_hat of the folder's network."""
        return pipeline.diffusion.denoiser(loaded.network(), labels)(x_t.contiguous(memory_format=torch.channels_last), t).x0
