"""Paged attention of static shapes: contexts are gathered by block table, and masks say what counts.

Queries are worked on in tiles of one sequence each: a decoding sequence is a tile of one query; the tokens of a mixed
step are laid out in tiles of a fixed number of queries, of which the number is bounded whatever the batch looks like.
Shapes below: R tensor-parallel shares (see runners.tpu.spmd), T tokens, S sequences, N tiles of Q queries, C keys of a
context, h heads and k key-value heads of a share, g = h / k, d head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hal.contracts.attention import AttentionSpec, refuse_unsupported
from hal.contracts.inputs import PagedModelInput
from runners.tpu import lowering

TILE = 32
_HIDDEN = -1e30  # finite, so that a row with nothing to see (padding) has no NaN


class TpuAttention:
    """A layer's cache is [1, num_blocks, block_size, R * 2k, d], keys and values of a head side by side: the layout of
    torch_xla's ragged kernel, which writes and gathers both at once. Where the values are in the keys, it is
    [1, num_blocks, block_size, R * k, d].

    Args:
        ranks: R. kernel: use the TPU's ragged kernel instead of the gather, where it can compute every layer.

    Raises:
        ConfigError: a layer declares values of another size than keys.
    """

    def __init__(self, specs: Sequence[AttentionSpec], *, ranks: int = 1, kernel: bool = False) -> None:
        refuse_unsupported(specs, "the TPU's attention", ("softcap", "sinks", "values_in_keys"))
        self.specs, self.ranks = specs, ranks
        self.kernel = kernel and not any(s.softcap or s.sinks is not None or s.values_in_keys for s in specs)

    def cache_shape(self, spec: AttentionSpec, num_blocks: int, block_size: int) -> tuple[int, ...]:
        heads = self.ranks * spec.num_kv_heads * (1 if spec.values_in_keys else 2)
        return 1, num_blocks, block_size, heads, spec.head_dim

    def begin(self, m: PagedModelInput, kv_caches: Sequence[torch.Tensor], decode: bool) -> TpuStep:
        return TpuStep(self, m, kv_caches, decode)


class TpuStep:
    """One step's attention, traced. `caches` holds the new values of the layers that have run."""

    def __init__(self, attention: TpuAttention, m: PagedModelInput, kv_caches: Sequence[torch.Tensor],
                 decode: bool) -> None:
        self.attention, self.m, self.decode, self.caches = attention, m, decode, list(kv_caches)
        self.slots = m.slot_mapping.long()
        if attention.kernel:
            return
        tokens, seqs = m.input_ids.shape[0], m.seq_lens.shape[0]
        self.queries = 1 if decode else min(TILE, tokens)
        if decode:
            tables, lens, query_at = m.block_tables, m.seq_lens, m.positions[:, None]
        else:
            sequence = self._lay_out(m.query_start_loc, tokens, seqs)
            tables, lens = (x.index_select(0, sequence) for x in (m.block_tables, m.seq_lens))
            query_at = m.positions[self.token_of].view(-1, self.queries)
        self.blocks = tables.flatten()
        key_at = _arange(tables.shape[1] * m.block_size, m)
        after = key_at > query_at[:, :, None]  # [N, Q, C]
        self.hidden = {window: after if window is None else after | (key_at <= query_at[:, :, None] - window)
                       for window in {spec.window for spec in attention.specs}}
        # Behind a sequence's end lies what others left, which may be NaN: that passes through a weight of 0.
        self.foreign = (key_at >= lens[:, None])[:, :, None, None, None]

    def _lay_out(self, starts: torch.Tensor, tokens: int, seqs: int) -> torch.Tensor:
        """Each sequence fills tiles of its own, one after another. Sets token_of [N * Q], what lies where, and place_of
        [T], its inverse; returns each tile's sequence [N]."""
        size, tiles = self.queries, tokens // self.queries + seqs
        first = starts[:-1]
        counts = (starts[1:] - first + (size - 1)) // size
        ends = counts.cumsum(0, dtype=torch.int32)
        begins = ends - counts
        tile, token = _arange(tiles, self.m), _arange(tokens, self.m)
        sequence = (tile[:, None] >= ends).sum(1).clamp(max=seqs - 1)
        inside = (tile - begins[sequence]) * size
        at = (first[sequence] + inside)[:, None] + _arange(size, self.m)
        self.token_of = at.clamp(max=tokens - 1).flatten()
        owner = (token[:, None] >= starts[1:]).sum(1).clamp(max=seqs - 1)
        self.place_of = (begins[owner] * size + token - first[owner]).clamp(max=tiles * size - 1)
        return sequence

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [R * T, h, d]; k [R * T, k, d]; v [R * T, k, value_dim] -> [R * T, h * value_dim]."""
        spec, cache, ranks = self.attention.specs[layer], self.caches[layer], self.attention.ranks
        tokens = q.shape[0] // ranks
        new = k if spec.values_in_keys else torch.stack((k, v), 2)
        new = new.reshape(ranks, tokens, -1, spec.head_dim)
        new = new.transpose(0, 1).reshape(tokens, -1, spec.head_dim)
        flat = cache.view(-1, *cache.shape[3:]).index_copy(0, self.slots, new)
        self.caches[layer] = flat.view(cache.shape)
        if self.attention.kernel:
            m = self.m
            out = lowering.ragged_attention(q, self.caches[layer][0], m.seq_lens, m.block_tables, m.query_start_loc,
                                            spec.scale, spec.window)
            return out.reshape(q.shape[0], -1)
        pages = flat.view(cache.shape[1:]).index_select(0, self.blocks)
        return self._attend(q, pages, spec, tokens)

    def _attend(self, q: torch.Tensor, pages: torch.Tensor, spec: AttentionSpec, tokens: int) -> torch.Tensor:
        ranks, heads, kv, dim = self.attention.ranks, spec.num_heads, spec.num_kv_heads, spec.head_dim
        hidden = self.hidden[spec.window]
        q = q.view(ranks, tokens, heads, dim)
        if not self.decode:
            q = q.index_select(1, self.token_of)
        tiles = hidden.shape[0]
        q = q.view(ranks, tiles, self.queries, kv, heads // kv, dim)
        pages = pages.view(tiles, -1, ranks, kv, 1 if spec.values_in_keys else 2, dim)
        scores = torch.einsum("rnqkgd,ncrkd->rnkgqc", q, pages[..., 0, :]).float() * spec.scale
        if spec.softcap is not None:
            scores = torch.tanh(scores / spec.softcap) * spec.softcap
        scores = scores.masked_fill(hidden[None, :, None, None], _HIDDEN)
        if spec.sinks is not None:
            sinks = spec.sinks.float().view(ranks, 1, kv, heads // kv, 1, 1).expand(*scores.shape[:-1], 1)
            scores = torch.cat((scores, sinks), -1)
        weights = scores.softmax(-1)[..., :hidden.shape[-1]].to(q.dtype)
        values = pages[..., -1, :spec.value_dim].masked_fill(self.foreign, 0)
        out = torch.einsum("rnkgqc,ncrkd->rnqkgd", weights, values)
        out = out.reshape(ranks, tiles * self.queries, -1)
        if not self.decode:
            out = out.index_select(1, self.place_of)
        return out.reshape(ranks * tokens, -1)


def _arange(count: int, m: Any) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int32, device=m.input_ids.device)
