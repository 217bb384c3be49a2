"""GPT-2: a pre-norm decoder with LayerNorm and learned positions. Source: Radford et al. 2019."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from hal.contracts.attention import ForwardContext
from hal.contracts.inputs import IntermediateTensors
from hal.model_config import ModelConfig
from hal.models.attention import local_heads
from hal.models.causal_lm import CausalLM
from hal.models.layers import Build, column, row
from hal.weights import Projection


class GPT2Layer(nn.Module):
    def __init__(self, config: ModelConfig, build: Build, index: int) -> None:
        super().__init__()
        c, name = config, f"h.{index}"
        self.ops, self.eps, self.act, self.head_dim = build.ops, c.norm_eps, c.activation, c.head_dim
        self.heads, _ = local_heads(c, build.topology.tp)
        self.attn_norm = build.replicated(f"{name}.ln_1.weight", c.hidden_size)
        self.attn_norm_bias = build.replicated(f"{name}.ln_1.bias", c.hidden_size)
        parts = [Projection(f"{name}.attn.c_attn", c.hidden_size, c.num_heads, start, 3 * c.hidden_size)
                 for start in (0, c.hidden_size, 2 * c.hidden_size)]
        self.qkv = column(build, c.hidden_size, parts, bias=True, transposed=True)
        self.out = row(build, f"{name}.attn.c_proj", c.hidden_size, c.hidden_size, bias=True, transposed=True)
        self.mlp_norm = build.replicated(f"{name}.ln_2.weight", c.hidden_size)
        self.mlp_norm_bias = build.replicated(f"{name}.ln_2.bias", c.hidden_size)
        self.up = column(build, c.hidden_size, [Projection(f"{name}.mlp.c_fc", c.intermediate_size)], bias=True,
                         transposed=True)
        self.down = row(build, f"{name}.mlp.c_proj", c.intermediate_size, c.hidden_size, bias=True, transposed=True)

    def forward(self, index: int, x: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        normed = self.ops.layer_norm(x, self.attn_norm, self.attn_norm_bias, self.eps)
        q, k, v = self.qkv(normed).view(-1, 3, self.heads, self.head_dim).unbind(1)
        x = x + self.out(context.attention(index, q, k, v))
        normed = self.ops.layer_norm(x, self.mlp_norm, self.mlp_norm_bias, self.eps)
        x += self.down(self.ops.activation(self.up(normed), self.act))
        return x


class GPT2(CausalLM):
    intermediates = ("hidden_states",)

    def __init__(self, config: ModelConfig, build: Build) -> None:
        super().__init__(config, build)
        self.layers = nn.ModuleList(GPT2Layer(config, build, i) for i in self.stage)
        if self.topology.is_first_stage:
            self.positions = build.replicated("wpe.weight", config.max_position, config.hidden_size)
        if self.topology.is_last_stage:
            self.norm = build.replicated("ln_f.weight", config.hidden_size)
            self.norm_bias = build.replicated("ln_f.bias", config.hidden_size)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, context: ForwardContext,
                intermediate: IntermediateTensors | None = None) -> torch.Tensor | IntermediateTensors:
        if intermediate is None:
            x = self.embed(input_ids) + F.embedding(positions, self.positions)
        else:
            x = intermediate["hidden_states"]
        for index, layer in enumerate(self.layers):
            if context.taps is not None and index in context.taps:
                context.taps[index] = x
            x = layer(index, x, context)
        if not self.topology.is_last_stage:
            return self.make_intermediate(x)
        return self.ops.layer_norm(x, self.norm, self.norm_bias, self.config.norm_eps)
