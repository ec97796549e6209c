"""What a network predicts, and how x0 and eps follow from it.

Throughout, x_t = signal * x0 + noise * eps with signal^2 + noise^2 = 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from ddpmctl.registry import OBJECTIVES

if TYPE_CHECKING:
    from torch import Tensor

# Of i-CLEVR's pixels and the embedded benchmark's in [-1, 1]: grey scenes with small objects, far from the unit variance that v assumes.
DATA_MEAN, DATA_STD = -0.04, 0.13

SMALLEST_SIGNAL = 1e-3  # below, x0 cannot be recovered from eps, nor eps from x0: the division would only amplify errors


class Prediction(NamedTuple):
    """The two ends that the network sees from x_t, each (B, 3, H, W)."""

    x0: Tensor
    eps: Tensor


class Objective(Protocol):
    """One parametrisation of the denoiser."""

    @staticmethod
    def target(x0: Tensor, eps: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        """Return what the network should give out; signal and noise are (B, 1, 1, 1)."""

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
        """Return x0_hat by solving x_t for x0, and the output itself."""
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
        """Return the output itself, and eps_hat by solving x_t for eps."""
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

    With a data standard deviation s, the best linear guess of x0 from x_t is taken off, and what is
    left is scaled to unit variance. Where noise is far above the contrast of the images (most of a
    schedule, as s is small) the network need not copy the noise to its output, as for v or eps.
    """

    @staticmethod
    def target(x0: Tensor, eps: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        """Return (x0_hat's residual) / (its standard deviation), of unit variance at every t."""
        total = (signal**2 * DATA_STD**2 + noise**2) ** 0.5
        return (noise / DATA_STD * (x0 - DATA_MEAN) - signal * DATA_STD * eps) / total

    @staticmethod
    def prediction(out: Tensor, x_t: Tensor, signal: float, noise: float) -> Prediction:
        """Return the best linear guess from x_t plus the scaled output, and eps_hat to match; nothing is divided by a small number."""
        variance = signal**2 * DATA_STD**2 + noise**2
        centred, residual = x_t - signal * DATA_MEAN, DATA_STD / variance**0.5 * out
        x0 = DATA_MEAN + signal * DATA_STD**2 / variance * centred + noise * residual
        return Prediction(x0, noise / variance * centred - signal * residual)
