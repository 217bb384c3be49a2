"""The operations of a model on the CPU."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from hal.contracts.attention import LayerAttention
from hal.models.experts import Experts
from hal.models.layers import Linear, Unmerged
from hal.models.ops import HeadNorms, Ops
from hal.weights.grid import GridScheme
from runners.cpu.attention import CpuStep
from runners.cpu.choice import choose
from runners.cpu.grids import packed
from runners.cpu.linears import PACKED, DenseWeight, Kernels, fits
from runners.cpu.memory import HugePages
from runners.cpu.tape import Recorder


class CpuOps(Ops):
    """Linear layers are multiplied in the way that `choice` found to be the fastest for the weight's shape and the
    number of rows. A quantised weight is multiplied as it is stored where the kernels know its form.

    Attributes:
        counts: linear layers by the ways that they take.
        recorder: while a step is recorded, what notes its operations in place of their computation.
    """

    schemes = None  # any other by its own arithmetic
    recorder: Recorder | None = None

    def __init__(self, kernels: Kernels | None = None) -> None:
        self.kernels = Kernels() if kernels is None else kernels
        self.counts: Counter[str] = Counter()
        self.pages = HugePages()

    def pack_linear(self, layer: Linear) -> None:
        if layer.is_dense:
            weight = layer.weight.data
            chosen = choose(weight, self.kernels)
            if chosen[0] != PACKED and self.kernels and fits(weight):
                layer.weight.data = weight = self.pages.copy(weight)  # a tied embedding shares it
            layer.packed = DenseWeight(weight, layer.bias, self.kernels, chosen)
            if layer.packed.packed is not None:
                del layer.weight  # the memory is free, but for a tied embedding's
        else:
            layer.packed = packed(layer, self.kernels, self.pages.copy)
            for tensor in layer.scheme.tensors(layer.spec) if layer.packed is not None else ():
                delattr(layer, tensor.name)
        self.counts["plain PyTorch" if layer.packed is None else ", ".join(dict.fromkeys(layer.packed.chosen))] += 1

    def pack_experts(self, layer: Experts) -> None:
        for weight, biases in zip(layer.layers, layer.biases(), strict=True):
            made = [packed(weight.expert(i, biases), self.kernels, self.pages.copy) for i in range(layer.count)]
            if None not in made:
                weight.release()
                weight.packed = made
            way = "plain PyTorch" if made[0] is None else made[0].chosen[0]
            self.counts[f"{way}, of experts"] += 1

    def linear(self, x: torch.Tensor, layer: Linear) -> torch.Tensor:
        if self.recorder is not None:
            return self.recorder.linear(x, layer)
        if layer.packed is None:
            return super().linear(x, layer)
        if isinstance(layer.scheme, GridScheme):
            x = layer.scheme.rounded(x)
        return layer.packed(x)

    def rotary_attention(self, attention: LayerAttention, layer: int, qkv: torch.Tensor, num_kv_heads: int,
                         begun: Any, norms: HeadNorms | None = None) -> torch.Tensor:
        if norms is not None:
            qkv = self.norm_heads(qkv, norms, num_kv_heads)
        if isinstance(attention, CpuStep):
            if self.recorder is not None:
                return self.recorder.attend(attention, layer, qkv, begun)
            found = attention.rotary(layer, qkv, begun)
            if found is not None:
                return found
        return super().rotary_attention(attention, layer, qkv, num_kv_heads, begun)

    def begin_rotary(self, positions: torch.Tensor, table: torch.Tensor, dtype: torch.dtype) -> Any:
        if self.recorder is not None:
            return self.recorder.begin_rotary(positions, table)
        return super().begin_rotary(positions, table, dtype)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        if self.recorder is not None:
            return self.recorder.norm(x, None, weight, eps)[0]
        return super().rms_norm(x, weight, eps)

    def add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float,
                     ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.recorder is not None:
            return self.recorder.norm(x, residual, weight, eps)
        return super().add_rms_norm(x, residual, weight, eps)

    def norm_linear(self, layer: Linear | Unmerged, x: torch.Tensor, residual: torch.Tensor | None,
                    weight: torch.Tensor, eps: float, *, gated: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        packed, adapters = getattr(layer, "packed", None), getattr(layer, "adapters", None)
        if gated and isinstance(packed, DenseWeight) and packed.in_blocks(len(x)) and not self.batch_invariant and (
                adapters is None or adapters.step.begun is None):
            x, residual = self.apply_norm(x, residual, weight, eps)
            return packed.gated(x), residual
        return super().norm_linear(layer, x, residual, weight, eps, gated=gated)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return super().silu_mul(gate_up) if self.recorder is None else self.recorder.silu_mul(gate_up)

    def described(self) -> str:
        """One line for people: how many linear layers take which ways."""
        ways = "; ".join(f"{count} by {way}" for way, count in self.counts.most_common())
        return f"linear layers: {ways} (CPU kernels: {self.kernels.name})"
