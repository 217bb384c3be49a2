"""BERT and RoBERTa: encoders with LayerNorm after each part and learned positions. Sources: arXiv 1810.04805,
1907.11692."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hal.contracts.attention import ForwardContext
from hal.contracts.inputs import IntermediateTensors
from hal.model_config import ModelConfig
from hal.models.attention import local_heads
from hal.models.causal_lm import CausalLM
from hal.models.layers import Build, column, row
from hal.models.ops import Ops
from hal.weights import Projection


class Norm(nn.Module):
    """A LayerNorm with its weight and bias."""

    def __init__(self, build: Build, name: str, size: int, eps: float) -> None:
        super().__init__()
        self.ops: Ops = build.ops
        self.eps = eps
        self.weight, self.bias = (build.replicated(f"{name}.{part}", size) for part in ("weight", "bias"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ops.layer_norm(x, self.weight, self.bias, self.eps)


class BertLayer(nn.Module):
    def __init__(self, config: ModelConfig, build: Build, index: int) -> None:
        super().__init__()
        c, name = config, f"encoder.layer.{index}"
        size, inner = c.hidden_size, c.intermediate_size
        self.ops, self.act = build.ops, c.activation
        self.heads, _ = local_heads(c, build.topology.tp)
        self.qkv = column(build, size, [Projection(f"{name}.attention.self.{part}", size, c.num_heads)
                                        for part in ("query", "key", "value")], bias=True)
        self.out = row(build, f"{name}.attention.output.dense", size, size, bias=True)
        self.attention_norm = Norm(build, f"{name}.attention.output.LayerNorm", size, c.norm_eps)
        self.up = column(build, size, [Projection(f"{name}.intermediate.dense", inner)], bias=True)
        self.down = row(build, f"{name}.output.dense", inner, size, bias=True)
        self.mlp_norm = Norm(build, f"{name}.output.LayerNorm", size, c.norm_eps)

    def forward(self, index: int, x: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        qkv = self.qkv(x)
        q, k, v = qkv.view(len(qkv), 3, self.heads, -1).unbind(1)
        x = self.attention_norm(x + self.out(context.attention(index, q, k, v)))
        inner = self.ops.activation(self.up(x), self.act)
        y: torch.Tensor = self.mlp_norm(x + self.down(inner))
        return y


class Bert(CausalLM):
    """The encoder alone. The pooler and the heads for training, which checkpoints may have, are not read."""

    intermediates = ("hidden_states",)
    ignored = ("embeddings.position_ids", *(f"{layer}.{part}" for part in ("weight", "bias") for layer in (
        "pooler.dense", "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm",
        "cls.predictions.decoder", "cls.seq_relationship", "lm_head.dense", "lm_head.layer_norm", "lm_head.decoder")),
        "cls.predictions.bias", "lm_head.bias")

    def __init__(self, config: ModelConfig, build: Build) -> None:
        super().__init__(config, build)
        extra: dict[str, Any] = config.extra or {}
        self.first_position: int = extra["first_position"]
        if self.topology.is_first_stage:
            rows = config.max_position + self.first_position
            self.positions = build.replicated("embeddings.position_embeddings.weight", rows, config.hidden_size)
            self.types = build.replicated("embeddings.token_type_embeddings.weight", extra["token_types"],
                                          config.hidden_size)
            self.norm = Norm(build, "embeddings.LayerNorm", config.hidden_size, config.norm_eps)
        self.layers = nn.ModuleList(BertLayer(config, build, i) for i in self.stage)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, context: ForwardContext,
                intermediate: IntermediateTensors | None = None) -> torch.Tensor | IntermediateTensors:
        if intermediate is None:  # a text alone has the token type 0
            x = self.embed(input_ids) + F.embedding(positions + self.first_position, self.positions) + self.types[0]
            x = self.norm(x)
        else:
            x = intermediate["hidden_states"]
        for index, layer in enumerate(self.layers):
            x = layer(index, x, context)
        return x if self.topology.is_last_stage else self.make_intermediate(x)
