"""The contenders of the benchmark: our recipes and alternatives, each with its usual recipe.

The peers are conditioned on the 24 labels as their code provides for: with an embedding that is added to the time embedding.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpmctl.config import Config, ModelConfig
from ddpmctl.data.dataset import Dataset
from ddpmctl.device import ComputeDevice, make_compute_device
from ddpmctl.diffusion.denoiser import Diffusion
from ddpmctl.diffusion.objectives import Prediction
from ddpmctl.diffusion.samplers import SAMPLERS, sampler_times
from ddpmctl.nets.context_unet import ContextUnet
from ddpmctl.presets import PRESETS, preset_settings
from ddpmctl.training.trainer import Trainer

PEER_LR = 1e-4


@dataclass
class Contender:
    """One way to train and sample.

    Attributes:
        step: trains on the next batch and returns its size.
        sample: (labels (B, 24), seed, steps) -> images in [-1, 1], (B, 3, 64, 64).
        net: what is trained, for counting.
        forward: (x (1, 3, 64, 64)) -> any, one call of the network, for counting FLOPs.
    """

    name: str
    net: nn.Module
    step: Callable[[], int]
    sample: Callable[[Tensor, int, int], Tensor]
    forward: Callable[[Tensor], object]

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.net.parameters())

    def flops_per_image(self) -> int:
        """Return the operations of a training step per image: forward, and twice that for backward."""
        from torch.utils.flop_counter import FlopCounterMode

        training = self.net.training
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self.net.eval()
            self.forward(torch.randn(1, 3, 64, 64, device=next(self.net.parameters()).device))
        self.net.train(training)
        return 3 * counter.get_total_flops()


def batches(data: Dataset, size: int, seed: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return a function that draws the next batch: images in [-1, 1] and labels."""
    images, labels = torch.from_numpy(data.images), torch.from_numpy(data.labels)
    rng = torch.Generator().manual_seed(seed)

    def draw() -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(images), (size,), generator=rng)
        return images[chosen].float() / 127.5 - 1, labels[chosen].float()

    return draw


def ours(name: str, preset: str, data: Dataset, **settings: object) -> tuple[Contender, Trainer]:
    """Return one of our presets, as ``ddpmctl train`` runs it."""
    minutes = settings.get("minutes", PRESETS[preset].get("minutes"))
    config = Config.from_flat({**preset_settings(preset, minutes), **settings})
    compute: ComputeDevice = make_compute_device(config.device)
    trainer = Trainer(config, compute, data)

    def step() -> int:
        before = trainer.counters.images_seen
        trainer.step()
        if trainer.counters.batch == trainer.batches_per_epoch:
            trainer.end_epoch(trainer.mean_loss("epoch"))
        return trainer.counters.images_seen - before

    def sample(labels: Tensor, seed: int, steps: int) -> Tensor:
        raise NotImplementedError("ours are scored by the evaluation package")

    return Contender(name, trainer.net, step, sample, lambda x: trainer.net(x, x.new_zeros(1, 24), x.new_ones(1))), trainer


