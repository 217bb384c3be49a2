"""The operations of a model. numpy works on the memory that torch has allocated, so nothing is copied."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from hal.models.layers import Linear
from hal.models.ops import Ops
from hal.sampling.sampler import Sampler

_erf = np.vectorize(math.erf, otypes=[np.float32])


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy()


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, np.float32))


class NumpyOps(Ops):
    def linear(self, x: torch.Tensor, layer: Linear) -> torch.Tensor:
        y = _array(x) @ _array(layer.weight).T
        return _tensor(y if layer.bias is None else y + _array(layer.bias))

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        a = _array(x)
        scale = 1 / np.sqrt(np.square(a).mean(-1, keepdims=True) + np.float32(eps))
        return _tensor(a * scale * _array(weight))

    def add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float,
                     ) -> tuple[torch.Tensor, torch.Tensor]:
        total = _tensor(_array(x) + _array(residual))
        return self.rms_norm(total, weight, eps), total

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
        a = _array(x)
        a = a - a.mean(-1, keepdims=True)
        scale = 1 / np.sqrt(np.square(a).mean(-1, keepdims=True) + np.float32(eps))
        return _tensor(a * scale * _array(weight) + _array(bias))

    def begin_rotary(self, positions: torch.Tensor, table: torch.Tensor, dtype: torch.dtype) -> Any:
        return np.split(_array(table)[_array(positions)][:, None], 2, -1)

    def rotary(self, heads: torch.Tensor, begun: Any) -> torch.Tensor:
        (cos, sin), (a, b) = begun, np.split(_array(heads), 2, -1)
        return _tensor(np.concatenate((a * cos - b * sin, b * cos + a * sin), -1))

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = np.split(_array(gate_up), 2, -1)
        return _tensor(gate * (0.5 + 0.5 * np.tanh(0.5 * gate)) * up)

    def activation(self, x: torch.Tensor, kind: str) -> torch.Tensor:
        a = _array(x)
        if kind == "relu":
            return _tensor(np.maximum(a, 0))
        if kind == "gelu":
            return _tensor(0.5 * a * (1 + _erf(a / math.sqrt(2))))
        return _tensor(0.5 * a * (1 + np.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3))))


class NumpySampler(Sampler):
    """hal's sampler, with numpy for its searches over the vocabulary."""

    def argmax(self, scores: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(_array(scores).argmax(-1))

    def descending(self, scores: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.sort(_array(scores), -1)[:, ::-1].copy())
