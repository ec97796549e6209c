"""The posterior mean of an image, given an estimate of it, the estimate's error, and the noisy image."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

BANDS = 5  # of the filter; see ``WienerFilter.bands``
LATEST = 0.998  # of t / T: at 1, the cosine schedule has no signal at all
LEAST_SIGNAL = 0.05
# 1.5 times the variance that rounding [-1, 1] to 256 levels adds. The data were rounded, and samples will be: the estimate of the last step must leave
# room for it. The factor is measured in docs/experiments.md: without it, the grain of samples is too strong after a long training.
ROUNDING = 1.5 * (2 / 255) ** 2 / 12


class WienerFilter(nn.Module):
    """Correct an estimate of x0 by x_t: the posterior mean for Gaussian errors, in five frequency bands.

    With x_t / signal = x0 + sigma * eps and an estimate m, whose error in the three colours of a pixel has the covariance C, the mean of x0 given
    x_t is m + C (C + sigma^2)^-1 (x_t / signal - m) (Wiener 1949). At low noise it tends to x_t, so that grain and edges need not pass through
    the layers. C is s^2 (I + v v^T): at an edge, a pixel may have either side's colour, and v lies along their difference. Without v, the
    correction would let noise of every colour pass there. The grain of an image is nearly the same in all colours.

    A band holds only a part of the noise (``noise_shares``). s and v are per unit of that part, so that sigma^2 is the noise of every band.

    Two of the bands are oriented: they hold vertical and horizontal lines. Where the position of an edge is uncertain, the errors of the pixels along it
    are correlated. The correction takes what they have in common, and hardly any of each pixel's own noise. With isotropic bands only, that noise
    remains, and edges become jagged.

    In evaluation mode, sigma^2 is at least ``ROUNDING``, so that the grain of samples that are rounded is about as strong as that of the data.

    Signal and sigma are those of the cosine schedule (Nichol & Dhariwal 2021, eq. 17); with another one, the network learns the difference.
    """

    short: Tensor
    long: Tensor

    def __init__(self, size: int) -> None:
        """Create the transform that splits an image of ``size`` x ``size`` pixels into bands; nothing here is trained."""
        super().__init__()
        short, long = blur_matrices(size)
        self.register_buffer("short", short, persistent=False)
        self.register_buffer("long", long, persistent=False)

    def forward(self, estimate: Tensor, log_error: Tensor, direction: Tensor, x_t: Tensor, time: Tensor) -> Tensor:
        """Return x0_hat (B, 3, H, W), in float32. It is fastest where each channel is contiguous.

        Args:
            estimate: m, (B, 3, H, W).
            log_error: log s in each band, in the order of ``bands``, (B, BANDS, H, W).
            direction: v in each band, (B, BANDS * 3, H, W).
            x_t: (B, 3, H, W).
            time: t / T, (B,).
        """
        with torch.autocast(x_t.device.type, enabled=False):
            signal, log_sigma = (level[:, None, None, None] for level in cosine_levels(time.float()))
            log_noise = 2 * log_sigma if self.training else (2 * log_sigma).clamp(min=math.log(ROUNDING))
            values = (estimate, (2 * log_error - log_noise).sigmoid(), direction, *self.bands(x_t.float().contiguous() / signal - estimate))
            return _Correction.apply(*values) if torch.is_grad_enabled() else _corrected(*values)[0]

    def bands(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return five frequency bands of x (B, 3, H, W), which sum to x: high, middle, vertical lines, horizontal lines, low.

        A filter of 7 pixels (1, 2, 3, 4, 3, 2, 1) / 16 splits x into low and high frequencies, along columns and along rows. What is high in both
        directions is split once more, into high and middle.
        """
        return bands(x, self.short, self.long)

    def low(self, x: Tensor) -> Tensor:
        """Return the low band of x (B, C, H, W) alone."""
        return self.long @ x @ self.long.T


