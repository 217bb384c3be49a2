"""Attention over a latent vector of each token as a part of a decoder layer. Source: arXiv 2405.04434."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hal.contracts.attention import ForwardContext
from hal.model_config import ModelConfig, RopeConfig
from hal.models.layers import Build, Linear, column, row
from hal.models.rope import head_order
from hal.weights import LinearSpec, Projection

_EPS = 1e-6  # of the norms of latents, whatever that of the other norms is


class LatentAttention(nn.Module):
    """As SelfAttention. The cache holds of each token the latent, from which the keys and values of all heads follow,
    and a rotary key that all heads share. The projection from latents to keys is moved to the queries, and the one to
    values behind the attention. So all heads attend to one key, the latent and the rotary key, whose first part is the
    value too.

    Args:
        name: in the checkpoint ("layers.0.self_attn").
        rope, rotary: the rotary embedding, and its number among those of a step.
    """

    order: torch.Tensor | None
    keys: torch.Tensor  # [heads, plain_dim, kv_rank]
    values: torch.Tensor  # [heads, kv_rank, value_dim]

    def __init__(self, config: ModelConfig, build: Build, name: str, rope: RopeConfig, rotary: int) -> None:
        super().__init__()
        c, a = config, config.latent
        assert a is not None
        self.ops, self.rotary = build.ops, rotary
        self.rank, self.plain, self.turned = a.kv_rank, a.plain_dim, c.head_dim
        self.heads, query = c.num_heads // build.topology.tp, c.num_heads * (a.plain_dim + c.head_dim)
        first = Projection(f"{name}.q_proj", query, c.num_heads)
        self.q_norm = self.q_up = None
        if a.q_rank:  # every rank has the whole latent: a projection of one head
            first = Projection(f"{name}.q_a_proj", a.q_rank, 1)
            self.q_norm = build.replicated(f"{name}.q_a_layernorm.weight", a.q_rank)
            self.q_up = column(build, a.q_rank, [Projection(f"{name}.q_b_proj", query, c.num_heads)], bias=False)
        latent = Projection(f"{name}.kv_a_proj_with_mqa", a.kv_rank + c.head_dim, 1)
        self.qkv = column(build, c.hidden_size, [first, latent], bias=False)
        self.kv_norm = build.replicated(f"{name}.kv_a_layernorm.weight", a.kv_rank)
        up = Projection(f"{name}.kv_b_proj", c.num_heads * (a.plain_dim + a.value_dim), c.num_heads)
        self.kv_up: Linear | None = Linear(build, LinearSpec(a.kv_rank, (up,), "out"), bias=False)
        self.out = row(build, f"{name}.o_proj", c.num_heads * a.value_dim, c.hidden_size, bias=False)
        order = head_order(rope, c.head_dim)
        self.register_buffer("order", None if order is None else torch.tensor(order, device=build.device), False)

    def arrange(self) -> None:
        """Divide the projection from latents into that of keys and that of values. It is called once, after the weights
        are filled."""
        if self.kv_up is None:
            return
        whole = self.kv_up.scheme.dequantize(self.kv_up).detach().view(self.heads, -1, self.rank)
        self.register_buffer("keys", whole[:, :self.plain].contiguous(), persistent=False)
        self.register_buffer("values", whole[:, self.plain:].transpose(1, 2).contiguous(), persistent=False)
        self.kv_up = None

    def forward(self, index: int, qkv: torch.Tensor, rotaries: Sequence[Any], context: ForwardContext) -> torch.Tensor:
        """As SelfAttention's."""
        ops, tail = self.ops, self.rank + self.turned
        q, latent, key = qkv[:, :-tail], qkv[:, -tail:-self.turned], qkv[:, -self.turned:]
        if self.q_up is not None:
            assert self.q_norm is not None
            q = self.q_up(ops.rms_norm(q, self.q_norm, _EPS))
        q = q.view(len(q), self.heads, -1)
        latent = ops.rms_norm(latent, self.kv_norm, _EPS).unsqueeze(1)
        turned = torch.cat((q[..., self.plain:], key.unsqueeze(1)), 1)
        if self.order is not None:
            turned = turned.index_select(-1, self.order)
        turned = ops.rotary(turned, rotaries[self.rotary])
        q = torch.cat((torch.einsum("nhd,hdr->nhr", q[..., :self.plain], self.keys), turned[:, :-1]), -1)
        k = torch.cat((latent, turned[:, -1:]), -1)
        x = context.attention(index, q, k, k[..., :self.rank]).view(len(q), self.heads, -1)
        y: torch.Tensor = self.out(torch.einsum("nhr,hrv->nhv", x, self.values).flatten(1))
        return y
