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
from ddpmctl.export.exporting import Original
from ddpmctl.export.half import is_half
from ddpmctl.export.plan import plan_as_dict
from ddpmctl.files import write_text
from ddpmctl.progress import Progress
from ddpmctl.registry import EXPORTS
from ddpmctl.sampling.pipeline import SamplingPipeline, label_tensor
from ddpmctl.sampling.requests import ImageRequest
from ddpmctl.task import Task

NETWORK, PLAN, PROGRAM = "network.onnx", "plan.json", "sample.py"
SOURCE = Path(__file__).with_name("assets") / PROGRAM
OPSET = 18
INPUTS = ("x_t", "labels", "time")


@EXPORTS.register("onnx")
class Onnx:
    """network.onnx, plan.json and sample.py."""

    packages = ("onnx", "onnxscript", "onnxruntime")
    file = ""
    most = 1
    levels = 2
    call = 1e-4

    def require(self, checkpoint: Checkpoint) -> None:
        """Do nothing: a sampler that cannot be written is found by ``plan_as_dict``."""

    def write(self, folder: Path, originals: Sequence[Original]) -> None:
        """Write network.onnx, plan.json (the steps of the sampler) and sample.py."""
        (original,) = originals
        model = network_proto(original.pipeline.net, original.pipeline.task)
        if is_half(original.checkpoint):
            store_half(model)
        (folder / NETWORK).write_bytes(model.SerializeToString())
        write_text(folder / PLAN, json.dumps(plan_as_dict(original.pipeline), ensure_ascii=False) + "\n")
        (folder / PROGRAM).write_bytes(SOURCE.read_bytes())

    def load(self, folder: Path) -> list[tuple[ModuleType, tuple[Any, Any]]]:
        """Return the program in the folder, and what it loads: the session of onnxruntime and the plan."""
        program = _program(folder / PROGRAM)
        return [(program, program.load(folder))]

    def images(self, loaded: tuple[ModuleType, Any], pipeline: SamplingPipeline, requests: Sequence[ImageRequest]) -> Generator[Progress, None, Tensor]:
        """Return the images of the program in the folder, from the noise of the requests."""
        return (yield from sampled(*loaded, pipeline, requests))

    def predict(self, loaded: tuple[ModuleType, tuple[Any, Any]], pipeline: SamplingPipeline, x_t: Tensor, labels: Tensor, t: int) -> Tensor:
        """Return x0_hat, from the output that onnxruntime finds."""
        return network_output(loaded[1][0], pipeline, x_t, labels, t)


def network_proto(net: nn.Module, task: Task) -> Any:
    """Return a network (x_t, labels, time) -> output, or several outputs, as the message of ONNX, with its weights, for batches of any size."""
    rng = torch.Generator().manual_seed(0)
    example = (torch.randn((2, *task.image_shape), generator=rng), torch.ones((2, task.columns)), torch.full((2,), 0.5))
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter warns about its own parts
        program: Any = torch.onnx.export(
            net.eval(), example, dynamo=True, opset_version=OPSET, input_names=list(INPUTS), verbose=False, dynamic_shapes=tuple({0: batch} for _ in INPUTS)
        )  # fmt: skip
    model = program.model_proto
    for node in model.graph.node:  # the exporter writes there which lines of which files on this machine made the node
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    return model


def store_half(model: Any) -> None:
    """Store the weights of an ONNX model, which have the values of float16, as such; it still calculates in float32, into which each is cast once."""
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if tensor.data_type != TensorProto.FLOAT or not np.array_equal(stored := values.astype(np.float16), values):
            continue  # what the exporter has calculated, such as a position table
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(stored, f"{name}_half"))
        casts.append(helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def sampled(program: ModuleType, model: tuple[Any, Any], pipeline: SamplingPipeline, requests: Sequence[ImageRequest]) -> Generator[Progress, None, Tensor]:
    """Yield progress and return the images of sample.py's sampler, (N, 3, H, W), for a session of onnxruntime and a plan, from the noise of the requests."""
    yield Progress("sampling with onnxruntime", 0, 1)
    noise = ImageNoise([one.key for one in requests], pipeline.task.image_shape, torch.device("cpu"))
    made = program.sample(model, label_tensor(requests, pipeline.task).numpy(), lambda: noise().numpy())
    yield Progress("sampling with onnxruntime", 1, 1)
    return torch.from_numpy(made.transpose(0, 3, 1, 2).copy())


def network_output(session: Any, pipeline: SamplingPipeline, x_t: Tensor, labels: Tensor, t: int) -> Tensor:
    """Return x0_hat, from the first output that onnxruntime finds."""
    schedule = pipeline.diffusion.schedule
    time = np.full(len(x_t), t / schedule.timesteps, np.float32)
    output = session.run(None, dict(zip(INPUTS, (x_t.numpy(), labels.numpy(), time), strict=True)))[0]
    return pipeline.diffusion.objective.prediction(torch.from_numpy(output), x_t, float(schedule.signal[t]), float(schedule.noise[t])).x0


def sampling_program() -> ModuleType:
    """Return the module sample.py."""
    return _program(SOURCE)


def _program(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("ddpmctl_exported_sample", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
