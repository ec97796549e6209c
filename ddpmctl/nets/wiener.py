"""The posterior mean of an image, given an estimate of it, the estimate's error, and the noisy image."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

BANDS = 5  # of the filter; see ``WienerFilter.bands``
LATEST = 0.998  # of t / T: at 1, the cosine schedule has no signal at all
LEAST_SIGNAL = 0.05
# A network learns the variances of its errors on noised images. On its own samples, its errors are larger, and with the learned variances, samples are
# smoother than the data. Measured in docs/experiments.md.
SAMPLING_VARIANCE = 1.7  # factor of the variances in evaluation mode
SAMPLING_TIMES = (0.02, 0.6)  # lowest and highest t / T where it is used; lower, the grain would become too strong
# The variance that rounding [-1, 1] to 256 levels adds. The data were rounded, and samples will be: the estimate of the last step must leave room for it.
ROUNDING = (2 / 255) ** 2 / 12


class WienerFilter(nn.Module):
    """Correct an estimate of x0 by x_t: the posterior mean for Gaussian errors, in five frequency bands.

    With x_t / signal = x0 + sigma * eps and an estimate m, whose error in the three colours of a pixel has the covariance C, the mean of x0 given
    x_t is m + C (C + sigma^2)^-1 (x_t / signal - m) (Wiener 1949). At low noise it tends to x_t, so that grain and edges need not pass through
    the layers. C is s^2 I + u u^T: at an edge, a pixel may have either side's colour, and u lies along their difference. Without u, the
    correction would let noise of every colour pass there.

    Two of the bands are oriented: they hold vertical and horizontal lines. Where the position of an edge is uncertain, the errors of the pixels along it
    are correlated. The correction takes what they have in common, and hardly any of each pixel's own noise. With isotropic bands only, that noise
    remains, and edges become jagged.

    In evaluation mode, C is multiplied by ``SAMPLING_VARIANCE`` for t / T in ``SAMPLING_TIMES``: samples are then as sharp as the data. Also,
    sigma^2 is at least ``ROUNDING``, so that the grain of samples that are rounded is about as strong as that of the data.

    Signal and sigma are those of the cosine schedule (Nichol & Dhariwal 2021, eq. 17); with another one, the network learns the difference.
    """

    short: Tensor
    long: Tensor

    def __init__(self, size: int) -> None:
        """Create the transform that splits an image of ``size`` x ``size`` pixels into bands; nothing here is trained."""
        super().__init__()
        self.register_buffer("short", blur_matrix(size, 1), persistent=False)
        self.register_buffer("long", blur_matrix(size, 2) @ blur_matrix(size, 1), persistent=False)

    def forward(self, estimate: Tensor, log_error: Tensor, shift: Tensor, x_t: Tensor, time: Tensor) -> Tensor:
        """Return x0_hat (B, 3, H, W), in float32. It is fastest where each channel is contiguous.

        Args:
            estimate: m, (B, 3, H, W).
            log_error: log s in each band, in the order of ``bands``, (B, BANDS, H, W).
            shift: u in each band, (B, BANDS * 3, H, W).
            x_t: (B, 3, H, W).
            time: t / T, (B,).
        """
        with torch.autocast(x_t.device.type, enabled=False):
            signal, log_sigma = (level[:, None, None, None] for level in cosine_levels(time.float()))
            noise = (2 * log_sigma).exp()
            if not self.training:
                noise = noise.clamp(min=ROUNDING)
                low, high = SAMPLING_TIMES
                factor = torch.where((time >= low) & (time <= high), SAMPLING_VARIANCE, 1.0)[:, None, None, None]
                log_error, shift = log_error + factor.log() / 2, shift * factor.sqrt()
            values = (estimate, log_error, shift, noise, *self.bands(x_t.float().contiguous() / signal - estimate))
            return _Correction.apply(*values) if torch.is_grad_enabled() else _corrected(*values)[0]

    def bands(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return five frequency bands of x (B, 3, H, W), which sum to x: high, middle, vertical lines, horizontal lines, low.

        A filter of 7 pixels (1, 2, 3, 4, 3, 2, 1) / 16 splits x into low and high frequencies, along columns and along rows. What is high in both
        directions is split once more, into high and middle.
        """
        vertical, horizontal = self.long @ x, x @ self.long.T
        low = vertical @ self.long.T
        rest = x - vertical - horizontal + low
        middle = self.short @ rest @ self.short.T
        return rest - middle, middle, vertical - low, horizontal - low, low


