"""Llama 2 and 3, Mistral, Qwen2, Qwen3: pre-norm decoders with RMSNorm, rotary embedding and a gated MLP.

Sources: arXiv 2302.13971 (Llama), 2305.13245 (grouped queries), 2002.05202 (SwiGLU), 2505.09388 (Qwen3's q/k norm).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hal.contracts.attention import ForwardContext
from hal.contracts.inputs import IntermediateTensors
from hal.model_config import ModelConfig
from hal.models.causal_lm import CausalLM, local_heads
from hal.models.layers import Build, column, row
from hal.models.rope import cos_sin_table
from hal.weights import Projection


class LlamaLayer(nn.Module):
    def __init__(self, config: ModelConfig, build: Build, index: int) -> None:
        super().__init__()
        c, name = config, f"layers.{index}"
        self.ops, self.eps, self.head_dim = build.ops, c.norm_eps, c.head_dim
        self.heads, self.kv_heads = local_heads(c, build.topology.tp)
        self.attn_norm = build.replicated(f"{name}.input_layernorm.weight", c.hidden_size)
        q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.qkv = column(build, c.hidden_size, (Projection(f"{name}.self_attn.q_proj", q, c.num_heads),
                                                 Projection(f"{name}.self_attn.k_proj", kv, c.num_kv_heads),
                                                 Projection(f"{name}.self_attn.v_proj", kv, c.num_kv_heads)),
                          bias=c.qkv_bias)
        self.q_norm = build.replicated(f"{name}.self_attn.q_norm.weight", c.head_dim) if c.qk_norm else None
        self.k_norm = build.replicated(f"{name}.self_attn.k_norm.weight", c.head_dim) if c.qk_norm else None
        self.out = row(build, f"{name}.self_attn.o_proj", q, c.hidden_size, bias=c.out_bias)
        self.mlp_norm = build.replicated(f"{name}.post_attention_layernorm.weight", c.hidden_size)
        self.gate_up = column(build, c.hidden_size, (Projection(f"{name}.mlp.gate_proj", c.intermediate_size),
                                                     Projection(f"{name}.mlp.up_proj", c.intermediate_size)),
                              bias=c.mlp_bias)
        self.down = row(build, f"{name}.mlp.down_proj", c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, index: int, x: torch.Tensor, residual: torch.Tensor | None, rotary: Any,
                context: ForwardContext) -> tuple[torch.Tensor, torch.Tensor]:
        """(x, residual) -> (x, residual). In both, the sum is the hidden state. The model's first layer gets no
        residual."""
        ops, kv = self.ops, self.kv_heads
        qkv, residual = ops.norm_linear(self.qkv, x, residual, self.attn_norm, self.eps)
        qkv = qkv.view(-1, self.heads + 2 * kv, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            qkv = torch.cat((ops.rms_norm(qkv[:, :self.heads], self.q_norm, self.eps),
                             ops.rms_norm(qkv[:, self.heads:-kv], self.k_norm, self.eps), qkv[:, -kv:]), 1)
        x = self.out(ops.rotary_attention(context.attention, index, qkv, kv, rotary))
        x, residual = ops.norm_linear(self.gate_up, x, residual, self.mlp_norm, self.eps, gated=True)
        return self.down(x), residual


class Llama(CausalLM):
    intermediates = ("hidden_states", "residual")

    def __init__(self, config: ModelConfig, build: Build) -> None:
        super().__init__(config, build)
        assert config.rope is not None
        self.layers = nn.ModuleList(LlamaLayer(config, build, i) for i in self.stage)
        table = cos_sin_table(config.rope, config.head_dim, config.max_position, build.device)
        self.register_buffer("rope_table", table, persistent=False)
        if self.topology.is_last_stage:
            self.norm = build.replicated("norm.weight", config.hidden_size)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, context: ForwardContext,
                intermediate: IntermediateTensors | None = None) -> torch.Tensor | IntermediateTensors:
        residual: torch.Tensor | None
        if intermediate is None:
            x, residual = self.embed(input_ids), None
        else:
            x, residual = intermediate["hidden_states"], intermediate["residual"]
        rotary = self.ops.begin_rotary(positions, self.get_buffer("rope_table"), self.dtype)
        taps = context.taps
        for index, layer in enumerate(self.layers):
            if taps is not None and index in taps:
                taps[index] = x if residual is None else x + residual
            x, residual = layer(index, x, residual, rotary, context)
        assert residual is not None
        if not self.topology.is_last_stage:
            return self.make_intermediate(x, residual)
        return self.ops.add_rms_norm(x, residual, self.norm, self.config.norm_eps)[0]
