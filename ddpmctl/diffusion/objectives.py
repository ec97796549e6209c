"""Training objectives: what the network predicts, and how to compute x0 and eps from it.

In this module, x_t = signal * x0 + noise * eps with signal^2 + noise^2 = 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from ddpmctl.registry import OBJECTIVES

if TYPE_CHECKING:
    from torch import Tensor

# Pixels of i-CLEVR and the embedded benchmark in [-1, 1]. The variance is far below the unit variance that v assumes.
DATA_MEAN, DATA_STD = -0.04, 0.13
SMALLEST_SIGNAL = 1e-3  # smallest divisor: a smaller one would only amplify errors


class Prediction(NamedTuple):
    """The predicted clean image and noise, each (B, 3, H, W)."""

    x0: Tensor
    eps: Tensor


class Objective(Protocol):
    """A parametrisation of the denoiser."""

    @staticmethod
    def target(x0: Tensor, eps: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        """Return the target of the network's output; signal and noise are (B, 1, 1, 1)."""

    @staticmethod
    def prediction(out: Tensor, x_t: Tensor, signal: float, noise: float) -> Prediction:
        """Return x0_hat and eps_hat for the network's output at one t."""


@OBJECTIVES.register("eps")
class Eps:
    """the noise eps; Ho et al. 2020, eq. 14."""

    @staticmethod
    def target(x0: Tensor, eps: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        """Return eps."""
        return eps

    @staticmethod
    def prediction(out: Tensor, x_t: Tensor, signal: float, noise: float) -> Prediction:
        """Return x0_hat, computed from x_t and the output, and eps_hat, the output."""
        return Prediction((x_t - noise * out) / max(signal, SMALLEST_SIGNAL), out)


@OBJECTIVES.register("x0")
class X0:
    """the clean image x0."""

    @staticmethod
    def target(x0: Tensor, eps: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        """Return x0."""
        return x0

    @staticmethod
    def prediction(out: Tensor, x_t: Tensor, signal: float, noise: float) -> Prediction:
        """Return x0_hat, the output, and eps_hat, computed from x_t and the output."""
        return Prediction(out, (x_t - signal * out) / max(noise, SMALLEST_SIGNAL))


@OBJECTIVES.register("v")
class V:
    """the velocity v = signal * eps - noise * x0; Salimans & Ho 2022, appendix D."""

    @staticmethod
    def target(x0: Tensor, eps: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        """Return v."""
        return signal * eps - noise * x0

    @staticmethod
    def prediction(out: Tensor, x_t: Tensor, signal: float, noise: float) -> Prediction:
        """Return the rotation of (x_t, v) back to (x0, eps)."""
        return Prediction(signal * x_t - noise * out, noise * x_t + signal * out)


@OBJECTIVES.register("edm")
class Edm:
    """v of data scaled to unit variance: EDM's preconditioned output; Karras et al. 2022, eq. 7 and appendix B.6.

    The target is x0 minus its best linear estimate from x_t, scaled to unit variance. For images of low
    contrast, the network then does not need to copy the noise to its output, as it does for v or eps.
    """

    @staticmethod
    def target(x0: Tensor, eps: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        """Return the residual of x0 divided by its standard deviation."""
        total = (signal**2 * DATA_STD**2 + noise**2) ** 0.5
        return (noise / DATA_STD * (x0 - DATA_MEAN) - signal * DATA_STD * eps) / total

    @staticmethod
    def prediction(out: Tensor, x_t: Tensor, signal: float, noise: float) -> Prediction:
        """Return the best linear estimate of x0 plus the scaled output, and the matching eps_hat."""
        variance = signal**2 * DATA_STD**2 + noise**2
        centred, residual = x_t - signal * DATA_MEAN, DATA_STD / variance**0.5 * out
        x0 = DATA_MEAN + signal * DATA_STD**2 / variance * centred + noise * residual
        return Prediction(x0, noise / variance * centred - signal * residual)
