"""Train, sample, judge and compare small conditional diffusion models."""

__version__ = "0.3.0"
