"""A mixture of experts as a part of a decoder layer.

Every tensor-parallel rank has all tokens of a step. So a rank computes with the part of the experts that it has: whole
experts along the axis ep, and a part of each inner layer along the other ranks of tp. One all_reduce sums the results.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from hal.model_config import ModelConfig
from hal.models.layers import Build
from hal.models.mlp import apply_norm
from hal.weights.sharding import ParameterSpec, StoredSlice


class Experts(nn.Module):
    """The router and the experts of a layer. Sources: arXiv 2101.03961, 2401.04088.

    Args:
        name: in the checkpoint ("layers.0.mlp"). parts: names of gate, up and down in an expert.

    Attributes:
        first, count: of the experts that this rank holds.
        gate_up: [count * 2 * size, hidden], of each expert the gate and then up. down: [count * size, hidden].
    """

    def __init__(self, config: ModelConfig, build: Build, name: str, parts: tuple[str, str, str]) -> None:
        super().__init__()
        c, e, t = config, config.experts, build.topology
        assert e is not None
        self.ops, self.communicator, self.eps, self.tp = build.ops, build.communicator, c.norm_eps, t.tp
        self.per_token, self.normalise = e.per_token, e.normalise
        self.count, self.size = e.count // t.ep, e.size // (t.tp // t.ep)
        self.first, start = t.ep_rank * self.count, t.tp_rank % (t.tp // t.ep) * self.size
        self.router = build.replicated(f"{name}.gate.weight", e.count, c.hidden_size)
        mine = range(self.first, self.first + self.count)
        gate, up, down = parts
        wide = tuple(StoredSlice(f"{name}.experts.{i}.{part}.weight", (e.size, c.hidden_size), 0, self.size, start)
                     for i in mine for part in (gate, up))
        back = tuple(StoredSlice(f"{name}.experts.{i}.{down}.weight", (c.hidden_size, e.size), 1, self.size, start,
                                 transposed=True) for i in mine)
        rows = self.count * self.size
        self.gate_up = build.parameter((2 * rows, c.hidden_size), ParameterSpec(0, 0, wide))
        self.down = build.parameter((rows, c.hidden_size), ParameterSpec(0, 0, back))

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None, norm: torch.Tensor | None,
                ) -> tuple[torch.Tensor, torch.Tensor]:
        """As GatedMLP."""
        x, residual = apply_norm(self.ops, x, residual, norm, self.eps)
        weights, chosen = F.linear(x, self.router).float().softmax(-1).topk(self.per_token, -1)
        if self.normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        y = self.ops.experts(x, weights, chosen, self)
        return (self.communicator.all_reduce(y) if self.tp > 1 else y), residual
