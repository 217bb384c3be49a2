"""Linear layers with weights in oneDNN's own blocked layout."""

from __future__ import annotations

import torch

from hal.models.layers import Linear
from hal.models.ops import Ops

_ROWS = 32  # the layout is chosen for so many rows; of 1 to 128, no other number is faster


class CpuOps(Ops):
    """With packed weights a linear is 1.1 to 2.1 times as fast as F.linear in bfloat16 (most with few rows), and 0.9 to
    2.8 times in float32. Intel's extension gains less. `benchmarks/cpu_linear.py` measures it."""

    schemes = None  # any but the dense one by its own arithmetic

    def __init__(self, dtype: torch.dtype) -> None:
        self.packs = _can_pack(dtype)

    def pack_linear(self, layer: Linear) -> None:
        if self.packs and layer.is_dense:
            weight = layer.weight
            del layer.weight  # a parameter cannot be replaced by a tensor
            layer.weight = _pack(weight.data)

    def linear(self, x: torch.Tensor, layer: Linear) -> torch.Tensor:
        if not layer.is_dense:
            return super().linear(x, layer)
        weight = layer.weight
        if not weight.is_mkldnn:
            return super().linear(x, layer)
        if not x.shape[0]:
            return x.new_empty(0, weight.shape[0])
        return torch.ops.mkldnn._linear_pointwise(x, weight, layer.bias, "none", [], "")


def _pack(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)


def _can_pack(dtype: torch.dtype) -> bool:
    """Whether this PyTorch has the operators, and they give right results. (They serve its compiler, and are not
    documented.)"""
    x, weight, bias = (torch.arange(float(n)).remainder(7).sub(3).to(dtype) for n in (3 * 64, 16 * 64, 16))
    x, weight = x.view(3, 64), weight.view(16, 64)
    try:
        got = torch.ops.mkldnn._linear_pointwise(x, _pack(weight), bias, "none", [], "")
        return torch.allclose(got, torch.nn.functional.linear(x, weight, bias))
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
