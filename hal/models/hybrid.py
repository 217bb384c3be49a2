"""Families of decoders of which some layers keep a state per row."""

from __future__ import annotations

from typing import Any

import torch

from hal.contracts.attention import ForwardContext
from hal.contracts.cache import LayerCache
from hal.model_config import ModelConfig
from hal.models.attention import SelfAttention
from hal.models.decoder import Attention
from hal.models.delta import GatedDelta
from hal.models.layers import Build
from hal.models.mixture import QwenMoe


class Hybrid(QwenMoe):
    """Qwen3-Next and Qwen3.5 (text): gated delta rules, and some layers of gated attention."""

    norm = {"dtype": torch.float32, "added": 1.0}

    def __init__(self, config: ModelConfig, build: Build) -> None:
        super().__init__(config, build)
        self.ignored = (*self.ignored, "mtp.", "visual.")  # for further tokens, and for images

    def declare_caches(self, build: Build) -> list[LayerCache]:
        d = self.config.delta
        assert d is not None
        return [GatedDelta.cache(d, build) if i in d.layers else cache
                for i, cache in enumerate(super().declare_caches(build))]

    def make_attention(self, build: Build, index: int) -> Attention:
        c, rope = self.config, self.config.layer_rope(index)
        assert c.delta is not None and rope is not None
        if index in c.delta.layers:
            return GatedDelta(c, build, f"layers.{index}.linear_attn")
        return SelfAttention(c, build, f"layers.{index}.self_attn", rope, self.ropes.index(rope), gated=True,
                             norm=self.norm)

    def begin_layers(self, positions: torch.Tensor, context: ForwardContext) -> list[Any]:
        d = self.config.delta
        assert d is not None
        return [*super().begin_layers(positions, context), self.ops.begin_delta(context.model_input, d.taps)]
