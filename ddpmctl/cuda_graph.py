"""CUDA graphs of networks and functions: GPU kernels are recorded once, and then launched together instead of one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class _Recorded(nn.Module):
    """A wrapper of the network: torch replaces the ``forward`` of the module that it records, and the network must keep its own."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *inputs: Tensor) -> Any:
        return self.net(*inputs)


class CudaGraph:
    """A network in training mode whose forward and backward pass run as CUDA graphs (``torch.cuda.make_graphed_callables``).

    A small network spends more time on launching kernels than on running them. The graphs are recorded when two calls in a row have the same batch
    size. Later calls with another batch size, such as an epoch's last one, run without graphs.

    Gradients lie in the memory of the graphs, which the next backward pass overwrites. So gradients of several calls cannot be added.
    """

    def __init__(self, net: nn.Module, dtype: torch.dtype) -> None:
        """Take the network, on a GPU, and the dtype of autocast (float32: no autocast)."""
        self._net, self._dtype = net, dtype
        self._recorded: Any = None
        self._shape: torch.Size | None = None

    @property
    def is_recorded(self) -> bool:
        """Whether the graphs have been recorded."""
        return self._recorded is not None

    def __call__(self, x_t: Tensor, labels: Tensor, time: Tensor) -> Any:
        """Return the network's output for x_t (B, 3, H, W), labels (B, C) and t / T (B,)."""
        if self._recorded is None and x_t.shape == self._shape:
            self._recorded = self._record(x_t, labels, time)
        if self._recorded is None:
            self._shape = x_t.shape
        call = self._recorded if self._recorded is not None and x_t.shape == self._shape else self._net
        return call(x_t, labels, time)

    def _record(self, *inputs: Tensor) -> Any:
        """Return the network with recorded graphs for inputs of these shapes; the running statistics of batch norm do not change."""
        buffers = [(buffer, buffer.clone()) for buffer in self._net.buffers()]
        # torch records on a second CUDA stream, and warns in later backward passes, which run on the first. Here this only costs a synchronisation.
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
        # Without autocast's cache, the weights are cast within the graph; else each replay would use the cast of old weights.
        with torch.autocast("cuda", self._dtype, enabled=self._dtype != torch.float32, cache_enabled=False):
            arguments = tuple(value.clone() for value in inputs)
            recorded: Any = torch.cuda.make_graphed_callables(_Recorded(self._net), arguments, allow_unused_input=True)
        for buffer, before in buffers:
            buffer.copy_(before)
        return recorded


class CudaGraphFunction:
    """A function of tensors that runs as a CUDA graph, without gradients.

    The graph is recorded in the first call, and again when the shapes of the inputs change. Each call overwrites the results of the call before.
    """

    def __init__(self, function: Callable[[list[Tensor]], list[Tensor]]) -> None:
        """Take a function of tensors on a GPU. It must not synchronise with the GPU, as ``Tensor.item`` does."""
        self._function = function
        self._inputs: list[Tensor] = []
        self._outputs: list[Tensor] = []
        self._graph = torch.cuda.CUDAGraph()

    @torch.no_grad()
    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Call the function; all inputs must have the same dtype."""
        if [x.shape for x in inputs] != [x.shape for x in self._inputs]:
            self._record(inputs)
        torch._foreach_copy_(self._inputs, list(inputs))
        self._graph.replay()
        return self._outputs

    def _record(self, inputs: Sequence[Tensor]) -> None:
        self._inputs = [x.clone() for x in inputs]
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries initialise themselves at a first call, which may not be recorded
            self._function(self._inputs)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = self._function(self._inputs)
