"""Two weight formats of a third party. HAL_WEIGHTS=rows8=other_formats:rows8,groups4=other_formats:groups4 names them.

`rows8` has int8 values and one float32 scale for each output. `groups4` has 4-bit values, packed into int32 along the
inputs, and float16 scales and packed zero points for each group of inputs. With "act_order", the tensor g_idx says to
which group each input belongs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hal.models.layers import Linear
from hal.weights import Dim, LinearSpec, Scheme, WeightTensor
from hal.weights.dense import DENSE


class Rows8(Scheme):
    name = "rows8"
    ignored = ("weight_shape",)

    def tensors(self, spec: LinearSpec) -> Sequence[WeightTensor]:
        return (WeightTensor("weight", (Dim("out"), Dim("in")), "int8"),
                WeightTensor("weight_scale", (Dim("out"),), "float32"))

    def dequantize(self, layer: Linear) -> torch.Tensor:
        scale = layer.stored("weight_scale")
        return (layer.weight.float() * scale.unsqueeze(1)).to(layer.dtype)


@dataclass(frozen=True)
class Groups4(Scheme):
    group: int
    act_order: bool = False
    name = "groups4"

    def tensors(self, spec: LinearSpec) -> Sequence[WeightTensor]:
        groups = Dim("in", per=self.group, replicated=self.act_order)
        found = [WeightTensor("qweight", (Dim("in", per=8), Dim("out")), "int32"),
                 WeightTensor("scales", (groups, Dim("out")), "float16"),
                 WeightTensor("qzeros", (groups, Dim("out", per=8)), "int32")]
        if self.act_order:
            found.append(WeightTensor("g_idx", (Dim("part"), Dim("in")), "int32", below=groups.entries(spec.in_size)))
        return found

    def dequantize(self, layer: Linear) -> torch.Tensor:
        values = unpacked(layer.stored("qweight"), 0)
        zeros, scales = unpacked(layer.stored("qzeros"), 1), layer.stored("scales").float()
        parts, at = [], 0
        for part, count in enumerate(layer.outputs):
            of = slice(at, at + count)
            group = layer.stored("g_idx")[part] if self.act_order else torch.arange(len(values)) // self.group
            parts.append((values[:, of] - zeros[:, of][group]) * scales[:, of][group])
            at += count
        return torch.cat(parts, 1).t().to(layer.dtype)


def unpacked(packed: torch.Tensor, dim: int) -> torch.Tensor:
    """Integers from 0 to 15, eight times as many along `dim`, the lowest bits first."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    values = packed.unsqueeze(dim + 1) >> (shifts.view(-1, 1) if dim == 0 else shifts) & 15
    return values.flatten(dim, dim + 1)


def packed(values: torch.Tensor, dim: int) -> torch.Tensor:
    """The inverse of `unpacked`."""
    by_eight = values.int().unflatten(dim, (-1, 8))
    return sum(by_eight.select(dim + 1, i) << 4 * i for i in range(8)).int()  # type: ignore[union-attr]


def rows8(config: Mapping[str, Any]) -> Callable[[str], Scheme]:
    scheme = Rows8()
    return lambda name: scheme


def groups4(config: Mapping[str, Any]) -> Callable[[str], Scheme]:
    ignored = config.get("ignore", [])
    return lambda name: DENSE if name in ignored else Groups4(config["group_size"], config.get("act_order", False))
