"""The operations of a model as one table. A device overrides the methods that it does better."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

from hal.models.delta_rule import CHUNK, Spans, find_spans, step_rule
from hal.schema.packed import on_host
from hal.weights.dense import DENSE

if TYPE_CHECKING:
    from hal.contracts.attention import LayerAttention
    from hal.contracts.inputs import ModelInput
    from hal.models.experts import Experts
    from hal.models.layers import Linear, Unmerged


class HeadNorms(NamedTuple):
    """Gains of the RMS norms of each head of q and of k, [head_dim]."""

    q: torch.Tensor
    k: torch.Tensor
    eps: float


_EXPERT_VALUES = 1 << 25  # values of experts' inner and outer layers that exist at once


class Ops:
    """The operations in plain PyTorch. They round where transformers rounds, and no result shares memory with an
    argument. Unless a method says otherwise, x is [num_tokens, hidden] in the model's dtype.

    Attributes:
        schemes: names of the weight schemes that `linear` multiplies by; None: all of them. A model with another scheme
            is refused when it is built. A subclass with a `linear` of its own takes dense weights alone unless it
            declares its schemes.
        batch_invariant: a token's results depend on no other token of the step, so a scheme that mixes rows is refused
            when a model is built.
    """

    schemes: tuple[str, ...] | None = None
    batch_invariant = False
    traced = False  # a step is traced, so no value of a tensor can be looked at

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "linear" in vars(cls) and "schemes" not in vars(cls):
            cls.schemes = (DENSE.name,)

    def linear(self, x: torch.Tensor, layer: Linear) -> torch.Tensor:
        """x [n, in] times the layer's weight, transposed, plus its bias -> [n, out], all of this rank.

        A dense layer (`layer.is_dense`) has `layer.weight` [out, in], or what `pack_linear` made of it. Every layer has
        `layer.bias` [out] or None. Any other weight is stored as `layer.scheme` declares, and
        `layer.scheme.linear(x, layer)` computes with it in plain PyTorch."""
        return layer.scheme.linear(x, layer)

    def pack_linear(self, layer: Linear) -> None:
        """Rearrange a linear layer's weight. It is called once for each linear layer and the head, after the weights
        are filled. It may replace the tensors of the layer's weight by any that this table's own `linear` takes. A tied
        embedding keeps its own tensor."""

    def pack_experts(self, layer: Experts) -> None:
        """Rearrange the weights of experts that are stored in few bits. It is called once for each such layer, after
        the weights are filled. `layer.decode()` makes them dense."""

    def adapter_memory(self, slots: int, out: int, rank: int, dtype: torch.dtype, device: torch.device,
                       ) -> torch.Tensor:
        """Zeros [slots, out, rank] for the B of a layer's adapters, in the strides that `adapt` wants."""
        return torch.zeros(out, slots, rank, dtype=dtype, device=device).transpose(0, 1)

    def begin_adapters(self, slots: torch.Tensor, count: int) -> Any:
        """What all layers of a step share; `adapt` finds it as layer.adapters.step.begun.

        Args:
            slots: int32 [num_tokens], -1 for a token without an adapter. count: of all slots.
        """
        return (slots[:, None] == torch.arange(count, dtype=slots.dtype, device=slots.device))[:, :, None, None]

    def adapt(self, y: torch.Tensor, x: torch.Tensor, layer: Linear) -> torch.Tensor:
        """y [n, out], the layer's outputs, plus (x A^T) B^T of each token's adapter, of this rank's parts. `y` may be
        changed and returned. Here all slots are multiplied, and a mask drops those that are not the token's: shapes
        depend on no value, and a token's result on no other token."""
        held = layer.adapters
        mask, slots, rank = held.step.begun, len(held.a), held.rank
        inner = F.linear(x, held.a.flatten(0, 1)).view(len(x), slots, -1, rank).masked_fill(~mask, 0)
        b = held.b.transpose(0, 1).flatten(1)
        parts = [F.linear(inner[:, :, i].flatten(1), w) for i, w in enumerate(torch.split(b, list(held.outputs)))]
        return y + (parts[0] if len(parts) == 1 else torch.cat(parts, -1))

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x / rms(x) over the last dimension in fp32, rounded, times weight (arXiv 1910.07467). x has any shape. A
        weight in fp32 is multiplied before the result is rounded to x's dtype."""
        if weight.dtype != x.dtype:
            return F.rms_norm(x.float(), weight.shape, None, eps).mul_(weight).to(x.dtype)
        return F.rms_norm(x, weight.shape, None, eps).mul_(weight)

    def add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float,
                     ) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of x + residual, and x + residual, which becomes the next residual."""
        residual = x + residual
        return self.rms_norm(residual, weight, eps), residual

    def apply_norm(self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, eps: float,
                   ) -> tuple[torch.Tensor, torch.Tensor]:
        """The RMS norm of x + residual, and the sum. Without a residual x is the sum; without a weight there is no
        norm."""
        if weight is None:
            x = x if residual is None else x + residual
            return x, x
        return (self.rms_norm(x, weight, eps), x) if residual is None else self.add_rms_norm(x, residual, weight, eps)

    def norm_heads(self, qkv: torch.Tensor, norms: HeadNorms, num_kv_heads: int) -> torch.Tensor:
        """The RMS norm of each head of q and of k in qkv [num_tokens, num_heads + 2 * num_kv_heads, head_dim], beside v
        as it is."""
        q, k, v = torch.tensor_split(qkv, (-2 * num_kv_heads, -num_kv_heads), 1)
        return torch.cat((self.rms_norm(q, norms.q, norms.eps), self.rms_norm(k, norms.k, norms.eps), v), 1)

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
        """(x - mean(x)) / deviation(x) over the last dimension, times weight, plus bias (arXiv 1607.06450)."""
        return F.layer_norm(x, weight.shape, weight, bias, eps)

    def begin_rotary(self, positions: torch.Tensor, table: torch.Tensor, dtype: torch.dtype) -> Any:
        """Values for rotary embedding that all layers of a step share; the model passes them to `rotary`.

        Args:
            positions: [num_tokens] int32.
            table: [max_position, head_dim] fp32, cosines of the head_dim / 2 angles and then their sines.
            dtype: the model's.
        """
        cos, sin = table.index_select(0, positions).to(dtype).unsqueeze(1).chunk(2, -1)
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)

    def rotary(self, heads: torch.Tensor, begun: Any) -> torch.Tensor:
        """The rotary embedding of `heads` in the half-split layout (arXiv 2104.09864). `heads` is [num_tokens,
        num_heads + num_kv_heads, head_dim]: the heads of q, then those of k. It may be a view with gaps between the
        tokens. `begun` is the result of `begin_rotary`."""
        cos, sin = begun
        return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, -1), sin)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up -> [n, m]. `gate_up` is [n, 2 * m]: the gate, then up."""
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    def gated(self, gate_up: torch.Tensor, kind: str) -> torch.Tensor:
        """The activation of the gate times up -> [n, m]. `kind` is a value of ModelConfig.activation."""
        if kind == "silu":
            return self.silu_mul(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return self.activation(gate, kind).mul_(up)

    def norm_linear(self, layer: Linear | Unmerged, x: torch.Tensor, residual: torch.Tensor | None,
                    weight: torch.Tensor, eps: float, *, gated: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """`layer` applied to the RMS norm of x + residual, and the sum x + residual itself. Without a residual, x
        stands for the sum. With `gated` the layer's outputs are a gate and up, and the first result is their
        `silu_mul`. A device overrides this method where one kernel does all of it."""
        if residual is None:
            x, residual = self.rms_norm(x, weight, eps), x
        else:
            x, residual = self.add_rms_norm(x, residual, weight, eps)
        y = layer(x)
        return (self.silu_mul(y) if gated else y), residual

    def expert_gated(self, gate_up: torch.Tensor, limit: float | None) -> torch.Tensor:
        """The activation of an expert, [..., 2 * m] -> [..., m]. `limit` is that of ExpertsConfig."""
        gate, up = gate_up.chunk(2, -1)
        if limit is None:
            return F.silu(gate) * up
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1.0)

    def mixture(self, x: torch.Tensor, residual: torch.Tensor | None, norm: torch.Tensor | None, layer: Experts,
                ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the experts of this rank make of the norm of x + residual, see `experts`; then the norm and the sum, see
        `apply_norm`, and the numbers of the chosen experts. A device overrides this method where its kernels do several
        of the operations."""
        x, residual = self.apply_norm(x, residual, norm, layer.eps)
        weights, chosen = self.route(x, layer)
        return self.experts(x, weights, chosen, layer), x, residual, chosen

    def route(self, x: torch.Tensor, layer: Experts) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights, fp32 [n, per_token], and the numbers, [n, per_token], of each token's experts."""
        e = layer.config
        logits = F.linear(x.to(layer.router.dtype), layer.router, layer.router_bias).float()
        scores = logits.sigmoid() if e.sigmoid else logits.softmax(-1)
        found = scores if layer.correction is None else scores + layer.correction
        if e.top_groups < e.groups:
            of_groups = found.view(len(x), e.groups, -1)
            best = of_groups.topk(2, -1).values.sum(-1) if e.sigmoid else of_groups.amax(-1)
            others = torch.ones_like(best, dtype=torch.bool).scatter(1, best.topk(e.top_groups, -1).indices, False)
            found = of_groups.masked_fill(others.unsqueeze(-1), -torch.inf).flatten(1)
        chosen = found.topk(e.per_token, -1).indices
        weights = scores.gather(1, chosen)
        if e.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * e.scaling, chosen

    def experts(self, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, layer: Experts) -> torch.Tensor:
        """The sum of the outputs of each token's experts, of this rank's part of them -> [n, hidden]. Experts in few
        bits are dequantised when they compute.

        Args:
            weights, chosen: of `route`; this rank may hold only some of the experts.
        """
        count, k, limit = layer.count, chosen.shape[1], layer.config.limit
        biases, offsets = layer.gate_up_bias, layer.down_bias
        if not layer.few_bits:
            gate_up, down = layer.gate_up.view(count, -1, x.shape[1]), layer.down
        if not x.is_cpu:  # of one shape and without a wait for the device: every expert computes every token
            share = torch.zeros(len(x), count + 1, device=x.device)
            local = chosen.long() - layer.first
            local = local.masked_fill((local < 0) | (local >= count), count)
            share = share.scatter_add(1, local, weights)[:, :count].t().unsqueeze(-1)
            if layer.few_bits:
                return layer.compute_every(x, share).to(x.dtype)
            step = max(_EXPERT_VALUES // (len(x) * (gate_up.shape[1] + x.shape[1])), 1)  # bounds the memory
            total = x.new_zeros(x.shape, dtype=torch.float32)
            for i in range(0, count, step):
                inner = x @ gate_up[i:i + step].transpose(1, 2)
                inner = inner if biases is None else inner + biases.view(count, 1, -1)[i:i + step]
                y = self.expert_gated(inner, limit) @ down[i:i + step].transpose(1, 2)
                y = y if offsets is None else y + offsets.view(count, 1, -1)[i:i + step]
                total += (y.float() * share[i:i + step]).sum(0)
            return total.to(x.dtype)
        order = chosen.flatten().argsort(stable=True)
        loads = chosen.flatten().bincount(minlength=layer.first + count).tolist()
        out, at = x.new_zeros(len(order), x.shape[1]), sum(loads[:layer.first])
        for i, load in enumerate(loads[layer.first:layer.first + count]):
            if load:
                mine = order[at:at + load]
                at += load
                if layer.few_bits:
                    out.index_copy_(0, mine, layer.compute_one(x.index_select(0, mine // k), i))
                    continue
                inner = F.linear(x.index_select(0, mine // k), gate_up[i],
                                 None if biases is None else biases.view(count, -1)[i])
                inner = self.silu_mul(inner) if limit is None else self.expert_gated(inner, limit)
                y = F.linear(inner, down[i])
                out.index_copy_(0, mine, y if offsets is None else y + offsets.view(count, -1)[i])
        return (out.view(-1, k, x.shape[1]) * weights.unsqueeze(-1)).sum(1).to(x.dtype)

    def begin_delta(self, m: ModelInput, taps: int) -> Spans | None:
        """What layers with a delta rule share in a step of a paged input; None where each sequence has one token."""
        p: Any = m
        tokens = len(p.positions)
        if p.max_query_len == 1 and tokens == len(p.seq_lens):
            return None
        starts, longest = torch.tensor(on_host(m, "query_start_loc")), p.max_query_len or tokens
        chunk = min(1 << max(longest - 1, 0).bit_length(), CHUNK)
        return find_spans(starts, tokens, taps, p.num_decode_seqs, chunk).to(p.positions.device)

    def delta_step(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, strength: torch.Tensor,
                   state: torch.Tensor) -> torch.Tensor:
        """See hal.models.delta_rule.step_rule."""
        return step_rule(q, k, v, decay, strength, state)

    def rotary_attention(self, attention: LayerAttention, layer: int, qkv: torch.Tensor, num_kv_heads: int,
                         begun: Any, norms: HeadNorms | None = None) -> torch.Tensor:
        """The norms of heads, if there are any, the rotary embedding of q and k, then the attention of a layer ->
        [num_tokens, num_heads * head_dim]. `qkv` is [num_tokens, num_heads + 2 * num_kv_heads, head_dim]. A device
        overrides this method where its attention also computes what comes before it."""
        if norms is not None:
            qkv = self.norm_heads(qkv, norms, num_kv_heads)
        qk, v = qkv[:, :-num_kv_heads], qkv[:, -num_kv_heads:]
        qk = self.rotary(qk, begun)
        return attention(layer, qk[:, :-num_kv_heads], qk[:, -num_kv_heads:], v)

    def activation(self, x: torch.Tensor, kind: str) -> torch.Tensor:
        """Elementwise. `kind` is a value of ModelConfig.activation other than "silu", for which there is `silu_mul`."""
        if kind == "relu":
            return F.relu(x)
        return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")
