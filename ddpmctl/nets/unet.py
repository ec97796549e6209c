"""Our U-Net: a grid of 16x16 patches, and attention to one token per object.

Objects of i-CLEVR are about 10 of 64 pixels wide, so the network works at 16x16 and 8x8; at other sizes, the patches are larger or smaller.
The time and the label set
condition every block through adaptive norm (Dhariwal & Nichol 2021, eq. 4). Learned gates add three frequency
bands of the input to the output, so that details need not pass through the network.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpmctl.config import ModelConfig
from ddpmctl.iclevr import ICLEVR
from ddpmctl.registry import ACTIVATIONS, NETWORKS
from ddpmctl.task import Task

GRID = 16  # patches on a side, at every size of the images: what decides the objects costs the same
GATES = 3  # frequency bands of the input, each with one gate per pixel
HEAD = 32  # channels per attention head, at most


class TimeEmbedding(nn.Module):
    """Sinusoidal embedding of t / T with geometric frequencies (Vaswani et al. 2017, section 3.5)."""

    frequencies: Tensor

    def __init__(self, features: int) -> None:
        """Use ``features / 2`` frequencies between 1 and 1000 radians."""
        super().__init__()
        # On the CPU also where shapes are checked on the device "meta": there, such functions import sympy and torch.compile, over a second.
        self.register_buffer("frequencies", torch.logspace(0, 3, features // 2, device="cpu"), persistent=False)

    def forward(self, time: Tensor) -> Tensor:
        """Map (B,) to (B, features)."""
        angle = time.float()[:, None] * self.frequencies
        return torch.cat((angle.sin(), angle.cos()), 1)


class ChannelNorm(nn.Module):
    """Layer norm over the channels of each position (Ba et al. 2016), on maps (B, C, H, W).

    In channels_last it is three times as fast as group norm on a CPU.
    """

    def __init__(self, channels: int, *, affine: bool = True) -> None:
        """Create scale and shift if ``affine``."""
        super().__init__()
        self.channels = channels
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape and dtype; autocast would use float32, with twice the memory traffic."""
        weight, bias = (None if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x.permute(0, 2, 3, 1), (self.channels,), weight, bias).permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """Two times norm, activation, conv; the condition scales and shifts the second norm."""

    def __init__(self, in_channels: int, out_channels: int, condition: int, act: type[nn.Module]) -> None:
        """Initialise as the identity: the last convolution is zero."""
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
    """Attention of each position to the tokens of the requested objects and, with ``places``, to all positions.

    Tokens and positions have separate softmaxes, so that they do not compete.
    """

    def __init__(self, channels: int, token_channels: int, *, places: bool) -> None:
        """Initialise as the identity: the projection is zero."""
        super().__init__()
        self.heads = channels // math.gcd(channels, HEAD)
        self.norm = ChannelNorm(channels)
        self.query = nn.Linear(channels, channels)
        self.label_kv = nn.Linear(token_channels, 2 * channels)
        self.place_kv = nn.Linear(channels, 2 * channels) if places else None
        self.project = nn.Linear(channels, channels)
        nn.init.zeros_(self.project.weight)

    def forward(self, x: Tensor, tokens: Tensor, present: Tensor) -> Tensor:
        """Map x (B, C, H, W), tokens (1 + C, K) and their mask ``present`` (B, 1 + C) to (B, C, H, W)."""
        here = self.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        query = self.query(here)
        out = attend_both_ways(query, self.label_kv(tokens).expand(x.shape[0], -1, -1), self.heads, present)
        if self.place_kv is not None:
            out = out + attend(query, self.place_kv(here), self.heads)
        return x + self.project(out).transpose(1, 2).reshape(x.shape)  # type: ignore[no-any-return]


def attend(query: Tensor, key_value: Tensor, heads: int) -> Tensor:
    """Return multi-head attention (Vaswani et al. 2017, eq. 1): queries (B, N, C), keys and values (B, M, 2 C) -> (B, N, C).

    With so few positions this is faster on a CPU than the fused kernel, whose backward pass is slow.
    """
    logits, value = _logits(query, key_value, heads)
    return _joined(logits.softmax(3) @ value)


def attend_both_ways(query: Tensor, key_value: Tensor, heads: int, visible: Tensor) -> Tensor:
    """Return attention as ``attend`` does, but half of the heads (rounded down) take the softmax over the N queries.

    With positions as queries and objects as keys, each object then divides a fixed weight among the positions, so
    the network does not draw it twice. ``visible`` (B, M) masks the other keys.
    """
    logits, value = _logits(query, key_value, heads)
    visible, half = visible[:, None, None, :], heads - heads // 2  # (B, 1, 1, M)
    by_query = logits[:, :half].masked_fill(~visible, -torch.inf).softmax(3)
    by_key = logits[:, half:].softmax(2) * visible * math.sqrt(logits.shape[2])  # keep the scale independent of N
    return _joined(torch.cat((by_query, by_key), 1).to(value.dtype) @ value)


