"""Paged attention in Triton: decoding sequences split over their contexts, the others by tiles of queries."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from hal.contracts.attention import AttentionSpec, refuse_unsupported
from hal.contracts.inputs import PagedModelInput
from hal.errors import ConfigError
from hal.models.ops import HeadNorms
from runners.cuda.kernels import attention as kernels
from runners.cuda.kernels import latent

_MAX_DIM = 256


class CudaAttention:
    """A hal.contracts.attention.Attention, whose layers may differ in heads and sizes.

    Attributes:
        queries: up to so many queries a sequence, in each sequence of a step, are attended to as decodes are; 0: none.

    Raises:
        ConfigError: the kernels do not have a layer's head_dim, or something else that it declares.
    """

    def __init__(self, specs: Sequence[AttentionSpec], *, device: torch.device, dtype: torch.dtype) -> None:
        self.specs, self.device, self.dtype = specs, device, dtype
        refuse_unsupported(specs, "the CUDA attention", ("softcap", "sinks", "values_in_keys"))
        for spec in specs:
            if spec.values_in_keys:
                _check_latent(spec)
        for dim in {spec.head_dim for spec in specs if not spec.values_in_keys}:
            if dim > _MAX_DIM or dim % 2:
                raise ConfigError("the CUDA attention kernels do not have this head_dim", got=dim,
                                  expected=f"even, at most {_MAX_DIM}",
                                  hint="run this model on --device cpu, or give the runner hal's PagedAttention")
        self.asked = [asked(spec) for spec in specs]
        self.latent_heads = {spec.num_heads for spec in specs if spec.values_in_keys}
        self.kv_heads = {spec.num_kv_heads for spec in specs}
        self.queries = 0
        self.units = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2

    def cache_shape(self, spec: AttentionSpec, num_blocks: int, block_size: int) -> tuple[int, ...]:
        return 1 if spec.values_in_keys else 2, num_blocks, spec.num_kv_heads, block_size, spec.head_dim

    def splits(self, num_seqs: int, context: int, kv_heads: int) -> int:
        """Programs for one sequence and kv head in the kernels of drafts and of latent attention: enough to fill the
        device, none with less than a few tiles. It follows from what a graph fixes, so replays need no other."""
        wanted = 4 * self.units // max(num_seqs * kv_heads, 1)
        return max(min(wanted, -(-context // 64), kernels.MAX_SPLITS), 1)

    def divided(self, num_seqs: int, context: int, kv_heads: int) -> kernels.Division:
        """Decodes among programs. If a tile each for all multiprocessors is the whole context, it is read early. One or
        two programs for a multiprocessor need large tiles to use the bandwidth. (H200: 1 to 128 sequences, contexts of
        180 to 2,000, heads of four models.)"""
        programs = max(num_seqs * kv_heads, 1)
        splits = min(self.units // programs, max(-(-context // 32), 1), kernels.MAX_SPLITS)
        if splits and context <= 128 * splits:
            return kernels.Division(splits, _tile(context, splits), True)
        splits = max(min(2 * self.units // programs, -(-context // 64), kernels.MAX_SPLITS), 1)
        return kernels.Division(splits, max(_tile(context, splits), 64) if programs * splits <= 2 * self.units else 64)

    def expect(self, queries: int) -> None:
        """Declare that steps will verify drafts: up to `queries` tokens a sequence."""
        fits = (kernels.most_queries(s.num_heads // s.num_kv_heads, s.head_dim, self.dtype) for s in self.specs)
        self.queries = queries if queries <= min(fits, default=0) else 0

    def warmup(self, kv_caches: Sequence[torch.Tensor]) -> None:
        """Compile all that a step of prompts and decoding sequences may need; the null block alone is read."""
        # Sinks do not count in comparisons, and whether there are any is a kernel of its own.
        for spec, layer in {(spec, spec.sinks is None): (spec, i) for i, spec in enumerate(self.specs)}.values():
            cache = known(kv_caches[layer])
            q = torch.zeros(1, spec.num_heads, spec.head_dim, dtype=self.dtype, device=self.device)
            tables, lens = (torch.zeros(shape, dtype=torch.int32, device=self.device) for shape in ((1, 1), 2))
            how = asked(spec)
            if spec.values_in_keys:
                for starts, splits in ((lens, 1), (None, 1), (None, 8), (None, 9)):
                    latent.attend(q, cache, tables, lens[:1], starts, scale=spec.scale, value=spec.value_dim,
                                  splits=splits)
                continue
            for keys, splits in itertools.product((64, 128), (1, 8, 9)):
                kernels.decode(q, cache, tables, lens[:1], torch.empty_like(q), how=kernels.Division(splits, keys),
                               **how)
            for queries in (64, 65):
                kernels.prefill(q, cache, tables, lens[:1], lens, torch.empty_like(q), first_seq=0, max_queries=queries,
                                **how)
            # Padding is not written: no sequence has a query here. Rotary embeddings and norms are the layers' affair.
            rotary, norms = (lens, torch.zeros(1, spec.head_dim, device=self.device)), HeadNorms(q[0, 0], q[0, 0], 1.0)
            for splits, more in itertools.product((1, 8, 9) if self.queries else (), ((), (rotary,), (rotary, norms))):
                new = kernels.New(q[:, :spec.num_kv_heads], q[:, :spec.num_kv_heads], lens, *more)
                kernels.extend(q, new, cache, tables, lens[:1], lens, torch.empty_like(q), queries=self.queries,
                               splits=splits, **how)

    def begin(self, model_input: PagedModelInput, kv_caches: Sequence[torch.Tensor]) -> CudaStep:
        return CudaStep(self, model_input, kv_caches)


def _tile(context: int, splits: int) -> int:
    """Keys at once of a program that has a part of the context."""
    return next((keys for keys in (32, 64) if context <= keys * splits), 128)


def _check_latent(spec: AttentionSpec) -> None:
    rest = spec.head_dim - spec.value_dim
    if spec.num_kv_heads != 1 or spec.window or spec.softcap or spec.sinks is not None or (
            spec.value_dim > latent.MAX_VALUE or not 0 < rest <= latent.MAX_REST):
        raise ConfigError("the CUDA kernel for values in keys does not have such a layer", got=spec,
                          expected=f"one key for all heads, of at most {latent.MAX_VALUE} + {latent.MAX_REST} entries, "
                                   "and no window, softcap or sinks", hint="run this model on --device cpu")


def asked(spec: AttentionSpec) -> dict[str, Any]:
    """Arguments of the kernels."""
    return {"scale": spec.scale, "window": spec.window, "softcap": spec.softcap, "sinks": spec.sinks}


def known(cache: torch.Tensor) -> torch.Tensor:
    """A cache as what it is: bytes are fp8."""
    return cache.view(torch.float8_e4m3fn) if cache.dtype == torch.uint8 else cache


class CudaStep:
    """One step: nothing here reads the device."""

    def __init__(self, attention: CudaAttention, m: PagedModelInput, kv_caches: Sequence[torch.Tensor]) -> None:
        self.m, self.specs, self.asked = m, attention.specs, attention.asked
        self.caches = [known(cache) for cache in kv_caches]
        tokens, seqs = len(m.input_ids), len(m.seq_lens)
        self.decodes = min(seqs, tokens) if m.max_query_len == 1 else m.num_decode_seqs
        self.queries = attention.queries if 1 < m.max_query_len <= attention.queries else 0
        if self.queries:
            self.decodes = seqs
        self.lens, self.searched = m.seq_lens, m.max_query_len == 0 < seqs
        if self.searched:  # leading sequences of one query decode; the device finds out how many these are
            ends = torch.arange(1, seqs + 1, dtype=torch.int32, device=m.seq_lens.device)
            self.decodes, self.lens = min(seqs, tokens), torch.where(m.query_start_loc[1:] == ends, m.seq_lens, 0)
        context = m.block_tables.shape[1] * m.block_size
        self.splits = {n: attention.splits(self.decodes, context, n) for n in attention.kv_heads}
        self.divided = {n: attention.divided(self.decodes, context, n) for n in attention.kv_heads}
        self.max_queries = m.max_query_len or tokens
        self.latent_splits = {}
        if m.max_query_len == 1:
            self.latent_splits = {n: min(attention.splits(tokens, context, latent.head_blocks(n)), latent.MAX_SPLITS)
                                  for n in attention.latent_heads}

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if self.specs[layer].values_in_keys:
            return self._attend_latents(layer, q, k)
        return self._attend(layer, q, kernels.New(k, v, self.m.slot_mapping))

    def _attend_latents(self, layer: int, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        m, spec, cache = self.m, self.specs[layer], self.caches[layer]
        latent.write(k, cache, m.slot_mapping)
        starts = None if m.max_query_len == 1 else m.query_start_loc
        return latent.attend(q, cache, m.block_tables, m.seq_lens, starts, scale=spec.scale, value=spec.value_dim,
                             splits=self.latent_splits.get(spec.num_heads, 1)).flatten(1)

    def rotary(self, layer: int, qkv: torch.Tensor, num_kv_heads: int, table: torch.Tensor, norms: HeadNorms | None,
               ) -> torch.Tensor:
        """As Ops.rotary_attention has it."""
        k, v = qkv[:, -2 * num_kv_heads:-num_kv_heads], qkv[:, -num_kv_heads:]
        new = kernels.New(k, v, self.m.slot_mapping, (self.m.positions, table), norms)
        return self._attend(layer, qkv[:, :-2 * num_kv_heads], new)

    def _attend(self, layer: int, q: torch.Tensor, new: kernels.New) -> torch.Tensor:
        m, spec, cache, n = self.m, self.specs[layer], self.caches[layer], self.decodes
        alone = self.queries > 0 or (n == len(q) and not self.searched)  # then one launch does it all
        if not alone:
            q = kernels.write_kv(q, new, cache)
        splits = self.splits[spec.num_kv_heads]
        # Otherwise no kernel writes the padding of a step.
        make = torch.empty if alone and (not self.queries or splits > 1) else torch.zeros
        out = make(q.shape, dtype=q.dtype, device=q.device)
        if self.queries:
            kernels.extend(q, new, cache, m.block_tables, m.seq_lens, m.query_start_loc, out, queries=self.queries,
                           splits=splits, **self.asked[layer])
            return out.flatten(1)
        if n:
            kernels.decode(q[:n], cache, m.block_tables[:n], self.lens[:n], out, new=new if alone else None,
                           how=self.divided[spec.num_kv_heads], **self.asked[layer])
        if m.max_query_len != 1 and (len(m.seq_lens) > n or self.searched):
            kernels.prefill(q, cache, m.block_tables, m.seq_lens, m.query_start_loc, out,
                            first_seq=-1 if self.searched else n, max_queries=self.max_queries, **self.asked[layer])
        return out.flatten(1)
