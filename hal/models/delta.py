"""The gated delta rule as a part of a decoder layer, in place of attention. Source: arXiv 2412.06464."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hal.contracts.attention import ForwardContext
from hal.contracts.cache import RowState
from hal.model_config import DeltaConfig, ModelConfig
from hal.models.delta_rule import CHUNK, Spans, chunk_rule
from hal.models.layers import Build, column, row
from hal.schema import Array
from hal.weights import Projection
from hal.weights.sharding import ParameterSpec, StoredSlice


class GatedDelta(nn.Module):
    """As SelfAttention, but its cache is a RowState: the last inputs of the convolution, and a matrix of each head.

    Args:
        name: in the checkpoint ("layers.0.linear_attn").

    Attributes:
        conv: [channels, taps] of this rank. rates, bias: [value heads of this rank] in fp32, from which decays come.
    """

    def __init__(self, config: ModelConfig, build: Build, name: str) -> None:
        super().__init__()
        c, d, tp = config, config.delta, build.topology.tp
        assert d is not None
        self.ops, self.eps, self.dtype, self.config = build.ops, c.norm_eps, build.dtype, d
        self.key_heads, self.heads = d.key_heads // tp, d.value_heads // tp
        self.sizes = [size // tp for size in (d.keys, d.keys, d.values)]  # of q, k and v
        self.qkv = column(build, c.hidden_size, _projections(d, name), bias=False)
        channels = 2 * d.keys + d.values
        parts = [StoredSlice(f"{name}.conv1d.weight", (channels, 1, d.taps), 0, size, start, tp)
                 for start, size in ((0, d.keys), (d.keys, d.keys), (2 * d.keys, d.values))]
        self.conv = build.parameter((channels // tp, d.taps), ParameterSpec(0, 0, tuple(parts)))
        self.rates, self.bias = (build.of_heads(f"{name}.{x}", d.value_heads, 1, torch.float32)
                                 for x in ("A_log", "dt_bias"))
        self.norm = build.replicated(f"{name}.norm.weight", d.value_dim)
        self.out = row(build, f"{name}.out_proj", d.values, c.hidden_size, bias=False)

    @staticmethod
    def cache(d: DeltaConfig, build: Build) -> RowState:
        """Of a layer, on one rank."""
        tp, dtype = build.topology.tp, str(build.dtype).removeprefix("torch.")
        return RowState({"conv": Array(dtype, d.taps - 1, (2 * d.keys + d.values) // tp),
                         "state": Array("float32", d.value_heads // tp, d.key_dim, d.value_dim)})

    def step_bytes(self, tokens: int) -> int:
        """Of the chunks of a step of so many tokens. An estimate from above."""
        return 4 * tokens * self.heads * (5 * CHUNK + 8 * self.config.key_dim + 5 * self.config.value_dim)

    def forward(self, place: int, x: torch.Tensor, shared: Sequence[Any], context: ForwardContext) -> torch.Tensor:
        """x [n, outputs of this rank] -> [n, hidden_size]. `place` counts the stage's layers with a state. The last of
        `shared` are the step's Spans, or None where each sequence has one token."""
        assert context.states is not None
        spans: Spans | None = shared[-1]
        found = context.states.read(place)
        mixed, gate, coefficients = self._split(x)
        mixed, conv = self._convolve(mixed, found["conv"], spans)
        q, k, v = (part.float().view(len(x), heads, -1) for part, heads in zip(
            torch.split(mixed, self.sizes, 1), (self.key_heads, self.key_heads, self.heads), strict=True))
        q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
        q, k = ((x.repeat_interleave(self.heads // self.key_heads, 1)) for x in (q * q.shape[-1] ** -0.5, k))
        strength, rate = coefficients.float().chunk(2, 1)
        decay = -self.rates.exp() * F.softplus(rate + self.bias)
        state = found["state"]
        out = (self.ops.delta_step(q, k, v, decay, strength.sigmoid(), state) if spans is None else
               self._rule(q, k, v, decay, strength.sigmoid(), state, spans))
        context.states.write(place, conv=conv, state=state)
        out = self.ops.rms_norm(out.to(self.dtype), self.norm, self.eps)
        y: torch.Tensor = self.out((out.float() * F.silu(gate.float())).to(self.dtype).flatten(1))
        return y

    def _split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The inputs of the convolution [n, channels], the gate [n, heads, value_dim], and [n, 2 * heads]."""
        values, heads = self.sizes[2], self.heads
        if self.config.split:
            mixed, gate, rest = torch.split(x, [sum(self.sizes), values, 2 * heads], 1)
            return mixed, gate.view(len(x), heads, -1), rest
        groups, each = self.key_heads, values // self.key_heads
        wide, rest = torch.split(x, [sum(self.sizes) + values, 2 * heads], 1)
        key = self.config.key_dim
        *parts, gate = torch.split(wide.view(len(x), groups, -1), [key, key, each, each], 2)
        rest = torch.cat([part.flatten(1) for part in rest.view(len(x), groups, -1).chunk(2, 2)], 1)
        return torch.cat([part.flatten(1) for part in parts], 1), gate.reshape(len(x), heads, -1), rest

    def _convolve(self, x: torch.Tensor, state: torch.Tensor, spans: Spans | None) -> tuple[torch.Tensor, torch.Tensor]:
        """SiLU of the convolution, and the next state."""
        if spans is None:
            window = torch.cat((state, x.unsqueeze(1)), 1)
            return F.silu((window.float() * self.conv.t().float()).sum(1).to(x.dtype)), window[:, 1:]
        rows, total = torch.cat((state.flatten(0, 1), x)), torch.zeros_like(x, dtype=torch.float32)
        for at, tap in zip(spans.taps.unbind(1), self.conv.float().unbind(1), strict=True):
            total.addcmul_(rows.index_select(0, at).float(), tap)
        return F.silu(total.to(x.dtype)), rows[spans.kept]

    def _rule(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, strength: torch.Tensor,
              state: torch.Tensor, spans: Spans) -> torch.Tensor:
        """Of a step with several tokens of a sequence."""
        n, parts = spans.decodes, list[torch.Tensor]()
        if n:
            parts.append(self.ops.delta_step(q[:n], k[:n], v[:n], decay[:n], strength[:n], state[:n]))
        if spans.rounds:
            # Padding gets no value of another sequence's token, which may be NaN.
            padding, shape = ~spans.real.flatten(), spans.real.shape
            q, k, v, decay, strength = (
                x.index_select(0, spans.token_of).masked_fill_(padding.view(-1, *[1] * (x.ndim - 1)), 0)
                .view(*shape, *x.shape[1:]).transpose(1, 2) for x in (q, k, v, decay, strength))
            out = chunk_rule(q, k, v, decay, strength, state, spans.rounds).transpose(1, 2).flatten(0, 1)
            parts.append(out.index_select(0, spans.place_of))
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def _projections(d: DeltaConfig, name: str) -> list[Projection]:
    groups, heads = d.key_heads, d.value_heads
    if not d.split:
        return [Projection(f"{name}.in_proj_qkvz", 2 * (d.keys + d.values), groups),
                Projection(f"{name}.in_proj_ba", 2 * heads, groups)]
    whole = 2 * d.keys + d.values
    return [*(Projection(f"{name}.in_proj_qkv", size, groups, start, whole)
              for start, size in ((0, d.keys), (d.keys, d.keys), (2 * d.keys, d.values))),
            Projection(f"{name}.in_proj_z", d.values, groups),
            *(Projection(f"{name}.in_proj_{x}", heads, groups) for x in "ba")]
