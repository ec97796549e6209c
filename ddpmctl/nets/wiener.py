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
# 1.5 times the variance that rounding [-1, 1] to 256 levels adds. The data were rounded, and samples will be: the last estimate of a sampler must leave
# room for it. The factor is measured in docs/experiments.md.
ROUNDING = 1.5 * (2 / 255) ** 2 / 12
# In sampling, at t / T in OWN_TIMES, errors have OWN_ERRORS times the variance that the network expects: it learned them on noised images, and its own
# samples differ from these. Above, the labels decide; below, grain would become too strong. Measured in docs/experiments.md.
OWN_ERRORS = 1.5
OWN_TIMES = (0.05, 0.5)


class WienerFilter(nn.Module):
    """Correct an estimate of x0 by x_t: the posterior mean for Gaussian errors, in five frequency bands.

    With x_t / signal = x0 + sigma * eps and an estimate m, whose error in the three colours of a pixel has the covariance C, the mean of x0 given
    x_t is m + C (C + sigma^2)^-1 (x_t / signal - m) (Wiener 1949). At low noise it tends to x_t, so that grain and edges need not pass through
    the layers.

    Colours are taken as grey, yellow minus blue, and red minus green (``opponent``). There, C is S (I + v v^T) S with S = diag(s). The grain of an image
    is nearly the same in red, green and blue: a large s for grey, and small ones across. At an edge, a pixel may have either side's colour, and S v lies
    along their difference; without v, the correction would let noise of every colour pass there.

    A band holds only a part of the noise (``noise_shares``). s is per root of that part, so that sigma^2 is the noise of every band.

    Two of the bands are oriented: they hold vertical and horizontal lines. Where the position of an edge is uncertain, the errors of the pixels along it
    are correlated. The correction takes what they have in common, and hardly any of each pixel's own noise. With isotropic bands only, that noise
    remains, and edges become jagged.

    In evaluation mode, the result leaves room for the rounding of the image, of variance q = ``ROUNDING``: where sigma^2 < q, s^2 is less by q - sigma^2
    (u = s v stays), and half of that is added to the noise. The last step of a sampler thus scales deviations from m by (C - q) / (C - q / 2), nearly
    sqrt((C - q) / C), which takes the variance q out of C. What an image has in a colour by rounding only is left out, and comes back by rounding.
    At ``OWN_TIMES``, C is ``OWN_ERRORS`` times what the network expects. Otherwise edges become softer from step to step.

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
            log_error: log s of the three opponent colours in each band, in the order of ``bands``, (B, 3 * BANDS, H, W).
            direction: v in each band, likewise.
            x_t: (B, 3, H, W).
            time: t / T, (B,).
        """
        with torch.autocast(x_t.device.type, enabled=False):
            signal, log_sigma = (level[:, None, None, None] for level in cosine_levels(time.float()))
            noise, parts = (2 * log_sigma).exp(), self.bands(opponent(x_t.float().contiguous() / signal - estimate))
            if self.training:
                correction = _Correction.apply(log_error, direction, noise, *parts)
            else:
                own = torch.where((time >= OWN_TIMES[0]) & (time <= OWN_TIMES[1]), OWN_ERRORS, 1.0).sqrt()[:, None, None, None]
                room, s = (ROUNDING - noise).clamp(min=0), own * log_error.exp()
                correction = _corrected((s.square() - room).clamp(min=0), s * direction, noise + room / 2, *parts)[0]
            return estimate + from_opponent(correction)

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
    """What the filter adds to the estimate: the sum over the bands of C (C + sigma^2)^-1 r, where r is the band of x_t / signal - m.

    With C = diag(c) + u u^T and g = 1 / (c + sigma^2), that is g (c r + sigma^2 k u), k = u . g r / (1 + u . g u) (Sherman & Morrison 1950).
    The gradient is written out, because autograd's needs twice the time: every step of it is an operation on a whole image.
    """

    @staticmethod
    def forward(ctx: Any, log_error: Tensor, direction: Tensor, noise: Tensor, *parts: Tensor) -> Tensor:
        """Return the correction, (B, 3, H, W), given log s and v (B, 3 * BANDS, H, W), sigma^2 (B, 1, 1, 1) and r of each band."""
        size = log_error.exp()
        out, *factors = _corrected(size.square(), size * direction, noise, *parts)
        ctx.save_for_backward(size, direction, noise, *parts, *factors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the arguments, given that of the result.

        With G the gradient of the result and h = u . g G / (1 + u . g u): that of r is g (c G + sigma^2 h u), that of u is sigma^2 g X with
        X = k G + h r - 2 k h u, and that of c is sigma^2 g^2 (G r - u (X + k h u)). With u = s v and c = s^2, those of v and log s follow.
        """
        size, direction, noise, *rest = ctx.saved_tensors
        out, to_log_error, to_direction, to_parts = out.contiguous(), torch.empty_like(size), torch.empty_like(size), []
        bands = (value.chunk(BANDS, 1) for value in (size, direction, to_log_error, to_direction))
        for s, v, to_log_s, to_v, r, g, k, total in zip(*bands, *(rest[first : first + BANDS] for first in range(0, 4 * BANDS, BANDS)), strict=True):
            c, u = s * s, s * v
            h = _dot(u, g * out).div_(total)
            to_parts.append((c * out).addcmul_(noise * h, u).mul_(g))
            x, both = (k * out).addcmul_(h, r), (k * h) * u
            to_c = (out * r).addcmul_(u, x.sub_(both), value=-1).mul_(g)
            to_u, scale = x.sub_(both), g * noise
            torch.mul(to_u.mul_(scale), s, out=to_v)
            torch.mul(to_u, u, out=to_log_s).addcmul_(to_c.mul_(c), scale, value=2)
        return to_log_error, to_direction, None, *to_parts


def _corrected(variance: Tensor, common: Tensor, noise: Tensor, *parts: Tensor) -> list[Tensor]:
    """Return the correction, and g, k and 1 + u . g u of each band, which its gradient needs. Exporters can trace this, but not an autograd.Function."""
    out, factors = torch.zeros_like(parts[0]), []
    for c, u, r in zip(variance.chunk(BANDS, 1), common.chunk(BANDS, 1), parts, strict=True):
        g = (c + noise).reciprocal()
        onto = g * u
        total = _dot(onto, u).add_(1)
        k = _dot(onto, r).div_(total)
        out.addcmul_((c * r).addcmul_(noise * k, u), g)
        factors.append((g, k, total))
    return [out, *(factor for kind in zip(*factors, strict=True) for factor in kind)]


def negative_log_likelihood(estimate: Tensor, log_error: Tensor, direction: Tensor, x0: Tensor) -> Tensor:
    """Return the negative log-likelihood of the errors of each image's estimate, (B,): the mean over pixels and bands, under the expected covariances.

    Its gradient is of the same size for large errors and for small ones. In that of a squared error, the grain of an image, of less than one of 256
    levels, is lost beside the edges of objects. The error of a band is divided by the square root of its noise share, as ``WienerFilter`` takes it.
    For an error S e with the covariance S (I + v v^T) S, without the constant: the sum of log s, + log(1 + v . v) / 2
    + (e . e - (e . v)^2 / (1 + v . v)) / 2, with the determinant of Sylvester and the inverse of Sherman & Morrison (1950).

    Args:
        estimate, x0: (B, 3, H, W).
        log_error, direction: as in ``WienerFilter``.
    """
    with torch.autocast(x0.device.type, enabled=False):
        errors = bands(opponent(x0.float().contiguous() - estimate), *_blurs_on(x0.device, x0.shape[-1]))
        found = []
        for error, log_s, v, share in zip(errors, log_error.chunk(BANDS, 1), direction.chunk(BANDS, 1), noise_shares(x0.shape[-1]), strict=True):
            e, total = error * (-log_s).exp(), 1 + _dot(v, v)
            squared = (_dot(e, e) - _dot(e, v).square() / total) / share
            found.append((log_s.sum(1, keepdim=True) + (total.log() + squared) / 2).mean((1, 2, 3)))
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


def opponent(x: Tensor) -> Tensor:
    """Map red, green and blue, (B, 3, H, W), to opponent colours: grey, yellow minus blue, and red minus green. The transform is orthonormal."""
    red, green, blue = x.chunk(3, 1)
    yellow = red + green
    return torch.cat(((yellow + blue) / math.sqrt(3), (yellow - 2 * blue) / math.sqrt(6), (red - green) / math.sqrt(2)), 1)


def from_opponent(x: Tensor) -> Tensor:
    """Map opponent colours, (B, 3, H, W), back to red, green and blue; the inverse of ``opponent``."""
    grey, yellow, red = x.chunk(3, 1)
    grey, yellow, red = grey / math.sqrt(3), yellow / math.sqrt(6), red / math.sqrt(2)
    both = grey + yellow
    return torch.cat((both + red, both - red, grey - 2 * yellow), 1)


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
