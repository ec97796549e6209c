"""``--to onnx``: the network as ONNX, the sampler as a table of numbers, and a program of numpy that puts them together."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Generator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddpmctl.checkpoints.format import Checkpoint
from ddpmctl.diffusion.randomness import ImageNoise
from ddpmctl.export.plan import plan_as_dict
from ddpmctl.files import write_text
from ddpmctl.progress import Progress
from ddpmctl.registry import EXPORTS
from ddpmctl.sampling.pipeline import SamplingPipeline, label_tensor
from ddpmctl.sampling.requests import ImageRequest

NETWORK, PLAN, PROGRAM = "network.onnx", "plan.json", "sample.py"
OPSET = 18
INPUTS = ("x_t", "labels", "time")


@EXPORTS.register("onnx")
class Onnx:
    """network.onnx, plan.json and sample.py."""

    packages = ("onnx", "onnxscript", "onnxruntime")
    levels = 2
    call = 1e-4

    def require(self, checkpoint: Checkpoint) -> None:
        """Do nothing: a sampler that cannot be written is found by ``plan_as_dict``."""

    def write(self, folder: Path, checkpoint: Checkpoint, pipeline: SamplingPipeline) -> None:
        """Write network.onnx, plan.json (the steps of the sampler) and sample.py."""
        write_network(folder / NETWORK, pipeline.net, checkpoint.task.image_shape, checkpoint.task.columns)
        write_text(folder / PLAN, json.dumps(plan_as_dict(pipeline), ensure_ascii=False) + "\n")
        program = Path(__file__).with_name("assets") / PROGRAM
        (folder / PROGRAM).write_bytes(program.read_bytes())

    def load(self, folder: Path) -> tuple[ModuleType, tuple[Any, Any]]:
        """Return the program in the folder, and what it loads: the session of onnxruntime and the plan."""
        program = _program(folder / PROGRAM)
        return program, program.load(folder)

    def images(self, loaded: tuple[ModuleType, Any], pipeline: SamplingPipeline, requests: Sequence[ImageRequest]) -> Generator[Progress, None, Tensor]:
        """Return the images of the program in the folder, from the noise of the requests."""
        yield Progress("sampling with onnxruntime", 0, 1)
        (program, model), noise = loaded, ImageNoise([one.key for one in requests], pipeline.task.image_shape, torch.device("cpu"))
        made = program.sample(model, label_tensor(requests, pipeline.task).numpy(), lambda: noise().numpy())
        yield Progress("sampling with onnxruntime", 1, 1)
        return torch.from_numpy(made.transpose(0, 3, 1, 2).copy())

    def predict(self, loaded: tuple[ModuleType, tuple[Any, Any]], pipeline: SamplingPipeline, x_t: Tensor, labels: Tensor, t: int) -> Tensor:
        """Return x0_hat, from the output that onnxruntime finds."""
        (_, (session, _)), schedule = loaded, pipeline.diffusion.schedule
        time = np.full(len(x_t), t / schedule.timesteps, np.float32)
        (output,) = session.run(None, dict(zip(INPUTS, (x_t.numpy(), labels.numpy(), time), strict=True)))
        return pipeline.diffusion.objective.prediction(torch.from_numpy(output), x_t, float(schedule.signal[t]), float(schedule.noise[t])).x0


def write_network(path: Path, net: nn.Module, image_shape: tuple[int, ...], columns: int) -> None:
    """Write a network (x_t, labels, time) -> output as ONNX, for batches of any size; the weights are in the file."""
    rng = torch.Generator().manual_seed(0)
    example = (torch.randn((2, *image_shape), generator=rng), torch.ones((2, columns)), torch.full((2,), 0.5))
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter warns about its own parts
        program: Any = torch.onnx.export(
            net.eval(), example, dynamo=True, opset_version=OPSET, input_names=list(INPUTS), output_names=["output"], verbose=False,
            dynamic_shapes=tuple({0: batch} for _ in INPUTS),
        )  # fmt: skip
        program.save(str(path), external_data=False)


def _program(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("ddpmctl_exported_sample", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
