"""Attention over a paged cache whose layout is this backend's own: [2, num_blocks, block_size, kv_heads, head_dim]."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from hal.contracts.attention import AttentionSpec, LayerAttention, refuse_unsupported
from hal.contracts.inputs import PagedModelInput


class NumpyAttention:
    def __init__(self, specs: Sequence[AttentionSpec], *, device: torch.device, dtype: torch.dtype) -> None:
        refuse_unsupported(specs, "NumpyAttention")
        self.specs = specs

    def cache_shape(self, spec: AttentionSpec, num_blocks: int, block_size: int) -> tuple[int, ...]:
        return 2, num_blocks, block_size, spec.num_kv_heads, spec.head_dim

    def begin(self, model_input: PagedModelInput, kv_caches: Sequence[torch.Tensor]) -> LayerAttention:
        m, caches = model_input, [cache.numpy() for cache in kv_caches]
        slots, tables = m.slot_mapping.numpy(), m.block_tables.numpy()
        starts, lens = m.query_start_loc.tolist(), m.seq_lens.tolist()

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            spec, cache = self.specs[layer], caches[layer]
            flat = cache.reshape(2, -1, *cache.shape[3:])  # a view: [2, slots, kv_heads, head_dim]
            flat[0, slots], flat[1, slots] = k.numpy(), v.numpy()
            out = np.zeros((len(q), spec.num_heads * spec.head_dim), np.float32)
            for seq, length in enumerate(lens):
                first, end = starts[seq], starts[seq + 1]
                if first < end:
                    used = tables[seq, :-(-length // m.block_size)]
                    keys, values = cache[:, used].reshape(2, -1, *cache.shape[3:])[:, :length]
                    out[first:end] = one_sequence(q[first:end].numpy(), keys, values, spec).reshape(end - first, -1)
            return torch.from_numpy(out)

        return attend


def one_sequence(q: np.ndarray, k: np.ndarray, v: np.ndarray, spec: AttentionSpec) -> np.ndarray:
    """q [queries, heads, dim]: the last tokens of k, v [context, kv_heads, dim] -> [queries, kv_heads, group, dim]."""
    queries, context = len(q), len(k)
    grouped = q.reshape(queries, spec.num_kv_heads, -1, spec.head_dim)
    scores = np.einsum("qhgd,khd->hgqk", grouped, k) * np.float32(spec.scale)
    behind = np.arange(context - queries, context)[:, None] - np.arange(context)
    scores = np.where((behind < 0) | (behind >= (spec.window or context)), -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hgqk,khd->qhgd", weights / weights.sum(-1, keepdims=True), v)
