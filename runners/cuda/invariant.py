"""Parts that give a token the same bits whatever else is in its step (EngineConfig.batch_invariant).

cuBLAS chooses a kernel, and with it the order of a sum, by the number of rows; so every product has the same number.
Decodes are split over their contexts by the size of the batch, and a chunk of a prompt has a kernel of its own; so each
query is attended to as a decode is, in a fixed number of parts, with its key in the cache like the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from hal.contracts.attention import AttentionSpec, refuse_unsupported
from hal.contracts.inputs import PagedModelInput
from hal.models.layers import Linear, Unmerged
from hal.models.ops import Ops
from runners.cuda.attention import CudaAttention, CudaStep, asked, known
from runners.cuda.kernels import attention as kernels
from runners.cuda.ops import CudaOps

_ROWS = 128  # of every product: so many read the weights in about the time of one
_DIVISION = kernels.Division(splits=8)
_QUERIES = 1024  # attended to at once, which bounds the memory of their parts


class InvariantOps(CudaOps):
    schemes = None
    batch_invariant = True

    def linear(self, x: torch.Tensor, layer: Linear) -> torch.Tensor:
        n = len(x)
        if not n:
            return super().linear(x, layer)
        pieces = F.pad(x, (0, 0, 0, -n % _ROWS)).split(_ROWS)
        products = [super(InvariantOps, self).linear(piece, layer) for piece in pieces]
        return (torch.cat(products) if len(products) > 1 else products[0])[:n]

    def norm_linear(self, layer: Linear | Unmerged, x: torch.Tensor, residual: torch.Tensor | None,
                    weight: torch.Tensor, eps: float, *, gated: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        return Ops.norm_linear(self, layer, x, residual, weight, eps, gated=gated)


class InvariantAttention(CudaAttention):
    def __init__(self, specs: Sequence[AttentionSpec], *, device: torch.device, dtype: torch.dtype) -> None:
        refuse_unsupported(specs, "batch_invariant on CUDA", ("softcap", "sinks"))
        super().__init__(specs, device=device, dtype=dtype)

    def expect(self, queries: int) -> None:
        """No kernel of its own for a few queries a sequence."""

    def warmup(self, kv_caches: Sequence[torch.Tensor]) -> None:
        for spec, layer in {(spec, spec.sinks is None): (spec, i) for i, spec in enumerate(self.specs)}.values():
            q = torch.zeros(1, spec.num_heads, spec.head_dim, dtype=self.dtype, device=self.device)
            tables, lens = (torch.zeros(shape, dtype=torch.int32, device=self.device) for shape in ((1, 1), 1))
            kernels.decode(q, known(kv_caches[layer]), tables, lens, torch.empty_like(q), how=_DIVISION, **asked(spec))

    def begin(self, model_input: PagedModelInput, kv_caches: Sequence[torch.Tensor]) -> CudaStep:
        return _Step(self, model_input, kv_caches)


class _Step(CudaStep):
    def __init__(self, attention: CudaAttention, m: PagedModelInput, kv_caches: Sequence[torch.Tensor]) -> None:
        super().__init__(attention, m, kv_caches)
        self.tables, self.lens = m.block_tables, m.seq_lens
        if m.max_query_len != 1:
            tokens = torch.arange(len(m.input_ids), dtype=torch.int32, device=m.positions.device)
            seqs = torch.searchsorted(m.query_start_loc[1:], tokens, right=True).clamp_(max=len(m.seq_lens) - 1)
            self.tables = m.block_tables.index_select(0, seqs)
            self.lens = torch.where(tokens < m.query_start_loc[-1], m.positions + 1, 0)

    def _attend(self, layer: int, q: torch.Tensor, new: kernels.New) -> torch.Tensor:
        cache, n = self.caches[layer], min(len(self.lens), len(q))
        q = kernels.write_kv(q, new, cache)
        out = (torch.empty if n == len(q) else torch.zeros)(q.shape, dtype=q.dtype, device=q.device)
        for i in range(0, n, _QUERIES):
            here = slice(i, min(i + _QUERIES, n))
            kernels.decode(q[here], cache, self.tables[here], self.lens[here], out[here], how=_DIVISION,
                           **self.asked[layer])
        return out.flatten(1)
