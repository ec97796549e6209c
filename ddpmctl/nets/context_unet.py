"""The report's network: a two-level U-Net whose decoder is scaled by the labels and shifted by the time.

Attribute names are the report's, so that its state dicts load unchanged.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ddpmctl.config import ModelConfig
from ddpmctl.errors import UsageError
from ddpmctl.iclevr import ICLEVR
from ddpmctl.registry import ACTIVATIONS, NETWORKS
from ddpmctl.task import Task

POOL, GROW = 7, 8  # cells that the encoder averages, and by which the decoder grows them


class ResidualConvBlock(nn.Module):
    """Two conv-BN-activation layers; if residual, return (first or input + second) / 1.414."""

    def __init__(self, in_channels: int, out_channels: int, act: type[nn.Module], *, residual: bool = False) -> None:
        """Build ``conv1`` and ``conv2``."""
        super().__init__()
        self.residual, self.same_channels = residual, in_channels == out_channels
        self.conv1 = nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, 1, 1), nn.BatchNorm2d(out_channels), act())
        self.conv2 = nn.Sequential(nn.Conv2d(out_channels, out_channels, 3, 1, 1), nn.BatchNorm2d(out_channels), act())

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in, H, W) to (B, out, H, W)."""
        first = self.conv1(x)
        second: Tensor = self.conv2(first)
        if not self.residual:
            return second
        # 1.414 and not sqrt(2): the report's weights were trained with it
        return ((x if self.same_channels else first) + second) / 1.414


class UnetDown(nn.Module):
    """Two conv-BN-activation layers, then max pooling."""

    def __init__(self, in_channels: int, out_channels: int, act: type[nn.Module]) -> None:
        """Build ``model``."""
        super().__init__()
        self.model = nn.Sequential(ResidualConvBlock(in_channels, out_channels, act), nn.MaxPool2d(2))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in, H, W) to (B, out, H / 2, W / 2)."""
        return self.model(x)  # type: ignore[no-any-return]


class UnetUp(nn.Module):
    """Upsample the concatenated input and skip, then apply two blocks."""

    def __init__(self, in_channels: int, out_channels: int, act: type[nn.Module]) -> None:
        """Build ``model``."""
        super().__init__()
        self.model = nn.Sequential(
            nn.ConvTranspose2d(in_channels, out_channels, 2, 2),
            ResidualConvBlock(out_channels, out_channels, act),
            ResidualConvBlock(out_channels, out_channels, act),
        )

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Map two (B, in / 2, H, W) to (B, out, 2 H, 2 W)."""
        return self.model(torch.cat((x, skip), 1))  # type: ignore[no-any-return]


class EmbedFC(nn.Module):
    """Linear, GELU, linear: an embedding of the labels or of t / T."""

    def __init__(self, in_features: int, out_features: int) -> None:
        """Build ``model``."""
        super().__init__()
        self.in_features = in_features
        self.model = nn.Sequential(nn.Linear(in_features, out_features), nn.GELU(), nn.Linear(out_features, out_features))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in) to (B, out, 1, 1)."""
        out: Tensor = self.model(x.view(-1, self.in_features))
        return out[:, :, None, None]


@NETWORKS.register("context-unet")
class ContextUnet(nn.Module):
    """the report's two-level U-Net (7.6 M parameters at width 128)."""

    def __init__(self, config: ModelConfig, task: Task = ICLEVR) -> None:
        """Build it with ``config.width`` channels (the report's n_feat) and ``config.act`` in the residual blocks.

        Raises:
            UsageError: the decoder would not return to the size of the images.
        """
        super().__init__()
        coarse = task.size // 4
        if coarse // POOL * GROW != coarse:
            raise UsageError(f"--net: context-unet works at 32, 64, 96 and 128 pixels, but not at {task.size}: its decoder grows "
                f"{coarse // POOL}x{coarse // POOL} cells to {coarse // POOL * GROW}, where the encoder has {coarse}; give --net fine-unet")  # fmt: skip
        n, act = config.width, ACTIVATIONS.get(config.act)
        self.init_conv = ResidualConvBlock(3, n, act, residual=True)
        self.down1 = UnetDown(n, n, act)
        self.down2 = UnetDown(n, 2 * n, act)
        self.to_vec = nn.Sequential(nn.AvgPool2d(POOL), nn.GELU())
        self.timeembed1, self.timeembed2 = EmbedFC(1, 2 * n), EmbedFC(1, n)
        self.contextembed1, self.contextembed2 = EmbedFC(task.columns, 2 * n), EmbedFC(task.columns, n)
        self.up0 = nn.Sequential(nn.ConvTranspose2d(2 * n, 2 * n, GROW, GROW), nn.GroupNorm(8, 2 * n), nn.ReLU())
        self.up1 = UnetUp(4 * n, n, act)
        self.up2 = UnetUp(2 * n, n, act)
        self.out = nn.Sequential(nn.Conv2d(2 * n, n, 3, 1, 1), nn.GroupNorm(8, n), nn.ReLU(), nn.Conv2d(n, 3, 3, 1, 1))

    def forward(self, x_t: Tensor, labels: Tensor, time: Tensor) -> Tensor:
        """Map x_t (B, 3, H, W), labels (B, C) and t / T (B,) to the objective's quantity (B, 3, H, W); sizes below are those at 64x64."""
        x = self.init_conv(x_t)  # (B, n, 64, 64)
        down1 = self.down1(x)  # (B, n, 32, 32)
        down2 = self.down2(down1)  # (B, 2n, 16, 16)
        up0 = self.up0(self.to_vec(down2))  # (B, 2n, 2, 2) -> (B, 2n, 16, 16)
        up1 = self.up1(self.contextembed1(labels) * up0 + self.timeembed1(time), down2)  # (B, n, 32, 32)
        up2 = self.up2(self.contextembed2(labels) * up1 + self.timeembed2(time), down1)  # (B, n, 64, 64)
        return self.out(torch.cat((up2, x), 1))  # type: ignore[no-any-return]
