"""The default attention, with a faster kernel for heads that share no keys, in bfloat16."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

from hal.contracts.attention import AttentionSpec
from hal.paged.attention import AttentionBatch, PagedAttention


class CpuAttention(PagedAttention):
    """If every query head has keys of its own, decoding in bfloat16 uses PyTorch's slowest kernels (for a matrix with
    one row). Then Intel's extension is 1.4 to 2.5 times faster than PyTorch. It is not faster for groups, or in fp32.
    """

    def __init__(self, specs: Sequence[AttentionSpec], *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(specs, device=device, dtype=dtype)
        self.head_maps = {spec.num_heads: torch.arange(spec.num_heads, dtype=torch.int32) for spec in specs
                          if self._single(spec)}
        self.ipex = ipex_attention() if self.head_maps else None

    def _single(self, spec: AttentionSpec) -> bool:
        return (self.dtype == torch.bfloat16 and spec.num_heads == spec.num_kv_heads and spec.softcap is None
                and spec.sinks is None)

    def decode(self, q: torch.Tensor, cache: torch.Tensor, batch: AttentionBatch, spec: AttentionSpec) -> torch.Tensor:
        if not self._single(spec) or cache.dtype == torch.uint8:
            return super().decode(q, cache, batch, spec)
        if self.ipex is not None and spec.window is None and spec.value_dim == spec.head_dim:
            assert batch.tables is not None
            # The extension needs contiguous rows. These rows are not contiguous if another sequence has more blocks.
            tables, out = batch.tables.contiguous(), torch.empty(q.shape, dtype=q.dtype)
            heads = self.head_maps[spec.num_heads]
            self.ipex.single_query_cached_kv_attention(out, q.contiguous(), cache[0], cache[1], heads, spec.scale,
                                                       tables, batch.lens, cache.shape[3], batch.context, None)
            return out
        # Two equal rows are faster than one.
        return super().decode(q.repeat_interleave(2, 1), cache, batch, spec)[:, :, 0]


def ipex_attention() -> Any:
    """Intel's PagedAttention, or None. With a torch that it was not built for, the extension fails in many ways."""
    if importlib.util.find_spec("intel_extension_for_pytorch") is None:
        return None
    try:
        from intel_extension_for_pytorch.llm.modules import PagedAttention as IntelAttention
    except Exception:
        return None
    return IntelAttention
