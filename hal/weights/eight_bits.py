"""Weights of 8 bits, FP8 (e4m3, arXiv 2209.05433) and INT8, with scales of tensors, of outputs or of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from hal.weights.base import Dim, LinearSpec, WeightTensor
from hal.weights.grid import LARGEST, Grid, GridScheme, Inputs, encoded

if TYPE_CHECKING:
    from hal.models.layers import Linear


@dataclass(frozen=True)
class EightBits(GridScheme):
    """Attributes:
        kind: of the values. scales: what has a scale of its own: a projection's whole "tensor", each output
            ("channel"), or each "block" of outputs and inputs.
        scale: name of the tensor of scales.
    """

    kind: Literal["fp8", "int8"]
    scales: Literal["tensor", "channel", "block"]
    inputs: Inputs = "exact"
    block: tuple[int, int] = (128, 128)
    scale: str = "weight_scale"
    on_load: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", f"{self.kind}-{self.scales}")
        object.__setattr__(self, "inputs_as", self.kind)
        object.__setattr__(self, "input_group", self.block[1])

    def tensors(self, spec: LinearSpec) -> Sequence[WeightTensor]:
        of = {"tensor": (Dim("part"),), "channel": (Dim("out"), 1),
              "block": (Dim("out", per=self.block[0]), Dim("in", per=self.block[1]))}[self.scales]
        found = [WeightTensor("weight", (Dim("out"), Dim("in")), "float8_e4m3fn" if self.kind == "fp8" else "int8"),
                 WeightTensor(self.scale, of, "float32")]
        if self.inputs == "static":
            found.append(WeightTensor(self.input_scale, (Dim("part"),), "float32"))
        return found

    def grid(self, layer: Linear) -> Grid:
        scales, values = layer.stored(self.scale), layer.weight
        if self.scales == "tensor":
            scales = torch.cat([s.expand(n, 1) for s, n in zip(scales, layer.outputs, strict=True)])
        elif self.scales == "block":
            scales = scales.repeat_interleave(self.block[0], 0)[:len(values)]
        return Grid(values, scales, self.block[1] if self.scales == "block" else values.shape[1], layer.outputs)

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        scale = weight.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / LARGEST[self.kind]
        return {"weight": encoded(weight, scale, self.kind), self.scale: scale}
