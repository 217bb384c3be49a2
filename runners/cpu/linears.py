"""A linear layer's weight on the CPU, and the ways to multiply by it.

A dense weight lies row by row, as the checkpoint has it, or in oneDNN's layout. Four ways read the first: PyTorch's
F.linear, the compiled kernels, products in fp32 of tiles, for many rows where the CPU has no bfloat16 arithmetic, and
compiled products of blocks for many rows. The kernels may use one thread: to wake the others can take
longer than a small weight.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.nn.functional as F

from runners.cpu import compiled

BUCKETS = (1, 4, 8, 16, 32, 256)  # rows that are measured; a number of rows takes the way of the next larger one
BLOCKS = "blocks"
WAYS = ("torch", "kernel", "one thread", "fp32 tiles", BLOCKS)  # of a weight that lies row by row
PACKED = "oneDNN"
_TILE = 1 << 20  # values of a weight in fp32 at once
_PACKED_ROWS = 32  # oneDNN chooses the layout for so many rows
KINDS = {torch.float32: 0, torch.bfloat16: 1}


class Kernels:
    """The compiled kernels at a level, with torch's threads."""

    def __init__(self, level: str | None = None) -> None:
        self.name = compiled.level() if level is None else level
        self.level = compiled.LEVELS.index(self.name)
        self.functions = compiled.threaded() if self.level else None

    def __bool__(self) -> bool:
        return self.functions is not None


class DenseWeight:
    """A callable: x [n, in] -> [n, out].

    Args:
        weight: [out, in], which this keeps. bias: [out] or None.
        chosen: the way for each of BUCKETS; with PACKED there is no other one.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, kernels: Kernels, chosen: tuple[str, ...],
                 ) -> None:
        self.weight, self.bias, self.kernels, self.outputs = weight, bias, kernels, weight.shape[0]
        self.chosen, self.packed = chosen, pack(weight) if chosen[0] == PACKED else None
        ways = {"torch": self._torch, "kernel": self._kernel, "one thread": self._one_thread,
                "fp32 tiles": self._fp32, BLOCKS: self._blocks, PACKED: self._onednn}
        by_bucket = [ways[name] for name in chosen]
        self.ways = [by_bucket[next(i for i, most in enumerate(BUCKETS) if rows <= most)]
                     for rows in range(BUCKETS[-2] + 1)]
        self.many = by_bucket[-1]
        self.native: Any = None
        if kernels and self.packed is None and fits(weight):
            self.native = compiled.Weight(weight.data_ptr(), None if bias is None else bias.data_ptr(), weight.shape[1],
                                          self.outputs, weight.stride(0) * weight.element_size(), KINDS[weight.dtype],
                                          kernels.level)
            self.call, self.address = kernels.functions.hal_linear, ctypes.addressof(self.native)
        if self.packed is not None:
            del self.weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.shape[0]
        if not rows:
            return x.new_empty(0, self.outputs)
        return self.ways[rows](x) if rows < len(self.ways) else self.many(x)

    def _torch(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)

    def _kernel(self, x: torch.Tensor) -> torch.Tensor:
        return multiply(self.call, self.address, x, self.outputs)

    def _one_thread(self, x: torch.Tensor) -> torch.Tensor:
        return multiply(self.call, self.address, x, self.outputs, 1)

    def _blocks(self, x: torch.Tensor) -> torch.Tensor:
        return multiply(self.kernels.functions.hal_blocks, self.address, x, self.outputs, 0, 0)

    def in_blocks(self, rows: int) -> bool:
        """Whether so many rows are multiplied in blocks, so that `gated` is there."""
        return self.chosen[-1] == BLOCKS and rows >= len(self.ways)

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        """Of a weight whose outputs are a gate and up: silu(gate) * up -> [n, out / 2]."""
        return multiply(self.kernels.functions.hal_blocks, self.address, x, self.outputs // 2, 0, 1)

    def _fp32(self, x: torch.Tensor) -> torch.Tensor:
        wide, y = x.float(), x.new_empty(x.shape[0], self.outputs)
        bias, step = None if self.bias is None else self.bias.float(), max(_TILE // x.shape[1], 64)
        for at in range(0, self.outputs, step):
            end = at + step
            y[:, at:end] = F.linear(wide, self.weight[at:end].float(), None if bias is None else bias[at:end])
        return y

    def _onednn(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def multiply(call: Any, address: int, x: torch.Tensor, outputs: int, threads: int = 0, *further: int) -> torch.Tensor:
    """`call`, `address`: a function of the kernels and its weight. `threads`: 0 stands for torch's. `further`: the
    function's other arguments."""
    if x.stride(1) != 1:
        x = x.contiguous()
    y = x.new_empty(x.shape[0], outputs)
    if call_kernel(call, address, x.data_ptr(), x.stride(0), y.data_ptr(), x.shape[0], *further,
                   threads or torch.get_num_threads()):
        raise MemoryError("a linear layer's kernel found no memory for its input")
    return y


def call_kernel(call: Any, *arguments: Any) -> Any:
    """`call(*arguments)` of a function of the kernels, which has its name in the trace of a profiler that runs."""
    if not torch.autograd._profiler_enabled():
        return call(*arguments)
    with torch.profiler.record_function(call.__name__):
        return call(*arguments)


def fits(weight: torch.Tensor) -> bool:
    """Whether the kernels can read a dense weight where it lies."""
    return weight.dtype in KINDS and weight.stride(1) == 1 and weight.shape[1] > 0


def pack(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_ROWS)


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this PyTorch has oneDNN's operators, and they give right results. (They serve its compiler, and are not
    documented.)"""
    x, weight, bias = (torch.arange(float(n)).remainder(7).sub(3).to(dtype) for n in (3 * 64, 16 * 64, 16))
    x, weight = x.view(3, 64), weight.view(16, 64)
    try:
        got = torch.ops.mkldnn._linear_pointwise(x, pack(weight), bias, "none", [], "")
        return torch.allclose(got, F.linear(x, weight, bias))
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
