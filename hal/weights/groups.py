"""Weights of 4 or 8 bits whose scales belong to groups of inputs: the layouts of compressed-tensors, GPTQ and AWQ.

Sources: arXiv 2210.17323 (GPTQ), 2306.00978 (AWQ).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from hal.weights.base import Dim, LinearSpec, WeightTensor
from hal.weights.grid import Grid, GridScheme

if TYPE_CHECKING:
    from hal.models.layers import Linear

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where an int32 holds each of its eight values, from the lowest bits on


def unpacked(packed: torch.Tensor, dim: int, bits: int = 4, order: Sequence[int] | None = None) -> torch.Tensor:
    """[rows, columns] int32 -> int32 from 0 to 2^bits - 1, 32 / bits times as many along `dim`."""
    places = torch.arange(32 // bits) if order is None else torch.tensor(order)
    shifts = (places * bits).to(packed.device, torch.int32)
    # XLA divides where it is asked for the operator >>, and rounds negative numbers towards zero.
    wide = torch.bitwise_right_shift(packed.unsqueeze(dim + 1), shifts.view(-1, 1) if dim == 0 else shifts)
    return (wide & (1 << bits) - 1).flatten(dim, dim + 1)


def packed(values: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """The inverse of `unpacked` along the last dimension, in the plain order."""
    count = 32 // bits
    wide = F.pad(values.int(), (0, -values.shape[-1] % count)).view(len(values), -1, count)
    found = wide[..., 0]
    for i in range(1, count):
        found = found | wide[..., i] << bits * i
    return found


@dataclass(frozen=True)
class Packed(GridScheme):
    """The pack-quantized layout of compressed-tensors: [out, in / 8] int32 for 4 bits, with the scales [out, groups].

    Attributes:
        group: inputs; None: a whole row is one group. symmetric: there are no zero points. act_order: g_idx says to
            which group each input belongs.
        on_load: the scales are bfloat16 and the zero points bytes then.
    """

    bits: int = 4
    group: int | None = 128
    symmetric: bool = True
    act_order: bool = False
    on_load: bool = False
    ignored = ("weight_shape",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", f"int{self.bits}-groups")

    def tensors(self, spec: LinearSpec) -> Sequence[WeightTensor]:
        groups: Dim | int = 1 if self.group is None else Dim("in", per=self.group, replicated=self.act_order)
        found = [WeightTensor("weight_packed", (Dim("out"), Dim("in", per=32 // self.bits)), "int32"),
                 WeightTensor("weight_scale", (Dim("out"), groups), "bfloat16" if self.on_load else "float32")]
        if not self.symmetric:
            zeros = Dim("out") if self.on_load else Dim("out", per=32 // self.bits)
            found.append(WeightTensor("weight_zero_point", (zeros, groups), "uint8" if self.on_load else "int32"))
        if self.act_order and isinstance(groups, Dim):
            found.append(WeightTensor("weight_g_idx", (Dim("part"), Dim("in")), "int32",
                                      below=groups.entries(spec.in_size)))
        return found

    def grid(self, layer: Linear) -> Grid:
        packed, scales = layer.stored("weight_packed"), layer.stored("weight_scale").float()
        index = layer.stored("weight_g_idx") if self.act_order else None
        inputs = layer.in_size if index is None else index.shape[1]
        values = unpacked(packed, 1, self.bits)[:, :inputs].to(torch.uint8)
        zeros = torch.full_like(scales, 1 << self.bits - 1)
        if not self.symmetric:
            stored = layer.stored("weight_zero_point")
            zeros = (stored if self.on_load else unpacked(stored, 0, self.bits)[:len(values)]).float()
        return Grid(values, scales, self.group or inputs, layer.outputs, zeros, index)

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        assert self.group is not None
        out, inputs = weight.shape
        pad = -inputs % self.group
        grouped = F.pad(weight.float(), (0, pad)).view(out, -1, self.group)
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scales = ((high - low) / ((1 << self.bits) - 1)).clamp(min=1e-12).bfloat16().float()
        zeros = (-low / scales).round().clamp_(0, (1 << self.bits) - 1)
        values = (grouped / scales.unsqueeze(-1) + zeros.unsqueeze(-1)).round_().clamp_(0, (1 << self.bits) - 1)
        return {"weight_packed": packed(values.flatten(1)[:, :inputs], self.bits), "weight_scale": scales,
                "weight_zero_point": zeros.to(torch.uint8)}


@dataclass(frozen=True)
class Gptq(GridScheme):
    """qweight [in / 8, out], qzeros [groups, out / 8] and scales [groups, out].

    Attributes:
        group, act_order: as of Packed. zero_offset: is added to a stored zero point; 1 in the format's first version.
    """

    bits: int = 4
    group: int | None = 128
    act_order: bool = False
    zero_offset: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", "gptq")
        object.__setattr__(self, "ignored", () if self.act_order else ("g_idx",))  # it counts up by groups then

    def tensors(self, spec: LinearSpec) -> Sequence[WeightTensor]:
        groups, per = _groups(self.group, self.act_order), 32 // self.bits
        found = [WeightTensor("qweight", (Dim("in", per=per), Dim("out")), "int32"),
                 WeightTensor("qzeros", (groups, Dim("out", per=per)), "int32"),
                 WeightTensor("scales", (groups, Dim("out")), "float32")]
        if self.act_order and isinstance(groups, Dim):
            found.append(WeightTensor("g_idx", (Dim("part"), Dim("in")), "int32", below=groups.entries(spec.in_size)))
        return found

    def grid(self, layer: Linear) -> Grid:
        values = unpacked(layer.stored("qweight"), 0, self.bits).t().to(torch.uint8)
        zeros = unpacked(layer.stored("qzeros"), 1, self.bits).t().float() + self.zero_offset
        return Grid(values, layer.stored("scales").t(), self.group or values.shape[1], layer.outputs, zeros,
                    layer.stored("g_idx") if self.act_order and self.group else None)


@dataclass(frozen=True)
class Awq(GridScheme):
    """qweight [in, out / 8] and qzeros [groups, out / 8], whose values lie in an order of their own, and scales
    [groups, out]."""

    group: int | None = 128
    name = "awq"

    def tensors(self, spec: LinearSpec) -> Sequence[WeightTensor]:
        groups = _groups(self.group, False)
        return (WeightTensor("qweight", (Dim("in"), Dim("out", per=8)), "int32"),
                WeightTensor("qzeros", (groups, Dim("out", per=8)), "int32"),
                WeightTensor("scales", (groups, Dim("out")), "float32"))

    def grid(self, layer: Linear) -> Grid:
        values = unpacked(layer.stored("qweight"), 1, 4, _AWQ_ORDER).t().to(torch.uint8)
        zeros = unpacked(layer.stored("qzeros"), 1, 4, _AWQ_ORDER).t().float()
        return Grid(values, layer.stored("scales").t(), self.group or values.shape[1], layer.outputs, zeros)


def _groups(group: int | None, replicated: bool) -> Dim | int:
    return 1 if group is None else Dim("in", per=group, replicated=replicated)
