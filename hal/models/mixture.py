"""Families of decoders whose layers have a mixture of experts in place of the MLP."""

from __future__ import annotations

from torch import nn

from hal.models.decoder import Decoder
from hal.models.experts import Experts
from hal.models.layers import Build


class QwenMoe(Decoder):
    """Qwen3-MoE. Source: arXiv 2505.09388."""

    block, parts = "mlp", ("gate_proj", "up_proj", "down_proj")

    def make_mlp(self, build: Build, index: int) -> nn.Module:
        experts = self.config.experts
        if experts is None or index not in experts.layers:
            return super().make_mlp(build, index)
        return Experts(self.config, build, f"layers.{index}.{self.block}", self.parts)


class Mixtral(QwenMoe):
    """Source: arXiv 2401.04088."""

    block, parts = "block_sparse_moe", ("w1", "w3", "w2")
