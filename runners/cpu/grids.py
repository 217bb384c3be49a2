"""Weights of 8 or 4 bits on a grid, in the form that the kernels of few_bits.c read."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from hal.models.layers import Linear
from hal.weights.gguf import GgufBlocks
from hal.weights.grid import Grid, GridScheme
from runners.cpu.compiled import FewBits
from runners.cpu.linears import Kernels, multiply

Place = Callable[[torch.Tensor], torch.Tensor]
_BLOCK = 16  # outputs that the kernels compute at once
_STEP = 32  # inputs of a weight and of a group are multiples of it
_EXACT = {8: 256, 4: 1024}  # inputs whose products with 16-bit integers have a sum of 32 bits
_SCALES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of few_bits.c


class GridWeight:
    """A callable: x [n, in] bfloat16 -> [n, out], for any number of rows. A row's result depends on no other row.

    Args:
        values: uint8 [out, in]. scales: fp32 [out, groups]. zeros: uint8 [out, groups]; None: 2^(bits - 1) everywhere.
        group: inputs that share a scale, a multiple of 32; 0: a whole row.
        place: gives a contiguous copy of a tensor in memory of the caller's choice.
    """

    def __init__(self, values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None,
                 bias: torch.Tensor | None, kernels: Kernels, *, bits: int, group: int,
                 place: Place = torch.Tensor.contiguous) -> None:
        (self.outputs, inputs), groups = values.shape, scales.shape[1]
        self.values, self.bias, self.chosen = place(_in_blocks(values, bits)), bias, (f"int{bits} kernel",)
        self.scales = place(_of_blocks(_smallest(scales)))
        self.zeros = None if zeros is None else place(_of_blocks(zeros))
        x_group = group if 0 < group <= _EXACT[bits] else math.gcd(group, _EXACT[8])
        padded = inputs + -inputs % _STEP
        x_groups = -(-padded // x_group)
        addresses = (None if t is None else t.data_ptr() for t in (self.values, self.scales, self.zeros, bias))
        self.native = FewBits(*addresses, inputs, padded, self.outputs, groups, x_group, x_groups,
                              group // x_group if group else x_groups, bits, _SCALES.index(self.scales.dtype),
                              kernels.level)
        self.kernels = kernels.functions
        self.call, self.address = self.kernels.hal_few_bits, ctypes.addressof(self.native)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return multiply(self.call, self.address, x, self.outputs) if len(x) else x.new_empty(0, self.outputs)


def packed(layer: Linear, kernels: Kernels, place: Place = torch.Tensor.contiguous) -> GridWeight | None:
    """What the kernels read for a layer whose weight is not dense; None where they cannot. `place`: of GridWeight."""
    scheme = layer.scheme
    if not kernels or layer.dtype != torch.bfloat16:
        return None
    if isinstance(scheme, GgufBlocks) and scheme.kind in ("Q4_0", "Q8_0"):
        return _arranged(_of_gguf(layer.weight, scheme.kind), layer, kernels, place)
    if isinstance(scheme, GridScheme) and scheme.inputs != "static" and "fp8" not in scheme.name:
        return _arranged(scheme.grid(layer), layer, kernels, place)
    return None


def _of_gguf(rows: torch.Tensor, kind: str) -> Grid:
    """Blocks of 32 values: a scale in fp16, then 32 bytes, or 16 bytes of which the lower bits come first."""
    out = rows.shape[0]
    blocks = rows.view(out, -1, 34 if kind == "Q8_0" else 18)
    scales = blocks[..., :2].contiguous().view(torch.float16)[..., 0].float()
    values = blocks[..., 2:]
    if kind == "Q8_0":
        return Grid(values.contiguous().view(torch.int8).flatten(1), scales, 32, (out,))
    return Grid(torch.cat((values & 15, values >> 4), -1).flatten(1), scales, 32, (out,), torch.full_like(scales, 8.0))


def _arranged(grid: Grid, layer: Linear, kernels: Kernels, place: Place) -> GridWeight | None:
    values, scales, zeros = grid.values, grid.scales, grid.zeros
    group = 0 if scales.shape[1] == 1 else grid.group
    if grid.index is not None or values.is_floating_point() or group % _STEP:
        return None
    if zeros is not None and not bool(((zeros >= 0) & (zeros <= 255) & (zeros == zeros.round())).all()):
        return None
    bits = 8 if zeros is None else getattr(layer.scheme, "bits", 4)
    if zeros is None:
        values = values.contiguous().view(torch.uint8) ^ 128
    elif bool((zeros == 1 << bits - 1).all()):
        zeros = None
    return GridWeight(values, scales.float(), None if zeros is None else zeros.to(torch.uint8), layer.bias, kernels,
                      bits=bits, group=group, place=place)


def _in_blocks(values: torch.Tensor, bits: int) -> torch.Tensor:
    """[blocks, steps, 16, 4] bytes: of each output of a block the values of 4 or 8 inputs, in few_bits.c's order."""
    padded = F.pad(values, (0, -values.shape[1] % _STEP, 0, -values.shape[0] % _BLOCK))
    steps = padded.view(len(padded) // _BLOCK, _BLOCK, -1, 4 if bits == 8 else 8)
    if bits == 4:
        steps = steps.view(*steps.shape[:3], 2, 2, 2)
        steps = (steps[..., 0, :] | steps[..., 1, :] << 4).transpose(3, 4)
    else:
        steps = steps.view(*steps.shape[:3], 2, 2).transpose(3, 4)
    return steps.transpose(1, 2)


def _of_blocks(of_groups: torch.Tensor) -> torch.Tensor:
    """[out, groups] -> [blocks, groups, 16]."""
    padded = F.pad(of_groups, (0, 0, 0, -len(of_groups) % _BLOCK))
    return padded.view(-1, _BLOCK, of_groups.shape[1]).transpose(1, 2)


def _smallest(scales: torch.Tensor) -> torch.Tensor:
    """The same numbers in 16 bits where that loses nothing."""
    return next((found for dtype in _SCALES[1:] if (found := scales.to(dtype)).float().equal(scales)), scales)
