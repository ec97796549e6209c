"""A network's training call as a CUDA graph: recorded once, then replayed with one launch instead of hundreds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _Recorded(nn.Module):
    """The network as a module of its own, whose ``forward`` torch replaces by the graph; the network itself stays as it is."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *inputs: Tensor) -> Any:
        return self.net(*inputs)


class CudaGraph:
    """Calls a network in training mode, forward and backward, by replaying its recorded kernels (``torch.cuda.make_graphed_callables``).

    A small network spends more time on launching kernels than on running them. The graph is recorded when a shape comes for the second time in a row.
    Calls of another shape, such as an epoch's last batch, run without it.

    Gradients are kept in the graph's own memory, so each backward pass must be followed by an optimizer step before the next.
    """

    def __init__(self, net: nn.Module, dtype: torch.dtype) -> None:
        """Take the network, on a GPU, and the type of its products."""
        self._net, self._dtype = net, dtype
        self._recorded: Any = None
        self._shape: torch.Size | None = None

    @property
    def is_recorded(self) -> bool:
        """Whether calls of the recorded shape are replayed."""
        return self._recorded is not None

    def __call__(self, x_t: Tensor, labels: Tensor, time: Tensor) -> Any:
        """Return what the network returns for x_t (B, 3, H, W), labels (B, C) and time (B,)."""
        if self._recorded is None and x_t.shape == self._shape:
            self._recorded = self._record(x_t, labels, time)
        if self._recorded is None:
            self._shape = x_t.shape
        call = self._recorded if self._recorded is not None and x_t.shape == self._shape else self._net
        return call(x_t, labels, time)

    def _record(self, *inputs: Tensor) -> Any:
        """Record the call for inputs of these shapes; batch norm's statistics stay as they were."""
        buffers = [(buffer, buffer.clone()) for buffer in self._net.buffers()]
        # Recording uses a stream of its own, and the weights' gradients remember it. Without gradients in flight, that does no harm.
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
        # The weights are cast within the graph: a cast that autocast remembered would be that of old weights.
        with torch.autocast("cuda", self._dtype, enabled=self._dtype != torch.float32, cache_enabled=False):
            arguments = tuple(value.clone() for value in inputs)
            recorded: Any = torch.cuda.make_graphed_callables(_Recorded(self._net), arguments, allow_unused_input=True)
        for buffer, before in buffers:
            buffer.copy_(before)
        return recorded
