"""Self-attention as a part of a decoder layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hal.contracts.attention import ForwardContext
from hal.errors import ModelLoadError
from hal.model_config import ModelConfig, RopeConfig
from hal.models.layers import Build, Linear, column, row
from hal.models.ops import HeadNorms
from hal.models.rope import head_order
from hal.weights import Projection
from hal.weights.sharding import ParameterSpec, StoredSlice


def local_heads(config: ModelConfig, tp: int) -> tuple[int, int]:
    """Heads and key-value heads of one rank; key-value heads are replicated when there are fewer than ranks."""
    return config.num_heads // tp, max(config.num_kv_heads // tp, 1)


class SelfAttention(nn.Module):
    """Attention between its first and its last projection. The layer computes the first one, `qkv`, together with the
    norm before it.

    Args:
        name: in the checkpoint ("layers.0.self_attn").
        rope, rotary: the layer's rotary embedding, and its number among those of a step; None: there is none.
        fused: the checkpoint stores q, k and v as one tensor, qkv_proj.
        gated: the sigmoid of a further projection multiplies the attention's output. The checkpoint stores it together
            with q, after each head.
        norm: what the weights of the norms of q and k are made with: dtype, and what is added to them.
    """

    order: torch.Tensor | None
    outputs: torch.Tensor | None  # of qkv, in the order q, k, v, gate

    def __init__(self, config: ModelConfig, build: Build, name: str, rope: RopeConfig | None, rotary: int | None, *,
                 fused: bool = False, gated: bool = False, norm: dict[str, Any] | None = None) -> None:
        super().__init__()
        c, norm = config, norm or {}
        self.ops, self.communicator, self.eps, self.head_dim = build.ops, build.communicator, c.norm_eps, c.head_dim
        self.dtype = build.dtype
        self.tp, self.rotary, self.kind = build.topology.tp, rotary, "none"
        self.heads, self.kv_heads = local_heads(c, self.tp)
        self.qkv = column(build, c.hidden_size, _projections(c, name, fused, gated), bias=c.qkv_bias)
        self.q_norm = self.k_norm = None
        if c.qk_norm:
            self.kind = "projection" if c.qk_norm_whole else "head"
        if self.kind == "head":
            self.q_norm, self.k_norm = (build.replicated(f"{name}.{x}_norm.weight", c.head_dim, **norm) for x in "qk")
        elif self.kind == "projection":
            self.q_norm, self.k_norm = (build.of_heads(f"{name}.{x}_norm.weight", heads, c.head_dim, **norm)
                                        for x, heads in (("q", c.num_heads), ("k", c.num_kv_heads)))
            # Ranks that share key-value heads add the same squares.
            copies = max(self.tp // c.num_kv_heads, 1)
            self.sizes = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim * copies
        self.out = row(build, f"{name}.o_proj", c.num_heads * c.head_dim, c.hidden_size, bias=c.out_bias)
        order = None if rope is None else head_order(rope, c.head_dim)
        self.register_buffer("order", None if order is None else torch.tensor(order, device=build.device), False)
        outputs = None
        if gated:
            q = torch.arange(2 * self.heads * c.head_dim).view(self.heads, 2, c.head_dim)
            kv = torch.arange(q.numel(), q.numel() + 2 * self.kv_heads * c.head_dim)
            outputs = torch.cat((q[:, 0].flatten(), kv, q[:, 1].flatten())).to(build.device)
        self.register_buffer("outputs", outputs, False)
        self.arranged = False
        self.kv_scales: nn.Parameter | None = None
        self.kv_factors: torch.Tensor | None = None
        if (c.quantization or {}).get("kv_cache_scheme"):
            stored = tuple(StoredSlice(f"{name}.{x}_scale", (1,), 0, 1) for x in "kv")
            self.kv_scales = build.parameter((2,), ParameterSpec(None, 0, stored), torch.float32)

    def scale_cache(self) -> float:
        """Keep keys and values divided by the checkpoint's scales from now on, so that they use the range of a cache in
        fp8. Returns the factor of scores that makes up for it.

        Raises:
            ModelLoadError: a scale is not above 0.
        """
        if self.kv_scales is None:
            return 1.0
        k, v = self.kv_scales.tolist()
        if min(k, v) <= 0:
            raise ModelLoadError("a scale of the KV cache in the checkpoint is not above 0", got=f"{k} and {v}")
        factors = torch.tensor([1.0] * self.heads + [1 / k] * self.kv_heads + [1 / v] * self.kv_heads)
        self.kv_factors, self.v_scale = factors.view(-1, 1).to(self.kv_scales.device, self.dtype), v
        return float(k)

    def arrange(self) -> None:
        """Put the outputs of q and k into the order in which the rotary embedding wants them, and the outputs of a gate
        behind the others. It is called once, after the weights are filled. Where the weights are not dense, the outputs
        are put in order in every step."""
        if not isinstance(self.qkv, Linear) or not self.qkv.is_dense:
            return
        for parameter in (self.qkv.weight, self.qkv.bias) if self.outputs is not None else ():
            if parameter is not None:
                parameter.data.copy_(parameter.data[self.outputs])
        self.arranged = True
        if self.order is None:
            return
        qk = self.heads + self.kv_heads
        stored = [(self.qkv.weight, qk), (self.qkv.bias, qk), (self.q_norm, -1), (self.k_norm, -1)]
        for parameter, count in stored:
            if parameter is not None:
                rows = parameter.data[:count * self.head_dim] if count > 0 else parameter.data
                heads = rows.view(count, self.head_dim, *rows.shape[1:])
                heads.copy_(heads[:, self.order])

    def forward(self, index: int, qkv: torch.Tensor, rotaries: Sequence[Any], context: ForwardContext) -> torch.Tensor:
        """qkv [n, outputs of this rank] -> [n, hidden_size]. `index` counts the stage's layers with attention."""
        kv, heads, gate = self.kv_heads, self.heads, None
        if self.outputs is not None:
            qkv = qkv if self.arranged else qkv.index_select(1, self.outputs)
            qkv, gate = torch.split(qkv, [(heads + 2 * kv) * self.head_dim, heads * self.head_dim], 1)
        if self.kind == "projection":
            qkv = self._norm_projections(qkv)
        qkv = qkv.view(-1, heads + 2 * kv, self.head_dim)
        norms, late = None, None if self.arranged else self.order
        if self.kind == "head":
            assert self.q_norm is not None and self.k_norm is not None
            norms = HeadNorms(self.q_norm, self.k_norm, self.eps)
        if norms is not None and (self.rotary is None or late is not None or self.kv_factors is not None):
            qkv, norms = self.ops.norm_heads(qkv, norms, kv), None
        if late is not None:
            qkv = torch.cat((qkv[:, :-kv].index_select(-1, late), qkv[:, -kv:]), 1)
        if self.kv_factors is not None:
            qkv = qkv * self.kv_factors
        if self.rotary is None:
            x = context.attention(index, qkv[:, :heads], qkv[:, heads:-kv], qkv[:, -kv:])
        else:
            x = self.ops.rotary_attention(context.attention, index, qkv, kv, rotaries[self.rotary], norms)
        if gate is not None:
            x = x * gate.sigmoid()
        y: torch.Tensor = self.out(x if self.kv_factors is None else x * self.v_scale)
        return y

    def _norm_projections(self, qkv: torch.Tensor) -> torch.Tensor:
        """The norm over all heads of q, and over all of k, which tp may shard."""
        assert self.q_norm is not None and self.k_norm is not None
        kv = self.kv_heads * self.head_dim
        q, k, v = qkv[:, :-2 * kv], qkv[:, -2 * kv:-kv], qkv[:, -kv:]
        if self.tp == 1:
            return torch.cat((self.ops.rms_norm(q, self.q_norm, self.eps), self.ops.rms_norm(k, self.k_norm, self.eps),
                              v), -1)
        squares = torch.stack([x.float().square().sum(-1) for x in (q, k)], -1)
        sums = self.communicator.all_reduce(squares).chunk(2, -1)
        wide = (x.float() * (total / size + self.eps).rsqrt() * weight for x, total, size, weight in
                zip((q, k), sums, self.sizes, (self.q_norm, self.k_norm), strict=True))
        return torch.cat((*(x.to(v.dtype) for x in wide), v), -1)


def _projections(c: ModelConfig, name: str, fused: bool, gated: bool) -> list[Projection]:
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    parts = ("q_proj", q, c.num_heads, 0), ("k_proj", kv, c.num_kv_heads, q), ("v_proj", kv, c.num_kv_heads, q + kv)
    if gated:
        parts = ("q_proj", 2 * q, c.num_heads, 0), *parts[1:]
    if fused:
        return [Projection(f"{name}.qkv_proj", size, heads, start, q + 2 * kv) for _, size, heads, start in parts]
    return [Projection(f"{name}.{part}", size, heads) for part, size, heads, _ in parts]
