"""The dense scheme: one tensor in the model's dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from hal.weights.base import Dim, LinearSpec, Scheme, WeightTensor

if TYPE_CHECKING:
    from hal.models.layers import Linear


class Dense(Scheme):
    name = "dense"

    def tensors(self, spec: LinearSpec) -> Sequence[WeightTensor]:
        return _TRANSPOSED if spec.transposed else _WEIGHT

    def dequantize(self, layer: Linear) -> torch.Tensor:
        return layer.weight

    def linear(self, x: torch.Tensor, layer: Linear) -> torch.Tensor:
        return F.linear(x, layer.weight, layer.bias)


_WEIGHT = (WeightTensor("weight", (Dim("out"), Dim("in"))),)
_TRANSPOSED = (WeightTensor("weight", (Dim("out"), Dim("in")), transposed=True),)
DENSE = Dense()
BIAS = WeightTensor("bias", (Dim("out"),))  # of a linear layer of any scheme
