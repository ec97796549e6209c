"""A U-Net in 2x2 patches whose encoder learns to recognise the objects, and whose output x_t corrects.

In patches of 4x4 pixels, as in ``unet``, an object looks different at each of 16 offsets, and its edges become coarse. Here the image
enters and leaves in patches of 2x2 pixels, with few channels. The encoder does not see the labels: it learns which objects x_t
shows, and attention compares them with the requested ones.

The layers need not reproduce what x_t shows. They give each pixel an estimate of x0 and, in three frequency bands, how far off and in which
direction of colour it may be; ``WienerFilter`` corrects the estimate by x_t.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ddpmctl.config import ModelConfig
from ddpmctl.nets.unet import BANDS, CLASSES, HEAD, ChannelNorm, TimeEmbedding
from ddpmctl.nets.wiener import WienerFilter
from ddpmctl.registry import ACTIVATIONS, NETWORKS

PATCH = 2
FIRST_LOG_ERROR = -3.0  # log of the estimate's error at first, in grey levels from -1 to 1
FIRST_SHIFT = 0.03  # in brightness at first; at 0, it would have no gradient


class FineBlock(nn.Module):
    """Conv, norm that the condition scales and shifts, activation, conv: half the norms of ``unet``'s blocks, which are slow on a CPU."""

    def __init__(self, in_channels: int, out_channels: int, condition: int, act: type[nn.Module]) -> None:
        """Initialise as the identity: the last convolution is zero."""
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.norm, self.act = ChannelNorm(out_channels, affine=False), act()
        self.modulation = nn.Linear(condition, 2 * out_channels)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.modulation.weight)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map x (B, in, H, W) and the condition (B, C) to (B, out, H, W)."""
        scale, shift = self.modulation(condition)[:, :, None, None].chunk(2, 1)
        h = self.conv2(self.act(torch.addcmul(shift, self.norm(self.conv1(x)), 1 + scale)))
        return self.skip(x) + h  # type: ignore[no-any-return]


class Look(nn.Module):
    """Attention of each position to all positions and to the tokens of the requested objects (Vaswani et al. 2017, eq. 1).

    Half of the heads (rounded down) let objects choose positions: the softmax over the positions makes each object divide a fixed weight
    among them, so the network does not draw it twice. Tokens and positions have separate softmaxes, so that they do not compete.
    """

    def __init__(self, channels: int) -> None:
        """Initialise as the identity: the projection is zero."""
        super().__init__()
        self.heads = channels // math.gcd(channels, HEAD)
        self.norm = ChannelNorm(channels)
        self.query_key_value = nn.Linear(channels, 3 * channels)
        self.token_key_value = nn.Linear(channels, 2 * channels)
        self.project = nn.Linear(channels, channels)
        nn.init.zeros_(self.project.weight)

    def forward(self, x: Tensor, tokens: Tensor, present: Tensor) -> Tensor:
        """Map x (B, C, H, W), tokens (M, C) and their mask ``present`` (B, M) to (B, C, H, W)."""
        (batch, channels, height, width), size = x.shape, x.shape[1] // self.heads
        here = self.norm(x).permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        query, key, value = self.query_key_value(here).view(batch, height * width, 3, self.heads, size).permute(2, 0, 3, 1, 4)  # (B, heads, HW, size) each
        token_key, token_value = self.token_key_value(tokens).view(len(tokens), 2, self.heads, size).permute(1, 2, 0, 3)  # (heads, M, size) each
        query = query / math.sqrt(size)
        out = (query @ key.transpose(2, 3)).softmax(3).to(value.dtype) @ value
        logits, visible, half = (query @ token_key.transpose(1, 2)).float(), present[:, None, None, :], self.heads - self.heads // 2
        by_position = logits[:, :half].masked_fill(~visible, -torch.inf).softmax(3)
        by_object = logits[:, half:].softmax(2) * visible * math.sqrt(height * width)  # keeps the scale independent of the number of positions
        out = out + torch.cat((by_position, by_object), 1).to(value.dtype) @ token_value
        out = self.project(out.transpose(1, 2).reshape(batch, height * width, channels))
        return x + out.transpose(1, 2).reshape(x.shape)  # type: ignore[no-any-return]


@NETWORKS.register("fine-unet")
class FineUNet(nn.Module):
    """ours, finer: 2x2 patches and blocks at 32x32, 16x16 and 8x8; names the objects that it sees; x_t corrects its estimate."""

    objectives = ("x0",)

    def __init__(self, config: ModelConfig) -> None:
        """Build it with ``config.width`` channels at 16x16, half as many at 32x32 and twice as many at 8x8."""
        super().__init__()
        act = ACTIVATIONS.get(config.act)
        w32, w16, w8 = config.width // 2, config.width, 2 * config.width
        self.time = nn.Sequential(TimeEmbedding(64), nn.Linear(64, w8), act(), nn.Linear(w8, w8))
        self.label_set = nn.Linear(CLASSES, w8)
        self.tokens = nn.Parameter(torch.randn(1 + CLASSES, w8, device="cpu"))  # the first token means "no object"
        self.where = nn.Parameter(torch.zeros(1, w8, 8, 8))  # position embedding
        self.mean = nn.Parameter(torch.zeros(1, 3, 64, 64))  # of the training images at first; see ``centre``
        self.act = act()
        self.stem = nn.Conv2d(3 * PATCH**2, w32, 3, padding=1)
        self.down = nn.ModuleList(FineBlock(w, w, w8, act) for w in (w32, w16, w8))
        self.shrink = nn.ModuleList(nn.Conv2d(before, after, 3, stride=2, padding=1) for before, after in ((w32, w16), (w16, w8)))
        self.recognise = nn.Conv2d(w8, CLASSES, 1)
        self.look = nn.ModuleList(Look(w8) for _ in range(3))
        self.block = FineBlock(w8, w8, w8, act)
        self.up = nn.ModuleList(FineBlock(before, after, w8, act) for before, after in ((2 * w8, w8), (2 * w16, w16), (w32, w32)))
        self.grow16 = nn.Sequential(nn.Conv2d(w8, w16, 1), nn.Upsample(scale_factor=2))
        self.grow32 = nn.Conv2d(w16, w32 * PATCH**2, 1)
        self.out = nn.Sequential(ChannelNorm(w32), act(), nn.Conv2d(w32, (3 + BANDS + 3 * BANDS) * PATCH**2, 3, padding=1))
        self.filter = WienerFilter()
        for parameter in self.out[-1].parameters():
            nn.init.zeros_(parameter)

    @torch.no_grad()
    def centre(self, mean: Tensor) -> None:
        """Let the estimate start at the training images' mean, (3, 64, 64), which otherwise takes a tenth of a short run to learn."""
        self.mean.copy_(mean)

    def forward(self, x_t: Tensor, labels: Tensor, time: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Map x_t (B, 3, 64, 64), labels (B, 24) and t / T (B,) to x0_hat (B, 3, 64, 64).

        In training mode, return with it the logits of the objects that the encoder sees, (B, 24).
        """
        when = self.time(time)
        condition = self.act(when + self.label_set(labels))
        present = torch.cat((labels.new_ones(len(labels), 1), labels), 1) > 0
        x32, x16, x8 = self._encode(x_t, self.act(when))
        x = self.block(self.look[0](x8, self.tokens, present), condition)
        x = self.up[0](torch.cat((self.look[1](x, self.tokens, present), x8), 1), condition)
        x = self.up[1](torch.cat((self.grow16(self.look[2](x, self.tokens, present)), x16), 1), condition)
        x = self.up[2](x32 + from_patches(self.grow32(x)), condition)
        pixels = from_patches(self.out(x)).to(torch.float32, memory_format=torch.contiguous_format)
        estimate, log_error, shift = torch.split(pixels, [3, BANDS, 3 * BANDS], 1)
        x0_hat: Tensor = self.filter(self.mean + estimate, FIRST_LOG_ERROR + log_error, FIRST_SHIFT + shift, x_t, time)
        return (x0_hat, self._seen(x8)) if self.training else x0_hat

    def name_objects(self, x_t: Tensor, time: Tensor) -> Tensor:
        """Return the logits of the objects that the encoder sees in x_t (B, 3, 64, 64) at t / T (B,), (B, 24); it does not know the labels."""
        return self._seen(self._encode(x_t, self.act(self.time(time)))[2])

    def _encode(self, x_t: Tensor, unlabelled: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the features at 32x32, 16x16 and 8x8: (B, w32, 32, 32), (B, w16, 16, 16), (B, w8, 8, 8)."""
        x32 = self.down[0](self.stem(to_patches(x_t)), unlabelled)
        x16 = self.down[1](self.shrink[0](x32), unlabelled)
        return x32, x16, self.down[2](self.shrink[1](x16) + self.where, unlabelled)

    def _seen(self, x8: Tensor) -> Tensor:
        """Return for each class the logarithm of the mean over all positions of exp(logit): high if the class is seen anywhere."""
        logits: Tensor = self.recognise(x8).float().flatten(2)  # (B, 24, 64)
        return logits.logsumexp(2) - math.log(logits.shape[2])


def to_patches(x: Tensor) -> Tensor:
    """Map (B, C, H, W) to (B, 4 C, H / 2, W / 2), with the channels of a pixel side by side; faster than pixel_unshuffle in channels_last."""
    (batch, channels, height, width), side = x.shape, PATCH
    x = x.permute(0, 2, 3, 1).reshape(batch, height // side, side, width // side, side, channels)
    return x.transpose(2, 3).reshape(batch, height // side, width // side, side**2 * channels).permute(0, 3, 1, 2)


def from_patches(x: Tensor) -> Tensor:
    """Map (B, 4 C, H, W) to (B, C, 2 H, 2 W); the inverse of ``to_patches``."""
    (batch, channels, height, width), side = x.shape, PATCH
    x = x.permute(0, 2, 3, 1).reshape(batch, height, width, side, side, channels // side**2)
    return x.transpose(2, 3).reshape(batch, side * height, side * width, channels // side**2).permute(0, 3, 1, 2)
