"""Parts that give a token the same bits whatever else is in its step (EngineConfig.batch_invariant).

Three choices of PyTorch's depend on the number of rows: the kernel of a product (in float32 a product of one row has
another order of sums), the path of attention (a chunk of a prompt, or a decode), and where threads cut a tensor (the
last elements of a piece are computed by other instructions). Here products have one number of rows, each query is
attended to as a decode is, and the other operations get pieces that one thread computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from hal.contracts.attention import AttentionSpec
from hal.contracts.inputs import PagedModelInput
from hal.errors import ConfigError
from hal.models.layers import Linear
from hal.paged.attention import AttentionBatch, PagedAttention, PagedStep, by_group, gather
from runners.cpu.ops import CpuOps

_ROWS = 16  # of every product
_SERIAL = 32768  # elements below which PyTorch does not cut a tensor for its threads


class InvariantOps(CpuOps):
    schemes = None
    batch_invariant = True

    def linear(self, x: torch.Tensor, layer: Linear) -> torch.Tensor:
        n = len(x)
        if not n:
            return super().linear(x, layer)
        pieces = F.pad(x, (0, 0, 0, -n % _ROWS)).split(_ROWS)
        return torch.cat([super(InvariantOps, self).linear(piece, layer) for piece in pieces])[:n]

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return _by_rows(lambda some: super(InvariantOps, self).rms_norm(some, weight, eps), x)

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
        return _by_rows(lambda some: super(InvariantOps, self).layer_norm(some, weight, bias, eps), x)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return _by_rows(super().silu_mul, gate_up)

    def activation(self, x: torch.Tensor, kind: str) -> torch.Tensor:
        return _by_rows(lambda some: super(InvariantOps, self).activation(some, kind), x)

    def rotary(self, heads: torch.Tensor, begun: Any) -> torch.Tensor:
        rows = max(_SERIAL // (heads[0].numel() + 1), 1) if len(heads) else 1
        pieces = [super(InvariantOps, self).rotary(some, (cos, sin)) for some, cos, sin in zip(
            heads.split(rows), *(x.split(rows) for x in begun), strict=True)]
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def _by_rows(call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    rows = max((_SERIAL - 1) // max(x[:1].numel(), 1), 1)
    return call(x) if len(x) <= rows else torch.cat([call(some) for some in x.split(rows)])


class InvariantAttention(PagedAttention):
    """Raises ConfigError: a layer has what PyTorch's attention kernel does not compute."""

    def __init__(self, specs: Sequence[AttentionSpec], *, device: torch.device, dtype: torch.dtype) -> None:
        if any(s.softcap is not None or s.sinks is not None or s.value_dim != s.head_dim for s in specs):
            raise ConfigError("batch_invariant does not have the attention of this model on the CPU",
                              got="softcap, sinks, or values of another size than keys", expected="layers without them",
                              hint="run this model without batch_invariant")
        super().__init__(specs, device=device, dtype=dtype)

    def begin(self, model_input: PagedModelInput, kv_caches: Sequence[torch.Tensor]) -> PagedStep:
        return _Step(self, model_input, kv_caches)

    def decode(self, q: torch.Tensor, cache: torch.Tensor, batch: AttentionBatch, spec: AttentionSpec) -> torch.Tensor:
        k, v = gather(cache, batch, spec, self.dtype)
        return _attend(q, k, v, batch.masks[spec.window], spec)

    def prefill(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: torch.Tensor, batch: AttentionBatch,
                spec: AttentionSpec) -> torch.Tensor:
        keys, values = (x.expand(len(q), -1, -1, -1) for x in gather(cache, batch, spec, self.dtype))
        mask = batch.masks[spec.window]
        assert mask is not None
        return _attend(q, keys, values, mask[:, None, None], spec)


class _Step(PagedStep):
    def _prefill_batch(self, table: torch.Tensor, start: int, end: int, context: int) -> AttentionBatch:
        """Every key is read from the cache, in whole blocks, as decodes read them."""
        blocks = table[None, :-(-context // self.block_size)]
        at = torch.arange(blocks.shape[1] * self.block_size)
        masks = self._masks(at[context - (end - start):context, None], at)
        return AttentionBatch(start, end, self._rows(blocks), len(at), masks)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, spec: AttentionSpec,
            ) -> torch.Tensor:
    """Each query as a sequence of its own, [n, num_kv_heads, heads of a group, value_dim]. A head without a group is
    computed twice, since a product of one row has kernels of its own."""
    q = by_group(q, spec)
    if q.shape[2] > 1:
        return F.scaled_dot_product_attention(q, k, v, mask, scale=spec.scale)
    return F.scaled_dot_product_attention(q.expand(-1, -1, 2, -1), k, v, mask, scale=spec.scale)[:, :, :1]
