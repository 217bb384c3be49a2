"""Decoders that are put together from parts: attention, MLP or experts, norms, and tables of rotary angles.

A family is a subclass of Decoder that says what its layers are made of. The class itself is the Llama family: Llama 2
and 3, Mistral, Qwen2 and Qwen3, SmolLM3. Sources: arXiv 2302.13971 (Llama), 2305.13245 (grouped queries), 2505.09388
(Qwen3's q/k norm).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from hal.contracts.attention import ForwardContext
from hal.contracts.inputs import IntermediateTensors
from hal.model_config import ModelConfig, RopeConfig
from hal.models.attention import SelfAttention
from hal.models.causal_lm import CausalLM
from hal.models.delta import GatedDelta
from hal.models.latent import LatentAttention
from hal.models.layers import Build
from hal.models.mlp import GatedMLP
from hal.models.rope import cos_sin_table

Attention = SelfAttention | LatentAttention | GatedDelta


class Norms(NamedTuple):
    """Names of a layer's norms in the checkpoint; None where the family has none at this place. A norm before is of the
    part's input, one after of its output, before that is added to the residual."""

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None


class DecoderLayer(nn.Module):
    """Attention and an MLP (or experts), each with its norms.

    Args:
        attention: SelfAttention, or a module with its `qkv` and `forward`.
        norms: the weights at the four places of Norms, or None.
        mlp: a module called like GatedMLP.
    """

    def __init__(self, build: Build, eps: float, attention: Attention, mlp: nn.Module,
                 norms: Sequence[nn.Parameter | None]) -> None:
        super().__init__()
        self.ops, self.eps, self.attention, self.mlp = build.ops, eps, attention, mlp
        self.before_attention, self.after_attention, self.before_mlp, self.after_mlp = norms

    def forward(self, place: int, x: torch.Tensor, residual: torch.Tensor | None, shared: Sequence[Any],
                context: ForwardContext, rows: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(x, residual) -> (x, residual). In both, the sum is the hidden state. The model's first layer gets no
        residual. `place` counts the stage's layers with the same kind of cache. With `rows`, the results are those of
        these tokens."""
        ops, eps, attention = self.ops, self.eps, self.attention
        if self.before_attention is None:
            x, residual = ops.apply_norm(x, residual, None, eps)
            qkv = attention.qkv(x)
        else:
            qkv, residual = ops.norm_linear(attention.qkv, x, residual, self.before_attention, eps)
        x = attention(place, qkv, shared, context)
        if rows is not None:
            x, residual = x.index_select(0, rows), residual.index_select(0, rows)
        if self.after_attention is not None:
            x = ops.rms_norm(x, self.after_attention, eps)
        x, residual = self.mlp(x, residual, self.before_mlp)
        if self.after_mlp is not None:
            x = ops.rms_norm(x, self.after_mlp, eps)
        return x, residual


class Decoder(CausalLM):
    """Attributes:
        norms: names of a layer's norms.
        norm: how norm weights are kept: their dtype if it is not the model's (fp32: the product with the weight is
            rounded once), and what is added to the stored values.
        fused: the checkpoint stores q, k and v as one tensor, and gate and up as one.
    """

    intermediates = ("hidden_states", "residual")
    selects_rows = True
    norms = Norms()
    norm: dict[str, Any] = {}
    fused_qkv = fused_mlp = False

    def __init__(self, config: ModelConfig, build: Build) -> None:
        super().__init__(config, build)
        ropes = [config.layer_rope(i) for i in self.stage]
        self.ropes: list[RopeConfig] = list(dict.fromkeys(rope for rope in ropes if rope is not None))
        for i, rope in enumerate(self.ropes):
            table = cos_sin_table(rope, config.head_dim, config.max_position, build.device, build.longest)
            self.register_buffer(f"rope_table{i}", table, persistent=False)
        self.embedding_scale = torch.tensor(config.embedding_scale, dtype=self.dtype).item()  # rounded as the others do
        self.layers = nn.ModuleList(self.make_layer(build, i) for i in self.stage)
        self.final_norm: nn.Parameter | None = None
        if self.topology.is_last_stage:
            self.final_norm = build.replicated("norm.weight", config.hidden_size, **self.norm)

    def make_layer(self, build: Build, index: int) -> DecoderLayer:
        """A layer of the whole model, by its number."""
        norms = [None if name is None else build.replicated(f"layers.{index}.{name}.weight", self.config.hidden_size,
                                                            **self.norm) for name in self.norms]
        return DecoderLayer(build, self.config.norm_eps, self.make_attention(build, index), self.make_mlp(build, index),
                            norms)

    def make_attention(self, build: Build, index: int) -> Attention:
        rope = self.config.layer_rope(index)
        return SelfAttention(self.config, build, f"layers.{index}.self_attn", rope,
                             None if rope is None else self.ropes.index(rope), fused=self.fused_qkv, norm=self.norm)

    def make_mlp(self, build: Build, index: int) -> nn.Module:
        return GatedMLP(self.config, build, f"layers.{index}.mlp", self.config.intermediate_size, fused=self.fused_mlp)

    def begin_layers(self, positions: torch.Tensor, context: ForwardContext) -> list[Any]:
        """Values that the layers of a step share: those of each rotary embedding, by its number."""
        return [self.ops.begin_rotary(positions, self.get_buffer(f"rope_table{i}"), self.dtype)
                for i in range(len(self.ropes))]

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, context: ForwardContext,
                intermediate: IntermediateTensors | None = None) -> torch.Tensor | IntermediateTensors:
        residual: torch.Tensor | None
        if intermediate is None:
            x, residual = self.embed(input_ids), None
            if self.config.embedding_scale != 1.0:
                x = x * self.embedding_scale
        else:
            x, residual = intermediate["hidden_states"], intermediate["residual"]
        shared = self.begin_layers(positions, context)
        taps = context.taps
        for index, layer in enumerate(self.layers):
            if taps is not None and index in taps:
                taps[index] = x if residual is None else x + residual
            rows = context.rows if index == len(self.layers) - 1 and self.topology.is_last_stage else None
            x, residual = layer(self.places[index], x, residual, shared, context, rows)
        assert residual is not None
        if not self.topology.is_last_stage:
            return self.make_intermediate(x, residual)
        assert self.final_norm is not None
        return self.ops.add_rms_norm(x, residual, self.final_norm, self.config.norm_eps)[0]
