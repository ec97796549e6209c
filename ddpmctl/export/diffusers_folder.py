"""``--to diffusers``: a folder that ``DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)`` loads; it brings code of its own."""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import warnings
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpmctl import __version__
from ddpmctl.checkpoints.format import Checkpoint
from ddpmctl.config import SamplingConfig
from ddpmctl.diffusion import objectives
from ddpmctl.diffusion.randomness import generator
from ddpmctl.errors import UsageError
from ddpmctl.export.exporting import Original
from ddpmctl.files import json_text, write_text, write_verified
from ddpmctl.nets import activations
from ddpmctl.progress import Progress
from ddpmctl.registry import EXPORTS, NETWORKS
from ddpmctl.sampling.pipeline import SamplingPipeline
from ddpmctl.sampling.requests import ImageRequest

ASSETS = Path(__file__).with_name("assets")
SCHEDULERS = {"ddpm": "DDPMScheduler", "ddim": "DPMSolverMultistepScheduler", "dpm++2m": "DPMSolverMultistepScheduler"}
# What the bundled source needs of ddpmctl's other modules.
STANDS_FOR = '''
class UsageError(ValueError):
    """A setting that the network cannot have."""


class Registry(dict):
    """Classes by name."""

    def register(self, name):
        """Return a decorator that registers a class."""
        return lambda entry: self.setdefault(name, entry)

    def get(self, name):
        """Return a class."""
        return self[name]


@dataclass(frozen=True)
class ModelConfig:
    """What a network is made of."""

    net: str
    act: str
    width: int


@dataclass(frozen=True)
class Task:
    """The number of labels and the size of the images."""

    labels: int
    size: int

    @property
    def columns(self):
        """The network's inputs for labels: one, always 0, where there are no labels."""
        return max(1, self.labels)

    @property
    def image_shape(self):
        """Channels, height and width."""
        return (3, self.size, self.size)


ACTIVATIONS, NETWORKS, OBJECTIVES = Registry(), Registry(), Registry()
ICLEVR = Task(24, 64)
'''


@EXPORTS.register("diffusers")
class Diffusers:
    """model_index.json, pipeline, unet/ and scheduler/."""

    packages = ("diffusers",)
    file = ""
    most = 1
    levels = 2
    call = 1e-4

    def require(self, checkpoint: Checkpoint) -> None:
        """Check that diffusers has a scheduler for the sampler.

        Raises:
            UsageError: it has none.
        """
        scheduler_of(checkpoint.config.sampling)

    def write(self, folder: Path, originals: Sequence[Original]) -> None:
        """Write weights, settings and the code that they need."""
        import safetensors.torch

        (original,) = originals
        checkpoint, pipeline = original.checkpoint, original.pipeline
        config, task, schedule = checkpoint.config, checkpoint.task, pipeline.diffusion.schedule
        network, steps = bundled(config.model.net), (ASSETS / "diffusers_pipeline.py").read_text(encoding="utf-8")
        # diffusers copies these files into one folder for all models, so their names tell their content.
        module, process = f"network_{_short(network)}", f"pipeline_{_short(steps)}"
        unet, scheduler = folder / "unet", folder / "scheduler"
        for place in (unet, scheduler):
            place.mkdir()
        write_text(unet / f"{module}.py", network)
        write_text(folder / f"{process}.py", steps)
        bar = torch.tensor(schedule.alpha_bar, dtype=torch.float64)
        weights = {"alpha_bar": bar, **{f"network.{name}": value.contiguous() for name, value in checkpoint.weights.items()}}
        write_verified(unet / "diffusion_pytorch_model.safetensors", safetensors.torch.save(weights, {"format": "pt"}))
        model = config.model
        own = {"net": model.net, "act": model.act, "width": model.width, "objective": config.diffusion.objective, "size": task.size}
        write_text(unet / "config.json", json_text({"_class_name": "ExportedNetwork", **own, "labels": list(task.classes), "times": pipeline.times()}) + "\n")
        name, settings = scheduler_of(config.sampling)
        betas = [float(beta) for beta in schedule.beta]
        settings = {"_class_name": name, "num_train_timesteps": len(betas), "trained_betas": betas, **settings}
        write_text(scheduler / "scheduler_config.json", json_text(settings) + "\n")
        sampling = config.sampling
        index = {
            "_class_name": [process, "LabelPipeline"], "_diffusers_version": _version(), "unet": [module, "ExportedNetwork"],
            "scheduler": ["diffusers", name], "guidance_scale": sampling.guidance, "guidance_from": sampling.guidance_from, "guidance_to": sampling.guidance_to,
        }  # fmt: skip
        write_text(folder / "model_index.json", json_text(index) + "\n")

    def load(self, folder: Path) -> list[Any]:
        """Return the pipeline of diffusers."""
        diffusers: Any = importlib.import_module("diffusers")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = diffusers.DiffusionPipeline.from_pretrained(str(folder), trust_remote_code=True)
        theirs.set_progress_bar_config(disable=True)
        return [theirs]

    def images(self, loaded: Any, pipeline: SamplingPipeline, requests: Sequence[ImageRequest]) -> Generator[Progress, None, Tensor]:
        """Return the images of diffusers' pipeline, from the noise of the requests."""
        yield Progress("sampling with diffusers", 0, 1)
        rngs = [generator(int(seed), "image", *index) for seed, *index in (one.key for one in requests)]
        latents = torch.stack([torch.randn(pipeline.task.image_shape, generator=rng) for rng in rngs])
        texts = [",".join(f'"{label.replace(chr(34), 2 * chr(34))}"' for label in one.labels) for one in requests]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of diffusers' own calls
            made = loaded(texts, latents=latents, generator=rngs, output_type="np").images
        yield Progress("sampling with diffusers", 1, 1)
        return (torch.from_numpy(made) * 255).round().to(torch.uint8).permute(0, 3, 1, 2)

    def predict(self, loaded: Any, pipeline: SamplingPipeline, x_t: Tensor, labels: Tensor, t: int) -> Tensor:
        """Return x0_hat of the network that diffusers has loaded."""
        x0: Tensor = loaded.unet(x_t, t, labels)
        return x0


