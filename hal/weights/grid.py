"""Weights whose values lie on a grid: (value - zero) * scale, where a group of inputs shares a scale and a zero."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F

from hal.weights.base import Scheme

if TYPE_CHECKING:
    from hal.models.layers import Linear

Inputs = Literal["exact", "static", "token", "tensor", "group"]
LARGEST = {"fp8": 448.0, "int8": 127.0}
_SPAN = {"fp8": 448.0, "int8": 127.5}  # what the largest input becomes; compressed-tensors divides by half of 255
_TYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}


@dataclass(frozen=True, slots=True)
class Grid:
    """A rank's weight in the one form that kernels of every device start from.

    Attributes:
        values: [out, in], of a float8 or an integer type.
        scales: [out, groups] fp32. zeros: [out, groups] fp32; None stands for zeros of 0.
        group: consecutive inputs that share a scale; it is the number of inputs where a whole row does.
        index: [parts, in], the group of each input, for each of the layer's projections, where groups are not of
            consecutive inputs ("act order"); None where they are.
        outputs: of each projection.
    """

    values: torch.Tensor
    scales: torch.Tensor
    group: int
    outputs: tuple[int, ...]
    zeros: torch.Tensor | None = None
    index: torch.Tensor | None = None

    def wide(self, of_groups: torch.Tensor) -> torch.Tensor:
        """[out, groups] -> [out, in], or a shape that broadcasts to it."""
        if self.index is not None:
            parts = zip(self.outputs, self.index.long(), strict=True)
            return of_groups.gather(1, torch.cat([index.expand(count, -1) for count, index in parts]))
        if of_groups.shape[1] == 1:
            return of_groups
        return of_groups.unsqueeze(-1).expand(-1, -1, self.group).flatten(1)[:, :self.values.shape[1]]

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """[out, in]."""
        values = self.values.float()
        if self.zeros is not None:
            values = values - self.wide(self.zeros)
        return (values * self.wide(self.scales)).to(dtype)


class GridScheme(Scheme):
    """Attributes:
        inputs: how the layer's inputs are rounded before they are multiplied: "exact" does not round them, "static" has
            scales in the checkpoint, and a scale for each "token", "tensor" or "group" of inputs is computed in the
            step. inputs_as: the type that they are rounded to. input_group: inputs that share a scale of "group".
        input_scale: name of the tensor of static scales, one for each projection.
    """

    inputs: Inputs = "exact"
    inputs_as: Literal["fp8", "int8"] = "fp8"
    input_group: int = 128
    input_scale: str = "input_scale"

    @property
    def mixes_rows(self) -> bool:
        return self.inputs == "tensor"

    @abc.abstractmethod
    def grid(self, layer: Linear) -> Grid: ...

    def dequantize(self, layer: Linear) -> torch.Tensor:
        return self.grid(layer).dequantized(layer.dtype)

    def linear(self, x: torch.Tensor, layer: Linear) -> torch.Tensor:
        weight = self.dequantize(layer)
        if self.inputs != "static":
            return F.linear(self.rounded(x), weight, layer.bias)
        scales = layer.stored(self.input_scale).flatten()
        parts = zip(scales, torch.split(weight, list(layer.outputs)), strict=True)
        y = torch.cat([F.linear(rounded(x, scale, self.inputs_as), part) for scale, part in parts], -1)
        return y if layer.bias is None else y + layer.bias

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """x [n, in] as it is multiplied, where no scale of it is stored."""
        if self.inputs == "exact":
            return x
        size, grouped = self.input_group, self.inputs == "group"
        found = F.pad(x, (0, -x.shape[1] % size)).view(len(x), -1, size) if grouped else x
        dims = (0, 1) if self.inputs == "tensor" else (-1,)
        scale = found.abs().amax(dims, keepdim=True).float() / _SPAN[self.inputs_as]
        y = rounded(found, scale.clamp(min=1e-12), self.inputs_as)
        return y.flatten(1)[:, :x.shape[1]] if grouped else y


def rounded(x: torch.Tensor, scale: torch.Tensor, kind: Literal["fp8", "int8"]) -> torch.Tensor:
    """x rounded to multiples of `scale` that the type has, in x's dtype."""
    return (encoded(x, scale, kind).float() * scale).to(x.dtype)


def encoded(x: torch.Tensor, scale: torch.Tensor, kind: Literal["fp8", "int8"]) -> torch.Tensor:
    """x / scale in the type, saturating."""
    y = (x.float() / scale).clamp(-448 if kind == "fp8" else -128, LARGEST[kind])
    return (y.round() if kind == "int8" else y).to(_TYPES[kind])
