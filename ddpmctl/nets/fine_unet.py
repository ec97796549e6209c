"""``unet`` with a level at 32x32, whose encoder is trained to recognise the objects.

In patches of 4x4 pixels, one object looks different at each of 16 offsets, and its edges become coarse. Here the image enters and leaves
in patches of 2x2 pixels, with few channels. The encoder does not see the labels: it learns which objects x_t shows, and attention
compares them with the requested ones.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ddpmctl.config import ModelConfig
from ddpmctl.nets.unet import BANDS, CLASSES, ChannelNorm, Detail, LabelAttention, ResidualBlock, TimeEmbedding, patches, pixels
from ddpmctl.registry import ACTIVATIONS, NETWORKS

PATCH = 2


@NETWORKS.register("fine-unet")
class FineUNet(nn.Module):
    """ours, finer: 2x2 patches and blocks at 32x32, 16x16 and 8x8; in training, the encoder also names the objects that it sees."""

    recognises = True

    def __init__(self, config: ModelConfig) -> None:
        """Build it with ``config.width`` channels at 16x16, half as many at 32x32 and twice as many at 8x8."""
        super().__init__()
        act = ACTIVATIONS.get(config.act)
        w32, w16, w8 = config.width // 2, config.width, 2 * config.width
        self.time = nn.Sequential(TimeEmbedding(64), nn.Linear(64, w8), act(), nn.Linear(w8, w8))
        self.label_set = nn.Linear(CLASSES, w8)
        self.tokens = nn.Parameter(torch.randn(1 + CLASSES, w8))  # the first token means "no object"
        self.where = nn.Parameter(torch.zeros(1, w8, 8, 8))  # position embedding
        self.mean = nn.Parameter(torch.zeros(1, 3, 64, 64))  # of the training images at first; see ``centre``
        self.act = act()
        self.stem = nn.Conv2d(3 * PATCH**2, w32, 3, padding=1)
        self.down = nn.ModuleList(ResidualBlock(w, w, w8, act) for w in (w32, w16, w8))
        self.shrink = nn.ModuleList(nn.Conv2d(w, 2 * w, 3, stride=2, padding=1) for w in (w32, w16))
        self.recognise = nn.Conv2d(w8, CLASSES, 1)
        self.look = nn.ModuleList(LabelAttention(w8, w8, places=True) for _ in range(3))
        self.block = ResidualBlock(w8, w8, w8, act)
        self.up = nn.ModuleList(ResidualBlock(before, after, w8, act) for before, after in ((2 * w8, w8), (2 * w16, w16), (w32, w32)))
        self.grow16 = nn.Sequential(nn.Conv2d(w8, w16, 1), nn.Upsample(scale_factor=2))
        self.grow32 = nn.Conv2d(w16, w32 * 2**2, 1)
        self.detail = Detail()
        self.out = nn.Sequential(ChannelNorm(w32), act(), nn.Conv2d(w32, (3 + BANDS) * PATCH**2, 3, padding=1))
        for parameter in self.out[-1].parameters():
            nn.init.zeros_(parameter)

    @torch.no_grad()
    def centre(self, mean: Tensor) -> None:
        """Let the output start at the training images' mean, (3, 64, 64), which otherwise takes a tenth of a short run to learn."""
        self.mean.copy_(mean)

    def forward(self, x_t: Tensor, labels: Tensor, time: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Map x_t (B, 3, 64, 64), labels (B, 24) and t / T (B,) to the objective's quantity (B, 3, 64, 64).

        In training mode, return with it the logits of the objects that the encoder sees, (B, 24).
        """
        when = self.time(time)
        unlabelled, condition = self.act(when), self.act(when + self.label_set(labels))
        present = torch.cat((labels.new_ones(len(labels), 1), labels), 1) > 0
        x32 = self.down[0](self.stem(patches(x_t, PATCH)), unlabelled)  # (B, w32, 32, 32)
        x16 = self.down[1](self.shrink[0](x32), unlabelled)
        x8 = self.down[2](self.shrink[1](x16) + self.where, unlabelled)  # (B, w8, 8, 8)
        x = self.block(self.look[0](x8, self.tokens, present), condition)
        x = self.up[0](torch.cat((self.look[1](x, self.tokens, present), x8), 1), condition)
        x = self.up[1](torch.cat((self.grow16(self.look[2](x, self.tokens, present)), x16), 1), condition)
        x = self.up[2](x32 + pixels(self.grow32(x), 2), condition)
        out = self.mean + self.detail.add_to(pixels(self.out(x).float(), PATCH), x_t)
        return (out, self._seen(x8)) if self.training else out

    def _seen(self, x8: Tensor) -> Tensor:
        """Return for each class the logarithm of the mean over all positions of exp(logit): high if the class is seen anywhere."""
        logits: Tensor = self.recognise(x8).float().flatten(2)  # (B, 24, 64)
        return logits.logsumexp(2) - math.log(logits.shape[2])
