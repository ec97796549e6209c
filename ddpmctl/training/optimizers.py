"""Optimizers by name, and the learning rate over a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ddpmctl.config import TrainingConfig
from ddpmctl.cuda_graph import CudaGraphFunction
from ddpmctl.registry import OPTIMIZERS

ADAMW_LR_RATIO = 0.15  # of AdamW to Muon: Muon's updates are orthogonal and need a larger learning rate

SMALLEST_MATRIX = 32  # smaller matrices embed labels, time or pixels, for which orthogonal updates make no sense
FEWEST_CHANNELS = 16  # in and out, of kernels larger than 1x1; a 1x1 kernel counts as a matrix. Measured in docs/experiments.md


@OPTIMIZERS.register("adam")
def adam(net: nn.Module, lr: float, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    """Kingma & Ba 2015."""
    return [torch.optim.Adam(net.parameters(), lr=lr, fused=True)]


@OPTIMIZERS.register("adamw")
def adamw(net: nn.Module, lr: float, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    """Loshchilov & Hutter 2019."""
    return [torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)]


@OPTIMIZERS.register("muon")
def muon(net: nn.Module, lr: float, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    """Jordan et al. 2024 on matrices and kernels between feature maps, AdamW on the rest."""
    ends = {id(p) for name in ("stem", "out", "init_conv") if hasattr(net, name) for p in getattr(net, name).parameters()}
    inner = [p for p in net.parameters() if _for_muon(p.shape) and id(p) not in ends]
    chosen = {id(p) for p in inner}
    rest = [p for p in net.parameters() if id(p) not in chosen]
    beside = torch.optim.AdamW(rest, lr=lr * ADAMW_LR_RATIO, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    return [MatrixMuon(inner, lr=lr, dtype=dtype), beside] if inner else [beside]


def _for_muon(shape: torch.Size) -> bool:
    """Return whether Muon updates a parameter of this shape: a matrix (out, in) or a convolution kernel (out, in, height, width) that is large enough."""
    if len(shape) not in (2, 4):
        return False
    return min(shape[:2]) >= (FEWEST_CHANNELS if math.prod(shape[2:]) > 1 else SMALLEST_MATRIX)


class MatrixMuon(torch.optim.Muon):
    """Muon, given each convolution kernel as the matrix (out, in * height * width); matrices of one shape are orthogonalised together.

    torch's own step takes one matrix after the other, and always in bf16, which CPUs without bf16 units emulate: there, it took two thirds of a
    training step of ``quick``.

    Args:
        parameters: matrices (out, in) and kernels (out, in, height, width).
        lr: learning rate; updates are scaled by sqrt(out / in) where that is above 1.
        dtype: in which matrices are orthogonalised.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, dtype: torch.dtype = torch.float32) -> None:
        """Make a matrix view of every parameter, which shares its memory."""
        self._kernels, self._dtype = list(parameters), dtype
        self._orthogonalise: Callable[[list[Tensor]], list[Tensor]] = self._all_orthogonalised
        self._matrices = [nn.Parameter(_matrix(p.detach())) for p in self._kernels]
        for kernel, matrix in zip(self._kernels, self._matrices, strict=True):
            if kernel.data_ptr() != matrix.data_ptr():
                raise ValueError("a parameter's memory cannot be viewed as a matrix; make it contiguous or channels_last first")
        super().__init__(self._matrices, lr=lr, momentum=0.95, weight_decay=0.0)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter by its orthogonalised momentum; returns the closure's value, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group = self.param_groups[0]
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        for kernel, matrix in zip(self._kernels, self._matrices, strict=True):
            if kernel.grad is None:
                continue
            gradient = _matrix(kernel.grad)
            state = self.state[matrix]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(gradient)
            momentum = state["momentum_buffer"]
            momentum.lerp_(gradient, 1 - group["momentum"])
            by_shape.setdefault(matrix.shape, []).append((matrix, gradient.lerp(momentum, group["momentum"])))  # Nesterov's momentum
        stacks = self._orthogonalise([torch.stack([update for _, update in pairs]) for pairs in by_shape.values()])
        for ((rows, columns), pairs), updates in zip(by_shape.items(), stacks, strict=True):
            for (own, _), update in zip(pairs, updates, strict=True):
                own.add_(update, alpha=-group["lr"] * math.sqrt(max(1.0, rows / columns)))
        return loss

    def record(self) -> None:
        """Run the orthogonalisation as a CUDA graph: its hundreds of kernels take less time than launching each. The matrices must be on a GPU."""
        self._orthogonalise = CudaGraphFunction(self._all_orthogonalised)

    def _all_orthogonalised(self, stacks: list[Tensor]) -> list[Tensor]:
        return [orthogonalised(stack, self._dtype) for stack in stacks]


A, B, C = 3.4445, -4.7750, 2.0315  # of the polynomial A I + B G + C G^2 of Jordan et al. 2024


def orthogonalised(matrices: Tensor, dtype: torch.dtype, steps: int = 5) -> Tensor:
    """Return matrices (N, rows, columns) of about the same singular vectors, with singular values between 0.7 and 1.2, float32.

    Newton-Schulz iteration, calculated in ``dtype``: each step multiplies X by a polynomial of G = X X^T. In float32, only G and the product of the
    polynomials are iterated, and X is multiplied once at the end, in two thirds of the time. bf16 would round G too coarsely for that.
    """
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT  # the smaller Gram matrix
    x: Tensor = (wide / torch.linalg.matrix_norm(wide, keepdim=True).clamp(min=1e-7)).to(dtype)
    if dtype is torch.float32:
        gram = x @ x.mT
        product = polynomial = _polynomial(gram)
        for _ in range(steps - 1):
            gram = polynomial @ (gram @ polynomial)
            polynomial = _polynomial(gram)
            product = polynomial @ product
        x = product @ x
    else:
        for _ in range(steps):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return (x if wide is matrices else x.mT).float()


def _polynomial(gram: Tensor) -> Tensor:
    """Return A I + B G + C G^2 for symmetric matrices G (N, rows, rows) and the identity I: one step of the iteration multiplies by it."""
    out = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
    out.diagonal(dim1=1, dim2=2).add_(A)
    return out


def _matrix(kernel: Tensor) -> Tensor:
    """Return (out, ...) as (out, rest) in memory order, so that it is a view in channels_last too."""
    if kernel.ndim == 4 and kernel.is_contiguous(memory_format=torch.channels_last):
        kernel = kernel.permute(0, 2, 3, 1)
    return kernel.reshape(len(kernel), -1)


def make_optimizers(net: nn.Module, config: TrainingConfig, dtype: torch.dtype = torch.float32) -> list[torch.optim.Optimizer]:
    """Return the optimizers that a config names; each group stores its peak learning rate as ``peak_lr``.

    ``dtype`` is that of the network's products; an optimizer may calculate in it where rounding does no harm.
    """
    optimizers: list[torch.optim.Optimizer] = OPTIMIZERS.get(config.optimizer)(net, config.lr, dtype)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_lr(optimizers: list[torch.optim.Optimizer], config: TrainingConfig, step: int, fraction: float, scale: float = 1.0) -> float:
    """Set the learning rate for a step and return that of the first optimizer.

    Args:
        optimizers: as made by ``make_optimizers``.
        config: names the decay and the warm-up.
        step: steps done before this one.
        fraction: used part of the budget, by whole epochs or by time.
        scale: factor from rollbacks.
    """
    factor = scale * (min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0)
    if config.lr_decay == "linear":
        factor *= max(0.0, 1 - fraction)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
    return float(optimizers[0].param_groups[0]["lr"])
