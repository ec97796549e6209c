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
from ddpmctl.progress import Progress
from ddpmctl.registry import EXPORTS
from ddpmctl.sampling.pipeline import SamplingPipeline, sample_images
from ddpmctl.sampling.requests import ImageRequest


@EXPORTS.register("safetensors")
class Safetensors:
    """model.safetensors and config.json."""

    levels = 0
    call = 0.0

    def require(self, checkpoint: Checkpoint) -> None:
        """Every checkpoint can be written."""

    def write(self, folder: Path, checkpoint: Checkpoint) -> None:
        """Write the weights, bit for bit, and the settings."""
        write_exported(folder, checkpoint, checkpoint.weights)

    def images(self, folder: Path, pipeline: SamplingPipeline, requests: Sequence[ImageRequest]) -> Generator[Progress, None, Tensor]:
        """Return the images of the folder's network."""
        again = pipeline_for(load_checkpoint(folder / WEIGHTS), {"particles": pipeline.sampling.particles}, pipeline.compute)
        return (yield from sample_images(again, requests))

    def predict(self, folder: Path, pipeline: SamplingPipeline, x_t: Tensor, labels: Tensor, t: int) -> Tensor:
        """Return x0_hat of the folder's network."""
        net = load_checkpoint(folder / WEIGHTS).network()
        return pipeline.diffusion.denoiser(net, labels)(x_t.contiguous(memory_format=torch.channels_last), t).x0
