"""MXFP4: 4-bit floating-point values (e2m1) in blocks of 32, each with a scale that is a power of two (e8m0).

Source: OCP Microscaling Formats, v1.0.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from hal.weights.base import Dim, LinearSpec, Scheme, WeightTensor
from hal.weights.grid import Grid

if TYPE_CHECKING:
    from hal.models.layers import Linear

BLOCK = 32
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def decoded(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values that blocks stand for.

    Args:
        blocks: [..., blocks, 16] uint8, two values in a byte, the lower bits first. gpt-oss stores experts so.
        scales: [..., blocks] uint8, exponents of two plus 127.

    Returns:
        [..., blocks * 32] in `dtype`.
    """
    table = torch.tensor([*_VALUES, *(-v for v in _VALUES)], device=blocks.device)
    codes = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2)
    # exp2 is not exact on every device, and ldexp would form a power of two that fp32 does not hold.
    half = (scales.int() - 127).div(2, rounding_mode="floor")
    powers = torch.tensor([2.0 ** e for e in range(-64, 66)], device=blocks.device)
    low, high = powers[(half + 64).long()], powers[(scales.int() - 127 - half + 64).long()]
    return (table[codes.long()] * low.unsqueeze(-1) * high.unsqueeze(-1)).flatten(-2).to(dtype)


class Mxfp4Scheme(Scheme):
    """What the layouts share."""

    name = "mxfp4"

    @abc.abstractmethod
    def stored(self, layer: Linear) -> tuple[torch.Tensor, torch.Tensor]:
        """The rank's blocks and scales, as of `decoded`: [out, blocks, 16] and [out, blocks]."""

    def dequantize(self, layer: Linear) -> torch.Tensor:
        return decoded(*self.stored(layer), layer.dtype)[:, :layer.in_size]

    def codes(self, layer: Linear) -> Grid:
        """A grid whose values are codes of e2m1, for kernels that decode them."""
        blocks, exponents = self.stored(layer)
        values = torch.stack((blocks & 15, blocks >> 4), -1).flatten(1)[:, :layer.in_size]
        scales = torch.where(exponents == 0, 1 << 22, exponents.int() << 23).view(torch.float32)  # the powers of two
        return Grid(values, scales, BLOCK, layer.outputs)


class Mxfp4Blocks(Mxfp4Scheme):
    """The layout of gpt-oss, which stores experts so: [out, in / 32, 16] bytes and [out, in / 32] exponents."""

    def tensors(self, spec: LinearSpec) -> Sequence[WeightTensor]:
        return (WeightTensor("blocks", (Dim("out"), Dim("in", per=BLOCK), BLOCK // 2), "uint8"),
                WeightTensor("scales", (Dim("out"), Dim("in", per=BLOCK)), "uint8", below=255))

    def stored(self, layer: Linear) -> tuple[torch.Tensor, torch.Tensor]:
        return layer.stored("blocks"), layer.stored("scales")


class Mxfp4(Mxfp4Scheme):
    """The mxfp4-pack-quantized layout of compressed-tensors: [out, in / 2] bytes and [out, in / 32] exponents."""

    def tensors(self, spec: LinearSpec) -> Sequence[WeightTensor]:
        return (WeightTensor("weight_packed", (Dim("out"), Dim("in", per=BLOCK, holds=BLOCK // 2)), "uint8"),
                WeightTensor("weight_scale", (Dim("out"), Dim("in", per=BLOCK)), "uint8", below=255))

    def stored(self, layer: Linear) -> tuple[torch.Tensor, torch.Tensor]:
        packed = layer.stored("weight_packed")
        return packed.view(len(packed), -1, BLOCK // 2), layer.stored("weight_scale")
