"""Our U-Net: works on 4x4 patches, and looks at the labels one token an object.

The objects of i-CLEVR are some 10 pixels wide, so what is where is decided at 16x16 and 8x8 positions,
and there all the arithmetic is spent. Time and the label set as a whole steer every block through
adaptive norm (Dhariwal & Nichol 2021, eq. 4).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpmctl.config import ModelConfig
from ddpmctl.registry import ACTIVATIONS, NETWORKS

CLASSES = 24
PATCH = 4
HEAD = 32  # channels per attention head, or the largest power of two below that divides


class TimeEmbedding(nn.Module):
    """t / T as sines and cosines of geometric frequencies (Vaswani et al. 2017, section 3.5)."""

    frequencies: Tensor

    def __init__(self, features: int) -> None:
        """Keep ``features / 2`` frequencies between 1 and 1000 radians."""
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(0, 3, features // 2), persistent=False)

    def forward(self, time: Tensor) -> Tensor:
        """Map (B,) to (B, features)."""
        angle = time.float()[:, None] * self.frequencies
        return torch.cat((angle.sin(), angle.cos()), 1)


class ChannelNorm(nn.Module):
    """Layer norm over the channels of each position (Ba et al. 2016), on maps (B, C, H, W).

    In channels_last these lie side by side, which makes it three times as fast as group norm on a CPU.
    """

    def __init__(self, channels: int, *, affine: bool = True) -> None:
        """Start with a scale of one and no shift, or have neither."""
        super().__init__()
        self.channels = channels
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape and type; autocast would make it float32, at twice the memory traffic."""
        weight, bias = (None if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x.permute(0, 2, 3, 1), (self.channels,), weight, bias).permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """Norm, activation, conv; then the same again, scaled and shifted by the condition."""

    def __init__(self, in_channels: int, out_channels: int, condition: int, act: type[nn.Module]) -> None:
        """Build it as the identity: the last convolution starts at zero."""
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(in_channels), ChannelNorm(out_channels, affine=False)
        self.conv1, self.conv2 = nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.modulation = nn.Linear(condition, 2 * out_channels)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.act = act()
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.modulation.weight)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map x (B, in, H, W) and the condition (B, C) to (B, out, H, W)."""
        scale, shift = self.modulation(condition)[:, :, None, None].chunk(2, 1)
        h = self.conv1(self.act(self.norm1(x)))
        h = self.conv2(self.act(torch.addcmul(shift, self.norm2(h), 1 + scale)))
        return self.skip(x) + h  # type: ignore[no-any-return]


class LabelAttention(nn.Module):
    """Every position looks at one token for each requested object and, with ``places``, at all positions.

    The two have softmaxes of their own, so that positions and objects do not compete: each position
    must always choose an object.
    """

    def __init__(self, channels: int, token_channels: int, *, places: bool) -> None:
        """Build it as the identity: the projection starts at zero."""
        super().__init__()
        self.heads = channels // math.gcd(channels, HEAD)
        self.norm = ChannelNorm(channels)
        self.query = nn.Linear(channels, channels)
        self.label_kv = nn.Linear(token_channels, 2 * channels)
        self.place_kv = nn.Linear(channels, 2 * channels) if places else None
        self.project = nn.Linear(channels, channels)
        nn.init.zeros_(self.project.weight)

    def forward(self, x: Tensor, tokens: Tensor, present: Tensor) -> Tensor:
        """Map x (B, C, H, W), tokens (1 + 24, K) and which of them count, (B, 1 + 24), to (B, C, H, W)."""
        here = self.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        query = self.query(here)
        out = attend(query, self.label_kv(tokens).expand(len(x), -1, -1), self.heads, present)
        if self.place_kv is not None:
            out = out + attend(query, self.place_kv(here), self.heads)
        return x + self.project(out).transpose(1, 2).reshape(x.shape)  # type: ignore[no-any-return]


def attend(query: Tensor, key_value: Tensor, heads: int, visible: Tensor | None = None) -> Tensor:
    """Return multi-head attention of queries (B, N, C) to keys and values side by side, (B, M, 2 C), as (B, N, C).

    Written out (Vaswani et al. 2017, eq. 1): at so few positions this is faster on a CPU than the
    fused kernel, whose backward pass is slow there. ``visible`` (B, M) hides the others.
    """
    key, value = key_value.chunk(2, 2)
    q, k, v = (z.reshape(*z.shape[:2], heads, -1).transpose(1, 2) for z in (query, key, value))  # (B, heads, N or M, C / heads)
    logits = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
    if visible is not None:
        logits = logits.masked_fill(~visible[:, None, None, :], -torch.inf)
    out: Tensor = logits.softmax(3) @ v
    return out.transpose(1, 2).flatten(2)


@NETWORKS.register("unet")
class UNet(nn.Module):
    """ours: 4x4 patches, residual blocks with adaptive norm, label tokens in attention at 16x16 and 8x8."""

    def __init__(self, config: ModelConfig) -> None:
        """Build it with ``width`` channels at 16x16 and twice as many at 8x8."""
        super().__init__()
        act = ACTIVATIONS.get(config.act)
        w1, w2 = config.width, 2 * config.width
        condition = w2
        self.time = nn.Sequential(TimeEmbedding(64), nn.Linear(64, condition), act(), nn.Linear(condition, condition))
        self.label_set = nn.Linear(CLASSES, condition)
        self.tokens = nn.Parameter(torch.randn(1 + CLASSES, w2))  # the first stands for "no object"
        self.where = nn.Parameter(torch.zeros(1, w2, 8, 8))  # positions, which attention alone could not tell apart
        self.act = act()
        self.stem = nn.Conv2d(3 * PATCH**2, w1, 3, padding=1)
        self.down = nn.ModuleList(ResidualBlock(w, w, condition, act) for w in (w1, w2))
        self.shrink = nn.Conv2d(w1, w2, 3, stride=2, padding=1)
        self.block = ResidualBlock(w2, w2, condition, act)
        self.up = nn.ModuleList(ResidualBlock(2 * w, w, condition, act) for w in (w2, w1))
        self.grow = nn.Sequential(nn.Conv2d(w2, w1, 1), nn.Upsample(scale_factor=2))
        self.look = nn.ModuleDict(
            {
                "down 16": LabelAttention(w1, w2, places=False),
                "down 8": LabelAttention(w2, w2, places=True),
                "middle 8": LabelAttention(w2, w2, places=True),
                "up 8": LabelAttention(w2, w2, places=True),
                "up 16": LabelAttention(w1, w2, places=False),
            }
        )
        self.out = nn.Sequential(ChannelNorm(w1), act(), nn.Conv2d(w1, 3 * PATCH**2, 3, padding=1))
        nn.init.zeros_(self.out[-1].weight)  # type: ignore[arg-type]

    def forward(self, x_t: Tensor, labels: Tensor, time: Tensor) -> Tensor:
        """Map x_t (B, 3, 64, 64), labels (B, 24) and t / T (B,) to the objective's quantity (B, 3, 64, 64)."""
        condition = self.act(self.time(time) + self.label_set(labels))
        present = torch.cat((labels.new_ones(len(labels), 1), labels), 1) > 0

        def look(x: Tensor, where: str) -> Tensor:
            return self.look[where](x, self.tokens, present)  # type: ignore[no-any-return]

        x16 = look(self.down[0](self.stem(F.pixel_unshuffle(x_t, PATCH)), condition), "down 16")  # (B, w1, 16, 16)
        x8 = self.down[1](self.shrink(x16) + self.where, condition)  # (B, w2, 8, 8)
        x = look(self.block(look(x8, "down 8"), condition), "middle 8")
        x = look(self.up[0](torch.cat((x, x8), 1), condition), "up 8")
        x = look(self.up[1](torch.cat((self.grow(x), x16), 1), condition), "up 16")  # (B, w1, 16, 16)
        return F.pixel_shuffle(self.out(x), PATCH)
