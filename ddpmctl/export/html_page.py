"""``--to page``: one HTML file in which the model runs: page.html.j2, page.css, and the program in ``assets/page/``, which is built from ``page/``.

Beside the program, a page has JSON (``PageData`` in page/src/model.ts) and, for each model, the network as ONNX: the graph, and the weights
apart from it, with the bytes of a float32 stored by significance, so that they can be compressed.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Generator, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor, nn

from ddpmctl import __version__
from ddpmctl.checkpoints.format import Checkpoint
from ddpmctl.errors import visible
from ddpmctl.export.exporting import Original
from ddpmctl.export.onnx_folder import network_output, network_proto, sampled, sampling_program
from ddpmctl.export.plan import plan_as_dict
from ddpmctl.files import write_text
from ddpmctl.progress import Progress
from ddpmctl.registry import EXPORTS
from ddpmctl.sampling.pipeline import SamplingPipeline
from ddpmctl.sampling.recognition import Recogniser, log_probability_of_labels, recognises_objects
from ddpmctl.sampling.requests import ImageRequest
from ddpmctl.sampling.trajectory import APPEARING
from ddpmctl.task import Task

FILE = "model.html"
WEIGHTS = "weights"  # the name under which a graph looks for its weights
STEPS = (8, 16, 28, 50, 100)  # offered beside the model's own number
MANTISSA = 13  # bits kept of each weight's 23: quick's weights then take 5.6 MB of a page instead of 8.7, and its images change by 1 level at most
STORED = 3  # bytes of a weight: sign, exponent and mantissa have 1 + 8 + MANTISSA bits
LARGE = 256  # values; smaller tensors stay in the graph


@EXPORTS.register("page")
class Page:
    """model.html."""

    packages = ("onnx", "onnxscript", "onnxruntime")
    file = FILE
    most = 2
    levels = 2
    call = 1e-3  # the weights are rounded

    def require(self, checkpoint: Checkpoint) -> None:
        """Do nothing: a sampler that cannot be written is found by ``plan_as_dict``."""

    def write(self, folder: Path, originals: Sequence[Original]) -> None:
        """Write the page."""
        task, models = originals[0].pipeline.task, [_model(original) for original in originals]
        data = {
            "version": __version__, "labels": list(task.classes), "columns": task.columns, "size": task.size,
            "aspects": _aspects(task), "first": first_labels(task), "models": models,
        }  # fmt: skip
        environment = Environment(loader=PackageLoader("ddpmctl.export", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        script, style = _asset("assets/page/page.js"), _asset("page.css")
        text = environment.get_template("page.html.j2").render(
            data=data, title=" and ".join(model["name"] for model in models),
            script=script, script_hash=_hash(script), style=style, style_hash=_hash(style),
            engine=_asset("assets/page/engine.js"), licences=_asset("assets/page/licences.txt"),
            json=_json(data), networks=[_network(original) for original in originals],
            runtime=_text(files("ddpmctl.export").joinpath("assets/page/runtime.wasm.gz").read_bytes()),
        )  # fmt: skip
        write_text(folder / FILE, text)

    def load(self, folder: Path) -> list[tuple[Any, dict[str, Any]]]:
        """Return for each model what the page holds: its network in onnxruntime, and its plan for its own number of steps."""
        text = (folder / FILE).read_text(encoding="utf-8")
        data = json.loads(_embedded(text, "data"))
        return [(_session(text, number), model["plans"][str(model["steps"])]) for number, model in enumerate(data["models"])]

    def images(self, loaded: tuple[Any, Any], pipeline: SamplingPipeline, requests: Sequence[ImageRequest]) -> Generator[Progress, None, Tensor]:
        """Return the images of the page's network and plan, from the noise of the requests."""
        return (yield from sampled(sampling_program(), loaded, pipeline, requests))

    def predict(self, loaded: tuple[Any, Any], pipeline: SamplingPipeline, x_t: Tensor, labels: Tensor, t: int) -> Tensor:
        """Return x0_hat, from the output that onnxruntime finds."""
        return network_output(loaded[0], pipeline, x_t, labels, t)


def first_labels(task: Task) -> list[str]:
    """Return the labels that a page begins with: two without a common word where labels have aspects, else the first."""
    if task.aspects:
        (_, *firsts), seconds = _words(task)
        if len(chosen := [name for pair in zip(firsts[:2], seconds, strict=False) if (name := " ".join(pair)) in task.index]) == 2:
            return chosen
    return list(task.classes[:1])


def _words(task: Task) -> list[list[str]]:
    return [list(dict.fromkeys(task.words(label)[number] for label in task.classes)) for number in range(len(task.aspects))]


def _aspects(task: Task) -> list[dict[str, Any]]:
    return [{"name": name, "words": words} for name, words in zip(task.aspects, _words(task), strict=True)]


def _model(original: Original) -> dict[str, Any]:
    """Return what the page knows of a model, beside its network."""
    checkpoint, pipeline = original.checkpoint, original.pipeline
    sampling, own = pipeline.sampling, pipeline.steps
    counts = sorted({own, *(count for count in STEPS if count <= pipeline.diffusion.schedule.timesteps)})
    return {
        "name": visible(original.card.name), "about": _about(original), "plans": {str(count): _plan(pipeline, count) for count in counts},
        "steps": own, "guidance": sampling.guidance, "guidance_from": sampling.guidance_from, "guidance_to": sampling.guidance_to,
        "particles": checkpoint.config.sampling.particles, "accept": sampling.accept, "tries": pipeline.tries, "recognises": _recognises(checkpoint),
    }  # fmt: skip