class _Correction(torch.autograd.Function):
    """The sum over the bands of C (C + sigma^2)^-1 r, added to the estimate; r is the band of x_t / signal - m.

    By Sherman & Morrison (1950), with the gain a = s^2 / (s^2 + sigma^2), that is a r + a (1 - a) (v . r) / (1 + a v . v) v.
    The gradient is written out, because autograd's needs twice the time: every step of it is an operation on a whole image.
    """

    @staticmethod
    def forward(ctx: Any, estimate: Tensor, gain: Tensor, direction: Tensor, *parts: Tensor) -> Tensor:
        """Return the corrected estimate, (B, 3, H, W), given gain a (B, BANDS, H, W), v and r of each band."""
        out, *totals = _corrected(estimate, gain, direction, *parts)
        ctx.save_for_backward(gain, direction, *parts, *totals)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the arguments, given that of the result."""
        gain, direction, *rest = ctx.saved_tensors
        out, to_gain, to_direction, to_parts = out.contiguous(), torch.empty_like(gain), torch.empty_like(direction), []
        inputs = zip(gain.chunk(BANDS, 1), direction.chunk(BANDS, 1), rest[:BANDS], rest[BANDS:], strict=True)
        for (a, v, r, total), to_a, to_v in zip(inputs, to_gain.chunk(BANDS, 1), to_direction.chunk(BANDS, 1), strict=True):
            onto_v, along = _dot(out, v).div_(total), _dot(v, r).div_(total)
            scale = torch.addcmul(a, a, a, value=-1)  # the second term is scale * onto_v * along * total, summed over the image
            to_parts.append((a * out).addcmul_(scale * onto_v, v))
            both = onto_v * along
            torch.mul(scale * along, out, out=to_v).addcmul_(scale * onto_v, r).addcmul_(scale * a * both, v, value=-2)
            torch.mul(a, total + 1, out=to_a).neg_().add_(1).mul_(both).add_(_dot(out, r))
        return out, to_gain, to_direction, *to_parts


def _corrected(estimate: Tensor, gain: Tensor, direction: Tensor, *parts: Tensor) -> list[Tensor]:
    """Return the corrected estimate, and 1 + a v . v of each band. Exporters cannot trace an autograd.Function, but this."""
    out, totals = estimate.clone(), []
    for a, v, r in zip(gain.chunk(BANDS, 1), direction.chunk(BANDS, 1), parts, strict=True):
        total = 1 + a * _dot(v, v)
        out.addcmul_(a, r).addcmul_((a - a * a) * _dot(v, r) / total, v)
        totals.append(total)
    return [out, *totals]


def negative_log_likelihood(estimate: Tensor, log_error: Tensor, direction: Tensor, x0: Tensor) -> Tensor:
    """Return the negative log-likelihood of the errors of each image's estimate, (B,): the mean over pixels and bands, under the expected covariances.

    Its gradient is of the same size for large errors and for small ones. In that of a squared error, the grain of an image, of less than one of 256
    levels, is lost beside the edges of objects. The error of a band is divided by the square root of its noise share, as ``WienerFilter`` takes it.
    For an error e with the covariance s^2 (I + v v^T), without the constant: 3 log s + log(1 + v . v) / 2 + (e . e - (e . v)^2 / (1 + v . v)) / (2 s^2),
    with the determinant of Sylvester and the inverse of Sherman & Morrison (1950).

    Args:
        estimate, x0: (B, 3, H, W).
        log_error, direction: as in ``WienerFilter``.
    """
    with torch.autocast(x0.device.type, enabled=False):
        errors = bands(x0.float().contiguous() - estimate, *_blurs_on(x0.device, x0.shape[-1]))
        found = []
        for e, log_s, v, share in zip(errors, log_error.chunk(BANDS, 1), direction.chunk(BANDS, 1), noise_shares(x0.shape[-1]), strict=True):
            total = 1 + _dot(v, v)
            squared = (_dot(e, e) - _dot(e, v).square() / total) / share * (-2 * log_s).exp()
            found.append((3 * log_s + (total.log() + squared) / 2).mean((1, 2, 3)))
        return torch.stack(found).mean(0)


def bands(x: Tensor, short: Tensor, long: Tensor) -> tuple[Tensor, ...]:
    """Return the five frequency bands of x (B, C, H, W) that ``WienerFilter.bands`` describes; ``short`` and ``long`` are ``blur_matrices`` of its size."""
    vertical, horizontal = long @ x, x @ long.T
    low = vertical @ long.T
    rest = x - vertical - horizontal + low
    middle = short @ rest @ short.T
    return rest - middle, middle, vertical - low, horizontal - low, low


@cache
def noise_shares(size: int) -> tuple[float, ...]:
    """Return the share of the variance of white noise in each band, for an image of ``size`` x ``size`` pixels, away from its borders.

    They sum to less than 1, because the bands overlap.
    """
    one = torch.zeros(1, 1, size, size, device="cpu")
    one[..., size // 2, size // 2] = 1
    return tuple(float(band.square().sum()) for band in bands(one, *blur_matrices(size)))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum over the colours of a * b, (B, 1, H, W), for a, b (B, 3, H, W)."""
    (a1, a2, a3), (b1, b2, b3) = a.chunk(3, 1), b.chunk(3, 1)
    return (a1 * b1).addcmul_(a2, b2).addcmul_(a3, b3)


@cache
def _blurs_on(device: torch.device, size: int) -> tuple[Tensor, Tensor]:
    """Return ``blur_matrices`` on a device. The result is cached, because a copy in every training step would synchronise with the GPU."""
    short, long = blur_matrices(size)
    return short.to(device), long.to(device)


def blur_matrices(size: int) -> tuple[Tensor, Tensor]:
    """Return the matrices (size, size) that average a line over 3 pixels, weighted (1, 2, 1) / 4, and over 7, weighted (1, 2, 3, 4, 3, 2, 1) / 16."""
    short = blur_matrix(size, 1)
    return short, blur_matrix(size, 2) @ short


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
