"""A U-Net in 2x2 patches whose encoder learns to recognise the objects, and whose output x_t corrects.

In patches of 4x4 pixels, as in ``unet``, an object looks different at each of 16 offsets, and its edges become coarse. Here the image
enters and leaves in patches of 2x2 pixels, with few channels. The encoder does not see the labels: it learns which objects x_t
shows, and attention compares them with the requested ones.

The layers need not reproduce what x_t shows. They give each pixel an estimate of x0 and, in five frequency bands, how far off and in which
direction of colour it may be; ``WienerFilter`` corrects the estimate by x_t. The correction is linear, so noise of x_t remains along edges; a last block,
which sees the corrected estimate and what is left of x_t, takes it out. At low noise, a ``LowNoiseExpert`` corrects the result at full resolution.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from ddpmctl.config import ModelConfig
from ddpmctl.iclevr import ICLEVR
from ddpmctl.nets.expert import LowNoiseExpert, only_at_low_noise
from ddpmctl.nets.recognition import FoundObjects, ObjectCount, seen_anywhere
from ddpmctl.nets.unet import HEAD, ChannelNorm, TimeEmbedding
from ddpmctl.nets.wiener import BANDS, WienerFilter, cosine_levels
from ddpmctl.registry import ACTIVATIONS, NETWORKS
from ddpmctl.task import Task

PATCH = 2
MOST_CELLS = 64  # on a side of the finest level; larger images have larger patches
FEWEST_CELLS = 12  # on a side of the coarsest level, at most: there, objects are decided
FEWEST_CHANNELS = 8
FIRST_LOG_ERROR = -3.0  # log of the size of the estimate's error at first, in grey levels from -1 to 1
FIRST_DIRECTION = (1.0, 0.0, 0.0)  # of the error in grey and the other opponent colours at first, over its size; at 0, it would have no gradient


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
    """ours, finer: 2x2 patches and blocks from half of the size down to 8x8; names the objects that it sees; x_t corrects its estimate."""

    first_direction: Tensor
    objectives = ("x0",)
    estimates_errors = True

    def __init__(self, config: ModelConfig, task: Task = ICLEVR) -> None:
        """Build the network. The coarsest level has 2 * ``config.width`` channels; each finer level has half as many, but at least ``config.width`` / 2."""
        super().__init__()
        act = ACTIVATIONS.get(config.act)
        self.patch, sides = levels(task.size)
        top = 2 * config.width
        widths = [max(FEWEST_CHANNELS, top // 4, top >> step) for step in reversed(range(len(sides)))]  # finest level first, as ``sides``
        finest = widths[0]
        self.sides, pairs = sides, list(itertools.pairwise(widths))
        self.time = nn.Sequential(TimeEmbedding(64), nn.Linear(64, top), act(), nn.Linear(top, top))
        self.label_set = nn.Linear(task.columns, top)
        self.tokens = nn.Parameter(torch.randn(1 + task.columns, top, device="cpu"))  # the first token means "no object"
        self.where = nn.Parameter(torch.zeros(1, top, sides[-1], sides[-1]))  # position embedding
        self.mean = nn.Parameter(torch.zeros(1, *task.image_shape))  # of the training images at first; see ``centre``
        self.act = act()
        self.stem = nn.Conv2d(3 * self.patch**2, finest, 3, padding=1)
        self.down = nn.ModuleList(FineBlock(w, w, top, act) for w in widths)
        self.shrink = nn.ModuleList(nn.Conv2d(fine, coarse, 3, stride=2, padding=1) for fine, coarse in pairs)
        self.recognise = nn.Conv2d(top, task.columns, 1)
        self.count = ObjectCount(top, act)
        self.look = nn.ModuleList(Look(top) for _ in range(3))
        self.block = FineBlock(top, top, top, act)
        self.up = nn.ModuleList(FineBlock(2 * w if step else w, w, top, act) for step, w in reversed(list(enumerate(widths))))
        for side, (fine, coarse) in zip(reversed(sides[1:-1]), reversed(pairs[1:]), strict=True):
            self.add_module(f"grow{side}", nn.Sequential(nn.Conv2d(coarse, fine, 1), nn.Upsample(scale_factor=2)))
        self.add_module(f"grow{sides[0]}", nn.Conv2d(widths[1], finest * PATCH**2, 1))
        self.out = nn.Sequential(ChannelNorm(finest), act(), nn.Conv2d(finest, (3 + 2 * 3 * BANDS) * self.patch**2, 3, padding=1))
        self.filter = WienerFilter(task.size)
        self.register_buffer("first_direction", torch.tensor(FIRST_DIRECTION * BANDS, device="cpu").view(1, -1, 1, 1), persistent=False)
        self.corrected_in = nn.Conv2d(2 * 3 * self.patch**2, finest, 1)
        self.refine = FineBlock(finest, finest, top, act)
        self.change_out = nn.Sequential(act(), nn.Conv2d(finest, 3 * self.patch**2, 3, padding=1))
        self.expert = LowNoiseExpert(task.size, act)
        for parameter in (*self.out[-1].parameters(), *self.change_out[-1].parameters()):
            nn.init.zeros_(parameter)

    @torch.no_grad()
    def centre(self, mean: Tensor) -> None:
        """Let the estimate start at the training images' mean, (3, H, W), which otherwise takes a tenth of a short run to learn."""
        self.mean.copy_(mean)

    def forward(self, x_t: Tensor, labels: Tensor, time: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Map x_t (B, 3, H, W), labels (B, C) and t / T (B,) to x0_hat (B, 3, H, W).

        In training mode, return x0_hat before the expert, the logits of the objects that the encoder sees, (B, C), the estimate of x0 before the correction,
        its expected errors as ``WienerFilter`` takes them, log s and v, (B, 3 * BANDS, H, W) each, x0_hat after the expert, whose gradient goes
        to the expert only, and the number of objects that x_t shows, (B,), whose gradient goes to ``ObjectCount`` only.
        """
        when = self.time(time)
        condition = self.act(when + self.label_set(labels))
        present = torch.cat((labels.new_ones(labels.shape[0], 1), labels), 1) > 0
        finest, *between, coarsest = self._encode(x_t, self.act(when))
        x = self.block(self.look[0](coarsest, self.tokens, present), condition)
        x = self.up[0](torch.cat((self.look[1](x, self.tokens, present), coarsest), 1), condition)
        x = self.look[2](x, self.tokens, present)
        for side, up, skip in zip(reversed(self.sides[1:-1]), self.up[1:], reversed(between), strict=False):
            x = up(torch.cat((self.get_submodule(f"grow{side}")(x), skip), 1), condition)
        x = self.up[-1](finest + from_patches(self.get_submodule(f"grow{self.sides[0]}")(x)), condition)
        pixels = from_patches(self.out(x), self.patch).to(torch.float32, memory_format=torch.contiguous_format)
        estimate, log_error, direction = torch.split(pixels, [3, 3 * BANDS, 3 * BANDS], 1)
        estimate, log_error, direction = self.mean + estimate, FIRST_LOG_ERROR + log_error, self.first_direction + direction
        x0_hat = self._refine(self.filter(estimate, log_error, direction, x_t, time), x, x_t, time, condition)
        if not self.training:
            return only_at_low_noise(self.expert, x0_hat, x_t, time)
        by_expert = only_at_low_noise(self.expert, x0_hat.detach(), x_t, time)
        seen, number = seen_anywhere(self.recognise(coarsest).float()), self.count(coarsest.detach())
        return x0_hat, seen, estimate, log_error, direction, by_expert, number

    def _refine(self, corrected: Tensor, x: Tensor, x_t: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        """Return the corrected estimate plus a change, which is small where x_t has little noise; x are the features of the finest level.

        The block sees the estimate and the noise that x_t would contain if it were right. It changes no low frequencies: else, over the steps of a
        sampler, colours and brightness drift.
        """
        with torch.autocast(x_t.device.type, enabled=False):
            signal, log_sigma = (level[:, None, None, None] for level in cosine_levels(time.float()))
            sigma = log_sigma.exp()
            both = torch.cat((corrected, (x_t.float() / signal - corrected) / sigma), 1).to(x.dtype)
        change = self.change_out(self.refine(x + self.corrected_in(to_patches(both, self.patch)), condition))
        change = from_patches(change, self.patch).to(torch.float32, memory_format=torch.contiguous_format)
        with torch.autocast(x_t.device.type, enabled=False):
            change = change - self.filter.low(change)
        return torch.addcmul(corrected, sigma / (1 + sigma.square()), change)

    def find_objects(self, x_t: Tensor, time: Tensor) -> FoundObjects:
        """Return which objects x_t (B, 3, H, W) at t / T (B,) shows in each cell of the coarsest level, and how many. The encoder does not know the labels.

        The number is trained at low noise only, t / T below ``COUNTED_BELOW`` of ``ddpmctl/diffusion/denoiser.py``.
        """
        coarsest = self._encode(x_t, self.act(self.time(time)))[-1]
        return FoundObjects(self.recognise(coarsest).float(), self.count(coarsest))

    def _encode(self, x_t: Tensor, unlabelled: Tensor) -> list[Tensor]:
        """Return the features of every level, the finest first."""
        features = [self.down[0](self.stem(to_patches(x_t, self.patch)), unlabelled)]
        for shrink, down in zip(self.shrink, self.down[1:], strict=True):
            x = shrink(features[-1])
            features.append(down(x + self.where if down is self.down[-1] else x, unlabelled))
        return features


def levels(size: int) -> tuple[int, list[int]]:
    """Return the side of a patch, and the cells on a side of every level, finest first: 2 and 32, 16, 8 for images of 64x64.

    A level is half of the one before, until it has at most 12x12 cells: objects are decided there at the same cost at every size, and
    larger images have more levels above it (32: 16, 8; 96: 48, 24, 12; 128: 64, 32, 16, 8; 256: the same in 4x4 patches).
    """
    patch = max(PATCH, size // MOST_CELLS)
    sides = [size // patch]
    while sides[-1] > FEWEST_CELLS:
        sides.append(sides[-1] // 2)
    return patch, sides


def to_patches(x: Tensor, side: int = PATCH) -> Tensor:
    """Map (B, C, H, W) to (B, side^2 C, H / side, W / side), with the channels of a pixel side by side; faster than pixel_unshuffle in channels_last."""
    batch, channels, height, width = x.shape
    x = x.permute(0, 2, 3, 1).reshape(batch, height // side, side, width // side, side, channels)
    return x.transpose(2, 3).reshape(batch, height // side, width // side, side**2 * channels).permute(0, 3, 1, 2)


def from_patches(x: Tensor, side: int = PATCH) -> Tensor:
    """Map (B, side^2 C, H, W) to (B, C, side H, side W); the inverse of ``to_patches``."""
    batch, channels, height, width = x.shape
    x = x.permute(0, 2, 3, 1).reshape(batch, height, width, side, side, channels // side**2)
    return x.transpose(2, 3).reshape(batch, side * height, side * width, channels // side**2).permute(0, 3, 1, 2)
