"""The default attention, with what is faster on a CPU for heads that share no keys, in bfloat16."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

from hal.contracts.attention import AttentionSpec
from hal.paged.attention import AttentionBatch, PagedAttention


class CpuAttention(PagedAttention):
    """Where every query head has keys of its own, decoding in bfloat16 goes through PyTorch's slowest kernels (a matrix
    with one row). Intel's extension does it 1.4 to 2.5 times faster than PyTorch; in groups, or in fp32, it does not.
    """

    def __init__(self, specs: Sequence[AttentionSpec], *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(specs, device=device, dtype=dtype)
        self.single = dtype == torch.bfloat16 and specs[0].num_heads == specs[0].num_kv_heads
        self.ipex = ipex_attention() if self.single else None
        self.head_map = torch.arange(specs[0].num_heads, dtype=torch.int32)

    def decode(self, q: torch.Tensor, cache: torch.Tensor, batch: AttentionBatch, spec: AttentionSpec) -> torch.Tensor:
        if self.ipex is not None and spec.window is None:
            assert batch.tables is not None
            # The extension takes rows to lie back to back; these do not where another sequence has more blocks.
            tables, out = batch.tables.contiguous(), torch.empty(q.shape, dtype=q.dtype)
            self.ipex.single_query_cached_kv_attention(out, q.contiguous(), cache[0], cache[1], self.head_map,
                                                       spec.scale, tables, batch.lens, cache.shape[3], batch.context,
                                                       None)
            return out
        if self.single:  # two equal rows are faster than one
            return super().decode(q.repeat_interleave(2, 1), cache, batch, spec)[:, :, 0]
        return super().decode(q, cache, batch, spec)


def ipex_attention() -> Any:
    """Intel's PagedAttention, or None. On another torch than its own the extension fails in many ways."""
    if importlib.util.find_spec("intel_extension_for_pytorch") is None:
        return None
    try:
        from intel_extension_for_pytorch.llm.modules import PagedAttention as IntelAttention
    except Exception:
        return None
    return IntelAttention
