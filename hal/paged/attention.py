"""The default attention: plain PyTorch over a paged cache, for any device.

Heads of one group share their keys, so they are treated as queries of one head: nothing is repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hal.contracts.attention import AttentionSpec
from hal.contracts.inputs import NULL_BLOCK, PagedModelInput
from hal.schema.packed import on_host

FP8_MAX = 448.0  # of e4m3; beyond it there is only NaN


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Tokens of a step that one attention call computes: decoding sequences, or one sequence with several queries.

    Attributes:
        start, end: the range of its tokens.
        blocks: rows of the cache to gather (flat, head by head), by the number of kv heads that a layer has; None where
            this step computes all keys that the tokens attend to.
        context: keys of a head. masks: by window, added to the scores; None where a causal mask says it all.
        tables, lens: of decoding sequences, [n, blocks] and [n] int32.
    """

    start: int
    end: int
    blocks: dict[int, torch.Tensor] | None
    context: int
    masks: dict[int | None, torch.Tensor | None]
    tables: torch.Tensor | None = None
    lens: torch.Tensor | None = None


class PagedAttention:
    """A layer's cache is [2, num_blocks, num_kv_heads, block_size, head_dim], keys and then values. Where a head of
    values has another size, it is [1, num_blocks, num_kv_heads, block_size, head_dim + value_dim], a value behind its
    key, and [1, num_blocks, num_kv_heads, block_size, head_dim] where the values are in the keys. A backend overrides
    `decode`, or all. A cache of bytes holds fp8 (e4m3)."""

    def __init__(self, specs: Sequence[AttentionSpec], *, device: torch.device, dtype: torch.dtype) -> None:
        self.specs, self.device, self.dtype = specs, device, dtype
        self.windows = {spec.window for spec in specs}
        self.kv_heads = {spec.num_kv_heads for spec in specs}
        self.token_bytes = max((self._token_bytes(spec) for spec in specs), default=0)
        # Bytes of keys gathered at once for decoding: on a CPU they stay in its cache, elsewhere they bound the memory.
        self.gather_bytes = 1 << (20 if device.type == "cpu" else 28)

    def cache_shape(self, spec: AttentionSpec, num_blocks: int, block_size: int) -> tuple[int, ...]:
        if spec.values_in_keys:
            return 1, num_blocks, spec.num_kv_heads, block_size, spec.head_dim
        if spec.value_dim != spec.head_dim:
            return 1, num_blocks, spec.num_kv_heads, block_size, spec.head_dim + spec.value_dim
        return 2, num_blocks, spec.num_kv_heads, block_size, spec.head_dim

    def _token_bytes(self, spec: AttentionSpec) -> int:
        """Of a token's keys, or of its values where these are larger."""
        return spec.num_kv_heads * max(spec.head_dim, spec.value_dim) * self.dtype.itemsize

    def step_bytes(self, tokens: int, num_seqs: int, context: int) -> int:
        """Bytes beside the cache that a step of so many tokens needs, in so many sequences of up to `context` tokens.
        An upper estimate."""
        masks = len(self.windows) * max(tokens, num_seqs) * context * (self.dtype.itemsize + 2)
        indices = 8 * num_seqs * context * sum(self.kv_heads)
        return masks + indices + max((self._layer_bytes(s, tokens, num_seqs, context) for s in self.specs), default=0)

    def _layer_bytes(self, spec: AttentionSpec, tokens: int, num_seqs: int, context: int) -> int:
        each, item = context * self._token_bytes(spec), self.dtype.itemsize  # keys of a sequence
        at_once = min(num_seqs, max(self.gather_bytes // max(each, 1), 1))
        if self.device.type == "cpu" and not _written_out(spec):  # where one kernel does the rest
            return 4 * at_once * each
        queries, single = max(min(tokens, context), at_once), each // item * 4
        scores = 3 * 4 * queries * context * spec.num_heads
        repeated = 3 * single * spec.num_heads // spec.num_kv_heads  # of one sequence with several queries, in fp32
        return max(at_once * (2 * each + 3 * single), 2 * each + repeated) + scores

    def begin(self, model_input: PagedModelInput, kv_caches: Sequence[torch.Tensor]) -> PagedStep:
        return PagedStep(self, model_input, kv_caches)

    def decode(self, q: torch.Tensor, cache: torch.Tensor, batch: AttentionBatch, spec: AttentionSpec) -> torch.Tensor:
        """q [n, num_heads, head_dim], one query a sequence -> [n, num_heads, value_dim] or a shape that flattens to it.
        """
        k, v = gather(cache, batch, spec, self.dtype)
        return attend(by_group(q, spec), k, v, batch.masks[spec.window], spec, (-1, 1))

    def prefill(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: torch.Tensor, batch: AttentionBatch,
                spec: AttentionSpec) -> torch.Tensor:
        """One sequence's q [n, num_heads, head_dim], k [n, num_kv_heads, head_dim], v [n, num_kv_heads, value_dim] ->
        [n, num_kv_heads, heads of a group, value_dim]."""
        q = by_group(q, spec).permute(1, 2, 0, 3)  # [kv heads, group, n, head_dim]
        if batch.blocks is None:
            k, v = k.transpose(0, 1), v.transpose(0, 1)
        else:
            k, v = (x[0, :, :batch.context] for x in gather(cache, batch, spec, self.dtype))
        k, v = (x.unsqueeze(1).expand(-1, q.shape[1], -1, -1) for x in (k, v))
        return attend(q, k, v, batch.masks[spec.window], spec, (-1, 1, 1)).permute(2, 0, 1, 3)


class PagedStep:
    """One step's attention: the tensors that its layers share, and the call that a model makes in each layer."""

    def __init__(self, attention: PagedAttention, m: PagedModelInput, kv_caches: Sequence[torch.Tensor]) -> None:
        self.attention, self.kv_caches, self.block_size = attention, kv_caches, m.block_size
        self.heads = {n: torch.arange(n, device=m.input_ids.device) for n in attention.kv_heads}
        slots = m.slot_mapping.long()
        blocks, places = (slots // m.block_size)[:, None], (slots % m.block_size)[:, None]
        self.slots = {n: ((blocks * n + heads) * m.block_size + places).flatten() for n, heads in self.heads.items()}
        starts, lens = (on_host(m, name).tolist() for name in ("query_start_loc", "seq_lens"))  # no wait for the device
        self.real = starts[-1]
        self.begun = self._begun(m)
        self.batches = self._decode_batches(m, lens[:m.num_decode_seqs])
        for seq in range(m.num_decode_seqs, len(lens)):
            if starts[seq] < starts[seq + 1]:
                self.batches.append(self._prefill_batch(m.block_tables[seq], starts[seq], starts[seq + 1], lens[seq]))

    def _begun(self, m: PagedModelInput) -> torch.Tensor:
        """The blocks whose first slot this step writes, and the null block. The values in their other slots are masked,
        but NaN passes through a mask, as 0 * NaN. So these blocks are cleared."""
        ends = m.query_start_loc[1:]
        if not len(m.positions):
            return torch.full((1,), NULL_BLOCK, device=ends.device)
        last = (ends - 1).clamp(min=0)  # of each sequence's tokens
        positions, first = m.positions[last], m.seq_lens - (ends - m.query_start_loc[:-1])
        begun = (positions - positions % m.block_size >= first) & (ends > m.query_start_loc[:-1])
        blocks = torch.where(begun, m.slot_mapping[last] // m.block_size, NULL_BLOCK)
        return F.pad(blocks[begun] if blocks.is_cpu else blocks, (0, 1), value=NULL_BLOCK).long()

    def _decode_batches(self, m: PagedModelInput, lens: list[int]) -> list[AttentionBatch]:
        blocks = -(-max(lens, default=0) // self.block_size)
        context = blocks * self.block_size
        step = max(self.attention.gather_bytes // max(context * self.attention.token_bytes, 1), 1)
        key_at = torch.arange(context, device=m.seq_lens.device)
        batches = []
        for start in range(0, len(lens), step):
            end = min(start + step, len(lens))
            tables, some = m.block_tables[start:end, :blocks], m.seq_lens[start:end]
            query_at = (some - 1)[:, None, None, None]
            batches.append(AttentionBatch(start, end, self._rows(tables), context, self._masks(query_at, key_at),
                                          tables, some))
        return batches

    def _prefill_batch(self, table: torch.Tensor, start: int, end: int, context: int) -> AttentionBatch:
        queries = end - start
        whole = queries == context
        masks: dict[int | None, torch.Tensor | None] = {}
        masked = {w for w in self.attention.windows if not whole or (w is not None and w < context)}
        if masked:
            at = torch.arange(context, device=table.device)
            masks = self._masks(at[context - queries:, None], at, masked)
        masks |= dict.fromkeys(self.attention.windows - masked)
        blocks = table[None, :-(-context // self.block_size)]
        return AttentionBatch(start, end, None if whole else self._rows(blocks), context, masks)

    def _rows(self, tables: torch.Tensor) -> dict[int, torch.Tensor]:
        """Block tables [n, blocks] -> by number of kv heads, rows of [num_blocks * num_kv_heads, ...], ordered
        [n, head, block], flat."""
        blocks = tables.long()[:, None]
        return {n: (blocks * n + heads[:, None]).flatten() for n, heads in self.heads.items()}

    def _masks(self, query_at: torch.Tensor, key_at: torch.Tensor, windows: set[int | None] | None = None,
               ) -> dict[int | None, torch.Tensor | None]:
        masks: dict[int | None, torch.Tensor | None] = {}
        for window in self.attention.windows if windows is None else windows:
            hidden = key_at > query_at
            if window is not None:
                hidden |= key_at <= query_at - window
            mask = torch.zeros(hidden.shape, dtype=self.attention.dtype, device=hidden.device)
            masks[window] = mask.masked_fill_(hidden, -torch.inf)
        return masks

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        attention, cache = self.attention, self.kv_caches[layer]
        spec = attention.specs[layer]
        cache.index_fill_(1, self.begun, 0)
        if self.real < len(k):
            k, v = (F.pad(x[:self.real], (0, 0, 0, 0, 0, len(x) - self.real)) for x in (k, v))
        slots = self.slots[spec.num_kv_heads]
        if cache.dtype == torch.uint8:  # this step attends to what later steps will read
            k, v = ((x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)).to(x.dtype) for x in (k, v))
        stored = (k,) if spec.values_in_keys else (k, v) if len(cache) == 2 else (torch.cat((k, v), -1),)
        for into, new in zip(cache, stored, strict=True):
            new = new.reshape(-1, into.shape[-1])
            new = new.to(torch.float8_e4m3fn).view(torch.uint8) if into.dtype == torch.uint8 else new
            into.view(-1, into.shape[-1]).index_copy_(0, slots, new)
        out = q.new_empty(q.shape[0], spec.num_heads * spec.value_dim)
        out[self.real:] = 0
        for batch in self.batches:
            here = slice(batch.start, batch.end)
            if batch.tables is not None:
                result = attention.decode(q[here], cache, batch, spec)
            else:
                result = attention.prefill(q[here], k[here], v[here], cache, batch, spec)
            out[here] = result.reshape(batch.end - batch.start, -1)
        return out


def by_group(q: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """[n, num_heads, head_dim] -> [n, num_kv_heads, heads of a group, head_dim], a view."""
    return q.view(len(q), spec.num_kv_heads, q.shape[1] // spec.num_kv_heads, spec.head_dim)


def gather(cache: torch.Tensor, batch: AttentionBatch, spec: AttentionSpec, dtype: torch.dtype,
           ) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a batch's blocks, [n, num_kv_heads, blocks * block_size, head_dim] and the same of value_dim.
    """
    _, _, heads, size, dim = cache.shape
    assert batch.blocks is not None
    blocks, rows = -(-batch.context // size), batch.blocks[heads]
    found = [x.view(-1, size * dim).index_select(0, rows).view(-1, heads, blocks * size, dim) for x in cache]
    if cache.dtype == torch.uint8:
        found = [x.view(torch.float8_e4m3fn).to(dtype) for x in found]
    if spec.values_in_keys:
        return found[0], found[0][..., :spec.value_dim]
    k, v = found if len(found) == 2 else found[0].split((spec.head_dim, spec.value_dim), -1)
    return k, v


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, spec: AttentionSpec,
           head_shape: tuple[int, ...]) -> torch.Tensor:
    """q [..., queries, head_dim], k [..., context, head_dim], v [..., context, value_dim] -> [..., queries, value_dim].

    Args:
        mask: added to the scores; None is a causal one, of as many queries as keys.
        head_shape: shape in which a number of each head of one kv head broadcasts to q, behind that of the kv heads.
    """
    if not _written_out(spec):
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=spec.scale)
    scores = (q.float() @ k.float().transpose(-1, -2)).mul_(spec.scale)
    if spec.softcap is not None:
        scores.div_(spec.softcap).tanh_().mul_(spec.softcap)
    if mask is None:
        mask = torch.full(scores.shape[-2:], -torch.inf, device=scores.device).triu_(1)
    scores += mask
    if spec.sinks is not None:
        sinks = spec.sinks.float().view(spec.num_kv_heads, *head_shape)
        scores = torch.cat((scores, sinks.expand(*scores.shape[:-1], 1)), -1)
    weights = scores.softmax(-1)[..., :k.shape[-2]]
    return weights.to(v.dtype) @ v


def _written_out(spec: AttentionSpec) -> bool:
    """Whether PyTorch's scaled_dot_product_attention cannot compute the layer."""
    return spec.softcap is not None or spec.sinks is not None
