"""The gated MLP as a part of a decoder layer."""

from __future__ import annotations

import torch
from torch import nn

from hal.model_config import ModelConfig
from hal.models.layers import Build, column, row
from hal.weights import Projection


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)), where x is the norm of a sum (arXiv 2002.05202).

    Args:
        name: in the checkpoint ("layers.0.mlp"). size: of the inner layer.
        fused: the checkpoint stores gate and up as one tensor, gate_up_proj.
    """

    def __init__(self, config: ModelConfig, build: Build, name: str, size: int, *, fused: bool = False) -> None:
        super().__init__()
        c = config
        self.ops, self.eps, self.kind = build.ops, c.norm_eps, c.activation
        parts = ([Projection(f"{name}.gate_up_proj", size, None, start, 2 * size) for start in (0, size)] if fused else
                 [Projection(f"{name}.{part}_proj", size) for part in ("gate", "up")])
        self.gate_up = column(build, c.hidden_size, parts, bias=c.mlp_bias)
        self.down = row(build, f"{name}.down_proj", size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None, norm: torch.Tensor | None,
                ) -> tuple[torch.Tensor, torch.Tensor]:
        """The MLP of the norm of x + residual, and that sum; see Ops.apply_norm."""
        if norm is None or self.kind != "silu":
            x, residual = self.ops.apply_norm(x, residual, norm, self.eps)
            return self.down(self.ops.gated(self.gate_up(x), self.kind)), residual
        x, residual = self.ops.norm_linear(self.gate_up, x, residual, norm, self.eps, gated=True)
        return self.down(x), residual