def _logits(query: Tensor, key_value: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Return the scaled dot products (B, heads, N, M) and the values (B, heads, M, C / heads)."""
    key, value = key_value.chunk(2, 2)
    q, k, v = (z.reshape(*z.shape[:2], heads, z.shape[2] // heads).transpose(1, 2) for z in (query, key, value))
    return q @ k.transpose(2, 3) / math.sqrt(q.shape[3]), v


def _joined(heads: Tensor) -> Tensor:
    """Concatenate the heads (B, heads, N, C / heads) to (B, N, C)."""
    return heads.transpose(1, 2).flatten(2)


class Detail(nn.Module):
    """Split an image into three frequency bands whose sum is the image: the a trous wavelet transform (Holschneider et al. 1989)."""

    kernel: Tensor

    def __init__(self) -> None:
        """Create the binomial kernel (1, 2, 1) in both directions, for each colour channel."""
        super().__init__()
        line = torch.tensor([1.0, 2.0, 1.0], device="cpu") / 4  # see ``TimeEmbedding``
        self.register_buffer("kernel", torch.outer(line, line).expand(3, 1, 3, 3).clone(), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map (B, 3, H, W) to the high, middle and low band, each of the same shape."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            once = self._blur(x, 1)
            twice = self._blur(once, 2)
        return x - once, once - twice, twice

    def add_to(self, out: Tensor, x: Tensor) -> Tensor:
        """Return an image (B, 3, H, W) plus the bands of ``x``, each times its gate: ``out`` (B, 3 + GATES, H, W) holds the image and the gates."""
        image = out[:, :3]
        for gate, band in zip(out[:, 3:].chunk(GATES, 1), self(x), strict=True):
            image = torch.addcmul(image, gate, band)
        return image

    def _blur(self, x: Tensor, spread: int) -> Tensor:
        padded = F.pad(x, (spread,) * 4, mode="replicate")
        return F.conv2d(padded, self.kernel, groups=3, dilation=spread)


@NETWORKS.register("unet")
class UNet(nn.Module):
    """ours: 16x16 patches, residual blocks with adaptive norm, attention to label tokens at 16x16 and 8x8."""

    def __init__(self, config: ModelConfig, task: Task = ICLEVR) -> None:
        """Build it with ``config.width`` channels at 16x16 and twice as many at 8x8."""
        super().__init__()
        act = ACTIVATIONS.get(config.act)
        w1, w2 = config.width, 2 * config.width
        condition, self.patch = w2, task.size // GRID
        self.time = nn.Sequential(TimeEmbedding(64), nn.Linear(64, condition), act(), nn.Linear(condition, condition))
        self.label_set = nn.Linear(task.columns, condition)
        self.tokens = nn.Parameter(torch.randn(1 + task.columns, w2, device="cpu"))  # the first token means "no object"
        self.where = nn.Parameter(torch.zeros(1, w2, GRID // 2, GRID // 2))  # position embedding
        self.act = act()
        self.stem = nn.Conv2d(3 * self.patch**2, w1, 3, padding=1)
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
        self.out = nn.Sequential(ChannelNorm(w1), act(), nn.Conv2d(w1, (3 + GATES) * self.patch**2, 3, padding=1))
        for parameter in self.out[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x_t: Tensor, labels: Tensor, time: Tensor) -> Tensor:
        """Map x_t (B, 3, H, W), labels (B, C) and t / T (B,) to the objective's quantity (B, 3, H, W)."""
        condition = self.act(self.time(time) + self.label_set(labels))
        present = torch.cat((labels.new_ones(labels.shape[0], 1), labels), 1) > 0

        def look(x: Tensor, where: str) -> Tensor:
            return self.look[where](x, self.tokens, present)  # type: ignore[no-any-return]

        x16 = look(self.down[0](self.stem(patches(x_t, self.patch)), condition), "down 16")  # (B, w1, 16, 16)
        x8 = self.down[1](self.shrink(x16) + self.where, condition)  # (B, w2, 8, 8)
        x = look(self.block(look(x8, "down 8"), condition), "middle 8")
        x = look(self.up[0](torch.cat((x, x8), 1), condition), "up 8")
        x = look(self.up[1](torch.cat((self.grow(x), x16), 1), condition), "up 16")  # (B, w1, 16, 16)
        out = pixels(self.out(x).float(), self.patch)  # (B, 3 + GATES, H, W)
        return self.detail.add_to(out, x_t)


# A rank's share may be empty. For an empty batch, torch's pixel_shuffle and pixel_unshuffle return the shape unchanged.
def patches(x: Tensor, size: int) -> Tensor:
    """Return (B, C, H, W) as (B, C * size^2, H / size, W / size)."""
    batch, channels, height, width = x.shape
    return F.pixel_unshuffle(x, size) if batch else x.reshape(0, channels * size**2, height // size, width // size)


def pixels(x: Tensor, size: int) -> Tensor:
    """Return (B, C * size^2, H, W) as (B, C, H * size, W * size)."""
    batch, channels, height, width = x.shape
    return F.pixel_shuffle(x, size) if batch else x.reshape(0, channels // size**2, height * size, width * size)
