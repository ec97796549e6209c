"""A worker for torchrun: first-step gradients, a loss curve and the images seen, for several recipes, saved by rank 0.

torchrun --nproc-per-node 2 -m tests.ranks.steps OUT.pt
"""

from __future__ import annotations

import sys
from contextlib import nullcontext

import torch

from ddpmctl.config import Config
from ddpmctl.data.dataset import Dataset, load_dataset
from ddpmctl.device import make_compute_device
from ddpmctl.distributed.job import join
from ddpmctl.distributed.replicas import replicas
from ddpmctl.training.trainer import Trainer

COMMON = {"batch_size": 8, "epochs": 100, "timesteps": 20, "precision": "fp32", "device": "cpu", "threads": 1}
RECIPES: dict[str, dict[str, object]] = {
    "the report's": {"width": 8},
    "unet, muon, an average": {"net": "unet", "width": 32, "optimizer": "muon", "ema": 0.9, "lr": 0.003, "label_dropout": 0.2, "mirror": 0.5, "objective": "v"},
    "fine-unet, naming objects": {
        "net": "fine-unet",
        "objective": "x0",
        "width": 32,
        "label_loss": 0.1,
        "error_loss": 0.001,
        "detail_weight": 3.0,
        "time_sampling": "logit-normal",
        "time_mean_end": -1.0,
        "label_dropout": 0.2,
    },
    "in parts": {"net": "unet", "width": 32, "micro_batch": 2},
    "statistics of each rank's own": {"width": 8, "sync_bn": "off"},
}
STEPS = 50
LONG = ("the report's", "unet, muon, an average")
SCENES = 7  # 21 images: the last batch of an epoch has 5, which 3 ranks share unevenly


def dataset() -> Dataset:
    spec = load_dataset(None, scenes=SCENES)
    try:
        while True:
            next(spec)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


def of_one_image(scenes: Dataset) -> Dataset:
    """The first image only: all ranks but one get an empty share of every batch."""
    return Dataset("one", "one", scenes.images[:1], scenes.labels[:1], {}, None)


def measure(trainer: Trainer, steps: int) -> dict[str, object]:
    """Train and return the first step's gradients, all losses, and step, index and sum of every image and of its noise on this rank."""
    losses: list[float] = []
    seen: list[tuple[int, int, int]] = []
    noise: list[tuple[int, int, float]] = []
    inner, gradients = trainer.loss.draw, {}

    def noted(x0: torch.Tensor, *args: object, share: slice = slice(None), **more: object) -> object:
        seen.extend((trainer.counters.step, share.start + place, int(((image + 1) * 127.5).round().sum())) for place, image in enumerate(x0))
        drawn = inner(x0, *args, share=share, **more)  # type: ignore[arg-type]
        noise.extend((trainer.counters.step, share.start + place, float(x.double().sum())) for place, x in enumerate(drawn.x_t))
        return drawn

    trainer.loss.draw = noted  # type: ignore[assignment,method-assign]
    for step in range(steps):
        if trainer.epoch_is_over:
            trainer.end_epoch(trainer.mean_loss("epoch"))
        before = trainer.counters.epoch_images
        sums = float(trainer.sums["epoch_loss"])
        trainer.step()
        losses.append((float(trainer.sums["epoch_loss"]) - sums) / (trainer.counters.epoch_images - before))
        if step == 0:
            gradients = {name: p.grad.clone().contiguous() for name, p in trainer.net.named_parameters() if p.grad is not None}
    return {"gradients": gradients, "losses": losses, "seen": seen, "noise": noise, "weights": {k: v.clone() for k, v in trainer.weights().items()}}


def main() -> None:
    scenes = dataset()
    with nullcontext(join()) as job:
        found: dict[str, object] = {}
        compute = make_compute_device(Config().replace(**COMMON).device, job.local)  # type: ignore[arg-type]
        with replicas(job, compute.device) as together:
            for name, recipe in RECIPES.items():
                config = Config().replace(**COMMON).replace(**recipe)  # type: ignore[arg-type]
                found[name] = measure(Trainer(config, compute, scenes, replicas=together), STEPS if name in LONG else 3)
            for net, width in (("context-unet", 8), ("unet", 32), ("fine-unet", 8)):
                config = Config().replace(**COMMON).replace(net=net, width=width)  # type: ignore[arg-type]
                found[f"one image, {net}"] = measure(Trainer(config, compute, of_one_image(scenes), replicas=together), 1)
        torch.save(found, f"{sys.argv[1]}.{job.rank}")


if __name__ == "__main__":
    main()