def plain_report(data: Dataset, seed: int, *, width: int = 128, batch: int = 64) -> Contender:
    """Return the report's recipe as a notebook would write it: float32, default memory format, Adam."""
    torch.manual_seed(seed)
    net, draw = ContextUnet(ModelConfig(width=width)), batches(data, batch, seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=PEER_LR)
    diffusion = Diffusion.of(Config().diffusion)
    steps, schedule = diffusion.schedule.timesteps, diffusion.schedule
    signal, noise = (torch.tensor(a, dtype=torch.float32) for a in (schedule.signal, schedule.noise))

    def step() -> int:
        x, labels = draw()
        t, eps = torch.randint(1, steps + 1, (len(x),)), torch.randn_like(x)
        loss = F.mse_loss(net(signal[t].view(-1, 1, 1, 1) * x + noise[t].view(-1, 1, 1, 1) * eps, labels, t / steps), eps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return len(x)

    def predict(x: Tensor, t: int, labels: Tensor) -> Tensor:
        out: Tensor = net(x, labels, torch.full((len(x),), t / steps))
        return out

    return Contender("report, plain loop", net, step, _ddim(net, diffusion, predict), lambda x: net(x, torch.zeros(1, 24), torch.ones(1)))


def diffusers_unet(data: Dataset, seed: int, *, channels: tuple[int, ...] = (128, 128, 256, 256, 512, 512), batch: int = 16) -> Contender:
    """Return diffusers' UNet2DModel as its training example sets it up for 64x64, eps, linear schedule, AdamW 1e-4."""
    from diffusers import DDPMScheduler, UNet2DModel

    torch.manual_seed(seed)
    down = ("DownBlock2D",) * (len(channels) - 2) + ("AttnDownBlock2D", "DownBlock2D")
    up = ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * (len(channels) - 2)
    net = UNet2DModel(
        sample_size=64, in_channels=3, out_channels=3, layers_per_block=2, block_out_channels=channels,
        down_block_types=down, up_block_types=up, class_embed_type="identity",
    )  # fmt: skip
    net.label_embedding = nn.Linear(24, 4 * channels[0])  # so that it is trained with the rest
    return _peer("diffusers UNet2DModel", data, seed, batch, net, DDPMScheduler(1000), lambda x, t, y: net(x, t, net.label_embedding(y)).sample)


def lucidrains_unet(data: Dataset, seed: int, *, dim: int = 64, batch: int = 16) -> Contender:
    """Return lucidrains' conditional Unet as its README sets it up, eps, cosine schedule, Adam 1e-4."""
    from denoising_diffusion_pytorch.classifier_free_guidance import Unet
    from diffusers import DDPMScheduler

    torch.manual_seed(seed)
    net = Unet(dim=dim, num_classes=24, cond_drop_prob=0.1, dim_mults=(1, 2, 4, 8))
    net.classes_emb = nn.Linear(24, dim)  # several labels an image where theirs has one class
    schedule = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2")

    def call(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        out: Tensor = net(x, t, y, cond_drop_prob=None if net.training else 0.0)
        return out

    return _peer("lucidrains Unet", data, seed, batch, net, schedule, call)


def _peer(name: str, data: Dataset, seed: int, batch: int, net: nn.Module, schedule: object, call: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Contender:
    from diffusers import DDIMScheduler

    draw, optimizer = batches(data, batch, seed), torch.optim.AdamW(net.parameters(), lr=PEER_LR)

    def step() -> int:
        net.train()
        x, labels = draw()
        t, eps = torch.randint(1000, (len(x),)), torch.randn_like(x)
        loss = F.mse_loss(call(schedule.add_noise(x, eps, t), t, labels), eps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return len(x)

    def sample(labels: Tensor, seed: int, steps: int) -> Tensor:
        net.eval()
        scheduler = DDIMScheduler.from_config(schedule.config, clip_sample=True)
        scheduler.set_timesteps(steps)
        x = torch.randn((len(labels), 3, 64, 64), generator=torch.Generator().manual_seed(seed))
        with torch.inference_mode():
            for t in scheduler.timesteps:
                x = scheduler.step(call(x, t.expand(len(x)), labels), t, x).prev_sample
        return x.clamp(-1, 1)

    return Contender(name, net, step, sample, lambda x: call(x, torch.ones(1, dtype=torch.long), torch.zeros(1, 24)))


def _ddim(net: nn.Module, diffusion: Diffusion, predict: Callable[[Tensor, int, Tensor], Tensor]) -> Callable[[Tensor, int, int], Tensor]:
    def sample(labels: Tensor, seed: int, steps: int) -> Tensor:
        net.eval()
        schedule = diffusion.schedule

        def denoise(x: Tensor, t: int) -> Prediction:
            return diffusion.objective.prediction(predict(x, t, labels), x, float(schedule.signal[t]), float(schedule.noise[t]))

        x = torch.randn((len(labels), 3, 64, 64), generator=torch.Generator().manual_seed(seed))
        times = sampler_times("ddim", "even", schedule, steps)
        with torch.inference_mode():
            *_, last = SAMPLERS.get("ddim")(denoise, x, times, schedule, lambda: torch.zeros_like(x))
        net.train()
        return last.x_t.clamp(-1, 1)

    return sample


def matmul_peak(dtype: torch.dtype, seconds: float = 1.5, *, device: torch.device | None = None) -> float:
    """Return the FLOP/s of a square matrix product, now: 2048 a side on a CPU, 8192 on a GPU."""
    device = device or torch.device("cpu")
    side = 2048 if device.type == "cpu" else 8192
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    a @ b
    start, count = now(device), 0
    while now(device) - start < seconds:
        a @ b
        count += 1
    return 2 * side**3 * count / (now(device) - start)


def now(device: torch.device) -> float:
    """Return the time in seconds once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
