"""The operations of a model on the CPU."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from hal.contracts.attention import LayerAttention
from hal.models.experts import Experts
from hal.models.layers import Linear
from hal.models.ops import Ops
from hal.weights.grid import GridScheme
from runners.cpu.attention import CpuStep
from runners.cpu.choice import choose
from runners.cpu.grids import packed
from runners.cpu.linears import DenseWeight, Kernels


class CpuOps(Ops):
    """Linear layers are multiplied in the way that `choice` found to be the fastest for the weight's shape and the
    number of rows. A quantised weight is multiplied as it is stored where the kernels know its form.

    Attributes:
        counts: linear layers by the ways that they take.
    """

    schemes = None  # any other by its own arithmetic

    def __init__(self, kernels: Kernels | None = None) -> None:
        self.kernels = Kernels() if kernels is None else kernels
        self.counts: Counter[str] = Counter()

    def pack_linear(self, layer: Linear) -> None:
        if layer.is_dense:
            weight = layer.weight.data
            chosen = choose(weight, self.kernels)
            layer.packed = DenseWeight(weight, layer.bias, self.kernels, chosen)
            if layer.packed.packed is not None:
                del layer.weight  # the memory is free, but for a tied embedding's
        else:
            layer.packed = packed(layer, self.kernels)
            for tensor in layer.scheme.tensors(layer.spec) if layer.packed is not None else ():
                delattr(layer, tensor.name)
        self.counts["plain PyTorch" if layer.packed is None else ", ".join(dict.fromkeys(layer.packed.chosen))] += 1

    def pack_experts(self, layer: Experts) -> None:
        for weight, biases in zip(layer.layers, layer.biases(), strict=True):
            made = [packed(weight.expert(i, biases), self.kernels) for i in range(layer.count)]
            if None not in made:
                weight.release()
                weight.packed = made
            way = "plain PyTorch" if made[0] is None else made[0].chosen[0]
            self.counts[f"{way}, of experts"] += 1

    def linear(self, x: torch.Tensor, layer: Linear) -> torch.Tensor:
        if layer.packed is None:
            return super().linear(x, layer)
        if isinstance(layer.scheme, GridScheme):
            x = layer.scheme.rounded(x)
        return layer.packed(x)

    def rotary_attention(self, attention: LayerAttention, layer: int, qkv: torch.Tensor, num_kv_heads: int,
                         begun: Any) -> torch.Tensor:
        if isinstance(attention, CpuStep):
            found = attention.rotary(layer, qkv, begun)
            if found is not None:
                return found
        return super().rotary_attention(attention, layer, qkv, num_kv_heads, begun)

    def described(self) -> str:
        """One line for people: how many linear layers take which ways."""
        ways = "; ".join(f"{count} by {way}" for way, count in self.counts.most_common())
        return f"linear layers: {ways} (CPU kernels: {self.kernels.name})"
