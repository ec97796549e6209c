"""Activations that ``--act`` can name."""

from __future__ import annotations

from torch import nn

from ddpmctl.registry import ACTIVATIONS


@ACTIVATIONS.register("gelu")
class GELU(nn.GELU):
    """x * Phi(x); Hendrycks & Gimpel 2016."""


@ACTIVATIONS.register("relu")
class ReLU(nn.ReLU):
    """max(x, 0)."""


@ACTIVATIONS.register("elu")
class ELU(nn.ELU):
    """x, or exp(x) - 1 below zero; Clevert et al. 2016."""


@ACTIVATIONS.register("silu")
class SiLU(nn.SiLU):
    """x * sigmoid(x); Ramachandran et al. 2017."""


@ACTIVATIONS.register("mish")
class Mish(nn.Mish):
    """x * tanh(softplus(x)); Misra 2019."""


@ACTIVATIONS.register("leaky-relu")
class LeakyReLU(nn.LeakyReLU):
    """x, or 0.01 x below zero; Maas et al. 2013."""


@ACTIVATIONS.register("tanh")
class Tanh(nn.Tanh):
    """tanh(x)."""
