"""What a network predicts, and how x0 and eps follow from it.

Throughout, x_t = signal * x0 + noise * eps with signal^2 + noise^2 = 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from ddpmctl.registry import OBJECTIVES

if TYPE_CHECKING:
    from torch import Tensor

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