class _Correction(torch.autograd.Function):
    """The sum over the bands of C (C + sigma^2)^-1 r, added to the estimate; r is the band of x_t / signal - m.

    By Sherman & Morrison (1950), with the variance v = s^2 + sigma^2 and g = sigma^2 / v, that is (1 - g) r + g (u . r) / (v + u . u) u.
    The gradient is written out, because autograd's needs twice the time: every step of it is an operation on a whole image.
    """

    @staticmethod
    def forward(ctx: Any, estimate: Tensor, log_error: Tensor, shift: Tensor, noise: Tensor, *bands: Tensor) -> Tensor:
        """Return (B, 3, H, W); ``noise`` is sigma^2, (B, 1, 1, 1), and has no gradient."""
        out, error, variance, ignored, *totals = _corrected(estimate, log_error, shift, noise, *bands)
        ctx.save_for_backward(error, variance, ignored, shift, *bands, *totals)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the arguments, given that of the result."""
        error, variance, ignored, shift, *rest = ctx.saved_tensors
        out, to_log_error, to_shift, to_bands = out.contiguous(), torch.empty_like(error), torch.empty_like(shift), []
        inputs = zip(variance.chunk(BANDS, 1), ignored.chunk(BANDS, 1), shift.chunk(BANDS, 1), rest[:BANDS], rest[BANDS:], strict=True)
        for (v, g, u, r, total), to_s, to_u in zip(inputs, to_log_error.chunk(BANDS, 1), to_shift.chunk(BANDS, 1), strict=True):
            onto_u, along = _dot(out, u).div_(total), _dot(u, r)  # the last term is g * onto_u * along, summed over the image
            to_bands.append(torch.addcmul(out, g, out, value=-1).addcmul_(g * onto_u, u))
            torch.mul(g * along / total, out, out=to_u).addcmul_(g * onto_u, r).addcmul_(g * along / total * onto_u, u, value=-2)
            torch.mul(onto_u, along, out=to_s).neg_().add_(_dot(out, r)).mul_(g).div_(v).addcmul_(g * along / total, onto_u, value=-1)
        return out, to_log_error.mul_(error).mul_(2), to_shift, None, *to_bands


def _corrected(estimate: Tensor, log_error: Tensor, shift: Tensor, noise: Tensor, *bands: Tensor) -> list[Tensor]:
    """Return the corrected estimate, and what its gradient needs; exporters follow this function, and not an autograd.Function."""
    error, out = (2 * log_error).exp(), estimate.clone()
    variance = error + noise
    ignored = noise / variance
    totals = []
    for v, g, u, r in zip(variance.chunk(BANDS, 1), ignored.chunk(BANDS, 1), shift.chunk(BANDS, 1), bands, strict=True):
        total = v + _dot(u, u)
        out.addcmul_(1 - g, r).addcmul_(g * _dot(u, r) / total, u)
        totals.append(total)
    return [out, error, variance, ignored, *totals]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum over the colours of a * b, (B, 1, H, W), for a, b (B, 3, H, W)."""
    (a1, a2, a3), (b1, b2, b3) = a.chunk(3, 1), b.chunk(3, 1)
    return (a1 * b1).addcmul_(a2, b2).addcmul_(a3, b3)


def blur_matrix(size: int, spread: int) -> Tensor:
    """Return the matrix (size, size) that averages a line of pixels with weights 1/4, 1/2, 1/4 at distances -spread, 0, spread; edges are repeated."""
    place = torch.arange(size, device="cpu")  # see ``TimeEmbedding``
    matrix = torch.eye(size, device="cpu") / 2
    for neighbour in (place - spread, place + spread):
        matrix[place, neighbour.clamp(0, size - 1)] += 0.25
    return matrix


def cosine_levels(time: Tensor) -> tuple[Tensor, Tensor]:
    """Return signal and log(noise / signal) of the cosine schedule at t / T, (B,): alpha_bar = cos^2(a) / cos^2(a_0), with the angle a of eq. 17."""
    first, angle = (math.pi / 2 * (part + 0.008) / 1.008 for part in (torch.zeros_like(time), time.clamp(max=LATEST)))
    signal = angle.cos() / first.cos()
    return signal.clamp(min=LEAST_SIGNAL), ((angle - first).sin() * (angle + first).sin()).log() / 2 - angle.cos().log()
