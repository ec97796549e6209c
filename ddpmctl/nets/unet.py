"""Our U-Net: works on 4x4 patches, and looks at the labels one token an object.

The objects of i-CLEVR are some 10 pixels wide, so what is where is decided at 16x16 and 8x8 positions,
and there all the arithmetic is spent. Time and the label set as a whole steer every block through
adaptive norm (Dhariwal & Nichol 2021, eq. 4). Pixels that are good as they are need not go through all of
this: the output takes them from the input, as much of each band of detail as the network sees fit.
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
BANDS = 3  # of detail, each with a gate for every pixel
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
    must always choose an object, and in half of the heads each object chooses positions.
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
        out = attend_both_ways(query, self.label_kv(tokens).expand(len(x), -1, -1), self.heads, present)
        if self.place_kv is not None:
            out = out + attend(query, self.place_kv(here), self.heads)
        return x + self.project(out).transpose(1, 2).reshape(x.shape)  # type: ignore[no-any-return]


def attend(query: Tensor, key_value: Tensor, heads: int) -> Tensor:
    """Return multi-head attention of queries (B, N, C) to keys and values side by side, (B, M, 2 C), as (B, N, C).

    Written out (Vaswani et al. 2017, eq. 1): at so few positions this is faster on a CPU than the
    fused kernel, whose backward pass is slow there.
    """
    logits, value = _logits(query, key_value, heads)
    return _joined(logits.softmax(3) @ value)


def attend_both_ways(query: Tensor, key_value: Tensor, heads: int, visible: Tensor) -> Tensor:
    """Return attention as ``attend`` does, where half of the heads, rounded down, take the softmax over the N queries instead.

    There each key has the same amount to give and divides it among the queries. With positions as queries
    and objects as keys, an object that stands somewhere already has little left for another place: a softmax
    over the objects alone cannot know that, and paints it twice. ``visible`` (B, M) hides the other keys.
    """
    logits, value = _logits(query, key_value, heads)
    visible, half = visible[:, None, None, :], heads - heads // 2  # (B, 1, 1, M)
    by_query = logits[:, :half].masked_fill(~visible, -torch.inf).softmax(3)
    by_key = logits[:, half:].softmax(2) * visible * math.sqrt(logits.shape[2])  # of a size that does not fall with N
    return _joined(torch.cat((by_query, by_key), 1).to(value.dtype) @ value)


def _logits(query: Tensor, key_value: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Return the scaled products (B, heads, N, M) and the values (B, heads, M, C / heads)."""
    key, value = key_value.chunk(2, 2)
    q, k, v = (z.reshape(*z.shape[:2], heads, z.shape[2] // heads).transpose(1, 2) for z in (query, key, value))
    return q @ k.transpose(2, 3) / math.sqrt(q.shape[3]), v


def _joined(heads: Tensor) -> Tensor:
    """Lay the heads (B, heads, N, C / heads) side by side: (B, N, C)."""
    return heads.transpose(1, 2).flatten(2)


class Detail(nn.Module):
    """The image as three bands of detail that add up to it: the a trous wavelet transform (Holschneider et al. 1989)."""

    kernel: Tensor

    def __init__(self) -> None:
        """Keep the binomial kernel 1 2 1 in both directions, for each colour."""
        super().__init__()
        line = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("kernel", torch.outer(line, line).expand(3, 1, 3, 3).clone(), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map (B, 3, H, W) to what is lost by one blur, by a second one twice as wide, and what is left, each of the same shape."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            once = self._blur(x, 1)
            twice = self._blur(once, 2)
        return x - once, once - twice, twice

    def _blur(self, x: Tensor, spread: int) -> Tensor:
        padded = F.pad(x, (spread,) * 4, mode="replicate")
        return F.conv2d(padded, self.kernel, groups=3, dilation=spread)


@NETWORKS.register("unet")
class UNet(nn.Module):
    """ours: 4x4 patches, residual blocks with adaptive norm, label tokens in attention at 16x16 and 8x8, details from the input."""

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
        self.detail = Detail()
        self.out = nn.Sequential(ChannelNorm(w1), act(), nn.Conv2d(w1, (3 + BANDS) * PATCH**2, 3, padding=1))
        for ending in self.out[-1].parameters():
            nn.init.zeros_(ending)

    def forward(self, x_t: Tensor, labels: Tensor, time: Tensor) -> Tensor:
        """Map x_t (B, 3, 64, 64), labels (B, 24) and t / T (B,) to the objective's quantity (B, 3, 64, 64)."""
        condition = self.act(self.time(time) + self.label_set(labels))
        present = torch.cat((labels.new_ones(len(labels), 1), labels), 1) > 0

        def look(x: Tensor, where: str) -> Tensor:
            return self.look[where](x, self.tokens, present)  # type: ignore[no-any-return]

        x16 = look(self.down[0](self.stem(_patches(x_t)), condition), "down 16")  # (B, w1, 16, 16)
        x8 = self.down[1](self.shrink(x16) + self.where, condition)  # (B, w2, 8, 8)
        x = look(self.block(look(x8, "down 8"), condition), "middle 8")
        x = look(self.up[0](torch.cat((x, x8), 1), condition), "up 8")
        x = look(self.up[1](torch.cat((self.grow(x), x16), 1), condition), "up 16")  # (B, w1, 16, 16)
        out = _pixels(self.out(x).float())  # (B, 3 + BANDS, 64, 64)
        painted = out[:, :3]
        for gate, band in zip(out[:, 3:].chunk(BANDS, 1), self.detail(x_t), strict=True):
            painted = torch.addcmul(painted, gate, band)
        return painted


# Of an empty batch, which a process may get as its share of a small one, torch's two functions return the shape unchanged.
def _patches(x: Tensor) -> Tensor:
    """Return (B, C, H, W) as (B, C * PATCH^2, H / PATCH, W / PATCH)."""
    batch, channels, height, width = x.shape
    return F.pixel_unshuffle(x, PATCH) if batch else x.reshape(0, channels * PATCH**2, height // PATCH, width // PATCH)


def _pixels(x: Tensor) -> Tensor:
    """Return (B, C * PATCH^2, H, W) as (B, C, H * PATCH, W * PATCH)."""
    batch, channels, height, width = x.shape
    return F.pixel_shuffle(x, PATCH) if batch else x.reshape(0, channels // PATCH**2, height * PATCH, width * PATCH)