def scheduler_of(sampling: SamplingConfig) -> tuple[str, dict[str, Any]]:
    """Return the scheduler of diffusers that takes a sampler's steps, and its settings; the network always predicts x0.

    Raises:
        UsageError: there is none.
    """
    if sampling.sampler not in SCHEDULERS or (sampling.sampler == "ddim" and sampling.eta > 0):
        which = f"{sampling.sampler} with eta over 0" if sampling.sampler == "ddim" else sampling.sampler
        raise UsageError(f"--to diffusers: has no scheduler for the sampler {which}; export another form")
    name = SCHEDULERS[sampling.sampler]
    if sampling.sampler == "ddpm":
        return name, {"prediction_type": "sample", "variance_type": "fixed_large", "clip_sample": False}
    order = 2 if sampling.sampler == "dpm++2m" else 1  # the first-order solver's steps are those of ddim without noise
    return name, {"prediction_type": "sample", "algorithm_type": "dpmsolver++", "solver_order": order, "final_sigmas_type": "zero", "lower_order_final": False}


def bundled(net: str) -> str:
    """Return one file with the source of a network and of all that it needs, for a machine without ddpmctl."""
    modules: dict[str, None] = {}

    def visit(module: str) -> None:
        for node in ast.parse(_source(module)).body:
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ddpmctl.nets."):
                visit(node.module)
        modules[module] = None

    visit(NETWORKS.get(net).__module__)
    parts = [_without_own_imports(_source(module)) for module in (activations.__name__, objectives.__name__, *modules)]
    head = (
        f'"""A network of ddpmctl {__version__} (MIT licence) for diffusers."""\n\nfrom __future__ import annotations\n\nfrom dataclasses import dataclass\n\n'
        "import torch\nfrom diffusers import ConfigMixin, ModelMixin\nfrom diffusers.configuration_utils import register_to_config\n\n"
    )
    return "\n\n".join([head + STANDS_FOR, *parts, (ASSETS / "diffusers_network.py").read_text(encoding="utf-8")])


def _source(module: str) -> str:
    return inspect.getsource(importlib.import_module(module))


def _without_own_imports(source: str) -> str:
    """Return the source of a module without its docstring and without imports of ddpmctl, whose names the file has."""
    lines, tree = source.splitlines(), ast.parse(source)
    for node in tree.body:
        own = isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("ddpmctl", "__future__")
        if own or (node is tree.body[0] and isinstance(node, ast.Expr)):
            lines[node.lineno - 1 : node.end_lineno] = [""] * ((node.end_lineno or node.lineno) - node.lineno + 1)
    return "\n".join(lines).strip() + "\n"


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _version() -> str:
    return str(importlib.import_module("diffusers").__version__)
