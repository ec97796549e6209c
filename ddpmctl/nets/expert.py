"""A small denoiser at full resolution, which corrects the output of a larger network where there is little noise."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from ddpmctl.nets.wiener import blur_matrices, cosine_levels

LOW_NOISE = 0.05  # of t / T; from here on, the noise is above 11 of 256 grey levels, and the expert does not help. Measured in docs/experiments.md
OCTAVES = 7  # of t / T below LOW_NOISE in which the expert is trained, equally in each; noise is then from 0.5 to 11 grey levels
CHANNELS = 16
LAYERS = 4


class LowNoiseExpert(nn.Module):
    """Correct x0_hat at low noise by a few convolutions at full resolution (an expert denoiser for some noise levels; Balaji et al. 2022).

    A network in patches of 2x2 pixels has other weights for each pixel of a patch. Here all pixels share them, so that few training images are enough to
    learn where a surface is smooth, and how strong the grain is at each brightness. The input is the noise in x_t if x0_hat is right, and x0_hat less its
    average over 7 pixels, both divided by sigma; the colours; and log sigma.
    """

    long: Tensor

    def __init__(self, size: int, act: type[nn.Module]) -> None:
        """Initialise as the identity: the last convolution is zero."""
        super().__init__()
        widths = [3 * 3 + 1, *[CHANNELS] * (LAYERS - 1), 3]
        layers = [nn.Conv2d(before, after, 3, padding=1) for before, after in itertools.pairwise(widths)]
        for parameter in layers[-1].parameters():
            nn.init.zeros_(parameter)
        self.layers = nn.ModuleList(layers)
        self.act = act()
        self.register_buffer("long", blur_matrices(size)[1], persistent=False)

    def forward(self, x0_hat: Tensor, x_t: Tensor, time: Tensor) -> Tensor:
        """Return the corrected x0_hat, (B, 3, H, W) in float32, given x0_hat and x_t, (B, 3, H, W), and t / T, (B,)."""
        with torch.autocast(x_t.device.type, enabled=False):
            signal, log_sigma = (level[:, None, None, None] for level in cosine_levels(time.float()))
            sigma = log_sigma.exp()
            left = (x_t.float() / signal - x0_hat) / sigma
            detail = torch.asinh((x0_hat - self.long @ x0_hat.contiguous() @ self.long.T) / sigma)  # small differences stay exact in bf16
            seen = torch.cat((left, detail, 4 * x0_hat, (log_sigma / 2 + 2).expand_as(x0_hat[:, :1])), 1)
        x = self.act(self.layers[0](seen.contiguous(memory_format=torch.channels_last)))
        for layer in self.layers[1:-1]:
            x = x + self.act(layer(x))
        change = self.layers[-1](x)
        with torch.autocast(x_t.device.type, enabled=False):
            return torch.addcmul(x0_hat, sigma, change.float())


def only_at_low_noise(expert: LowNoiseExpert, x0_hat: Tensor, x_t: Tensor, time: Tensor) -> Tensor:
    """Return x0_hat, (B, 3, H, W), corrected by ``expert`` for the images with t / T below ``LOW_NOISE``, and unchanged for the others.

    On a CPU, the expert is called for these images only. On a GPU, choosing them would wait for it, and a recorded or exported graph cannot choose.
    """
    low = time < LOW_NOISE
    if x_t.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.where(low[:, None, None, None], expert(x0_hat, x_t, time), x0_hat)
    rows = low.nonzero()[:, 0]
    if not len(rows) and not expert.training:
        return x0_hat
    # In training, it is called for no image too: data parallelism waits for the gradients of all parameters.
    return x0_hat.index_copy(0, rows, expert(x0_hat[rows], x_t[rows], time[rows]))