def _about(original: Original) -> list[tuple[str, str]]:
    """Return what the page says of a model, as pairs of name and text."""
    card = original.card
    said = card.facts(original.checkpoint)
    for row in card.scores():
        said.append(
            (f"Accuracy on {row['conditions']}", f"{row['accuracy']} ({row['95 % interval']}), exact match {row['exact match']}, {row['images']} images")
        )
    if card.results is not None:
        name, sha256, settings = card.judge()
        said.append(("Scored by", f"the classifier {visible(name)} (sha256 {sha256}), {settings}; brackets: 95 % intervals"))
    if card.licence:
        said.append(("Licence of the weights", visible(card.licence)))
    return said


def _recognises(checkpoint: Checkpoint) -> bool:
    return recognises_objects(checkpoint.config.model.net) and checkpoint.config.training.label_loss > 0


def _plan(pipeline: SamplingPipeline, count: int) -> dict[str, Any]:
    """Return the sampler as a table, the step after which a particle is accepted or rejected, and the step at which a rejected one starts again."""
    with_count = replace(pipeline, sampling=replace(pipeline.sampling, steps=count))
    times, schedule = with_count.times(), pipeline.diffusion.schedule
    again = times[with_count.retry]
    return {
        "steps": plan_as_dict(with_count)["steps"], "choice": with_count.choice, "choice_time": times[with_count.choice] / schedule.timesteps,
        "retry": with_count.retry, "retry_levels": [float(schedule.signal[again]), float(schedule.noise[again])],
        "visibility": np.clip(schedule.log_snr[times], *APPEARING).tolist(),
    }  # fmt: skip


class _Recognising(nn.Module):
    """A network with a second output: the log-probability by which a particle is chosen, (B,); see ``log_probability_of_labels``."""

    def __init__(self, net: nn.Module, task: Task) -> None:
        super().__init__()
        self.net, self.task = net, task

    def forward(self, x_t: Tensor, labels: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        assert isinstance(self.net, Recogniser)
        return self.net(x_t, labels, time), log_probability_of_labels(self.net, x_t, labels, time, self.task)


def _network(original: Original) -> dict[str, Any]:
    """Return a network as texts: its graph, and its large weights, one after another in the graph's order."""
    from onnx import TensorProto
    from onnx.external_data_helper import set_external_data

    net = original.pipeline.net
    model, weights = network_proto(_Recognising(net, original.pipeline.task) if _recognises(original.checkpoint) else net, original.pipeline.task), bytearray()
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and len(tensor.raw_data) >= 4 * LARGE:
            set_external_data(tensor, WEIGHTS, offset=len(weights), length=len(tensor.raw_data))
            weights += tensor.raw_data
            tensor.ClearField("raw_data")
    planes = rounded(np.frombuffer(weights, "<f4"), MANTISSA).view("u1").reshape(-1, 4)[:, : 3 - STORED : -1]
    return {"graph": _text(_compressed(model.SerializeToString())), "weights": _text(_compressed(planes.T.tobytes())), "stored": STORED}


def rounded(values: npt.NDArray[np.float32], mantissa: int) -> npt.NDArray[np.uint32]:
    """Round float32 values to a number of mantissa bits, half to even, and return the bits of the results."""
    bits, dropped = values.view("<u4"), 23 - mantissa
    half = np.uint32((1 << (dropped - 1)) - 1) + ((bits >> np.uint32(dropped)) & np.uint32(1))
    kept: npt.NDArray[np.uint32] = (bits + half) & np.uint32(0xFFFFFFFF - ((1 << dropped) - 1))
    return kept


def _session(text: str, number: int) -> Any:
    """Return the network of a page's model in onnxruntime."""
    import onnx
    import onnxruntime
    from onnx.external_data_helper import ExternalDataInfo

    model = onnx.load_from_string(gzip.decompress(base64.b64decode(_embedded(text, f"graph-{number}"))))
    planes = np.frombuffer(gzip.decompress(base64.b64decode(_embedded(text, f"weights-{number}"))), "u1").reshape(STORED, -1)
    values = np.zeros((planes.shape[1], 4), "u1")
    values[:, : 3 - STORED : -1] = planes.T
    weights = values.tobytes()
    for tensor in model.graph.initializer:
        if tensor.HasField("data_location") and tensor.external_data:
            place: Any = ExternalDataInfo(tensor)
            tensor.raw_data = weights[place.offset : place.offset + place.length]
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def _embedded(text: str, name: str) -> str:
    found = re.search(rf'<script type="[a-z/]+" id="{name}"[^>]*>(.*?)</script>', text, re.S)
    assert found is not None
    return found.group(1)


def _asset(name: str) -> str:
    return files("ddpmctl.export").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Return a program or style as the page's security policy names it."""
    return f"sha256-{_text(hashlib.sha256(text.encode()).digest())}"


def _json(value: Any) -> str:
    """Return JSON with ``<`` escaped, so that no text in it can close the script element that it stands in."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")


def _compressed(data: bytes) -> bytes:
    return gzip.compress(data, 9, mtime=0)


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
