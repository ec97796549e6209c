"""A second implementation of the report's network, from the table in the design, and its files as the report's code writes them."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .conftest import batch

ACTS = {"gelu": nn.GELU, "relu": nn.ReLU, "elu": nn.ELU}
WIDTH = 16


def cba(before: int, after: int, act: str) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, kernel_size=3, padding=1), nn.BatchNorm2d(after), ACTS[act]())


class Twice(nn.Module):
    def __init__(self, before: int, after: int, act: str) -> None:
        super().__init__()
        self.conv1 = cba(before, after, act)
        self.conv2 = cba(after, after, act)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x))


class Chain(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.model = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def down(before: int, after: int, act: str) -> Chain:
    return Chain(Twice(before, after, act), nn.MaxPool2d(kernel_size=2))


def up(before: int, after: int, act: str) -> Chain:
    return Chain(nn.ConvTranspose2d(before, after, kernel_size=2, stride=2), Twice(after, after, act), Twice(after, after, act))


def embedding(before: int, after: int) -> Chain:
    return Chain(nn.Linear(before, after), nn.GELU(), nn.Linear(after, after))


class ReportNet(nn.Module):
    def __init__(self, n_feat: int, act: str = "gelu") -> None:
        super().__init__()
        self.init_conv = Twice(3, n_feat, act)
        self.down1 = down(n_feat, n_feat, act)
        self.down2 = down(n_feat, n_feat * 2, act)
        self.timeembed1 = embedding(1, n_feat * 2)
        self.timeembed2 = embedding(1, n_feat)
        self.contextembed1 = embedding(24, n_feat * 2)
        self.contextembed2 = embedding(24, n_feat)
        self.up0 = nn.Sequential(nn.ConvTranspose2d(n_feat * 2, n_feat * 2, kernel_size=8, stride=8), nn.GroupNorm(8, n_feat * 2), nn.ReLU())
        self.up1 = up(n_feat * 4, n_feat, act)
        self.up2 = up(n_feat * 2, n_feat, act)
        self.out = nn.Sequential(
            nn.Conv2d(n_feat * 2, n_feat, kernel_size=3, padding=1), nn.GroupNorm(8, n_feat), nn.ReLU(), nn.Conv2d(n_feat, 3, kernel_size=3, padding=1)
        )

    def forward(self, x_t: Tensor, c: Tensor, t: Tensor) -> Tensor:
        batch_size = x_t.shape[0]
        first = self.init_conv.conv1(x_t)  # 3 channels are not n_feat: the residual starts after the first layer
        x = (first + self.init_conv.conv2(first)) / 1.414
        d1 = self.down1(x)
        d2 = self.down2(d1)
        hidden = F.gelu(F.avg_pool2d(d2, 7))
        c1, c2 = (e(c).reshape(batch_size, -1, 1, 1) for e in (self.contextembed1, self.contextembed2))
        t1, t2 = (e(t.reshape(batch_size, 1)).reshape(batch_size, -1, 1, 1) for e in (self.timeembed1, self.timeembed2))
        u1 = self.up1(torch.cat([c1 * self.up0(hidden) + t1, d2], dim=1))
        u2 = self.up2(torch.cat([c2 * u1 + t2, d1], dim=1))
        return self.out(torch.cat([u2, x], dim=1))


def report_net(act: str = "gelu", n_feat: int = WIDTH) -> ReportNet:
    """Return a network as after some training, in which every layer affects the output."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = ReportNet(n_feat, act)
        with torch.no_grad():
            for name, weight in net.named_parameters():
                weight.mul_(4 if "embed" in name else 1)
            for module in net.modules():
                if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_(0, 0.3)
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = 1.0
            net.train()(*batch(8, seed=9))  # sets the running statistics of every batch norm
    return net.eval()


def bare(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return weights


def within_a_ddpm(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**schedule_buffers(linear_betas(400)), **{f"nn_model.{name}": value for name, value in weights.items()}}


def from_data_parallel(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{name}": value for name, value in within_a_ddpm(weights).items()}


def linear_betas(timesteps: int) -> Tensor:
    return (0.02 - 1e-4) * torch.arange(timesteps + 1, dtype=torch.float32) / timesteps + 1e-4


def periodic_betas(timesteps: int) -> Tensor:
    return (0.02 - 1e-4) / 2 * torch.cos(2 * math.pi * torch.arange(timesteps + 1, dtype=torch.float32) / 50) + (0.02 + 1e-4) / 2


def schedule_buffers(beta: Tensor) -> dict[str, Tensor]:
    alphabar = torch.cumsum(torch.log(1 - beta), dim=0).exp()
    return {"sqrt_beta_t": beta.sqrt(), "alpha_t": 1 - beta, "alphabar_t": alphabar, "sqrtab": alphabar.sqrt(), "sqrtmab": (1 - alphabar).sqrt()}


def saved(folder: Path, content: object, name: str = "weights.pth") -> Path:
    torch.save(content, folder / name)
    return folder / name
