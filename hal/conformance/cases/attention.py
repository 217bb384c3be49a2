"""L2: attention over a paged cache (runner.make_attention), against fp64, for every way in which a context grows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from hal.conformance.case import case
from hal.conformance.context import Context
from hal.conformance.reference import attend
from hal.contracts.attention import AttentionSpec
from hal.contracts.inputs import NULL_BLOCK, PagedModelInput
from hal.errors import ConfigError
from hal.schema.packed import as_tensor

# Heads, key-value heads, head size: one key head for all, groups, and none shared.
_GEOMETRIES = ((4, 1, 16), (4, 2, 32), (3, 3, 64))
_BLOCKS = 40


class Batch:
    """Sequences over shuffled blocks of one cache, whose contexts grow as a case says.

    Attributes:
        k, v: every key and value written so far, by sequence and layer, on the host.
    """

    def __init__(self, ctx: Context, specs: list[AttentionSpec], block_size: int, sequences: int) -> None:
        session = ctx.session(warm=False)
        self.ctx, self.specs, self.size, self.device = ctx, specs, block_size, session.device
        self.input_type = session.runner.input_type
        self.attention = ctx.part(session, "make_attention")(specs, device=session.device, dtype=ctx.torch_dtype)
        self.caches = [torch.zeros(self.attention.cache_shape(spec, _BLOCKS, block_size), dtype=ctx.torch_dtype,
                                   device=session.device) for spec in specs]
        self.sinks = [None if spec.sinks is None else spec.sinks.cpu() for spec in specs]
        self.pool = ctx.rng.permutation(np.arange(1, _BLOCKS)).tolist()
        self.tables: list[list[int]] = [[] for _ in range(sequences)]
        self.k, self.v = ([[torch.zeros(0, s.num_kv_heads, dim, dtype=ctx.torch_dtype) for s, dim in zip(
            specs, dims, strict=True)] for _ in range(sequences)]
            for dims in ([s.head_dim for s in specs], [s.value_dim for s in specs]))

    def step(self, queries: dict[int, int], what: str, pad: int = 0) -> None:
        """Compute `queries` new tokens of each sequence, in every layer, and compare. Raises Mismatch."""
        ctx, order = self.ctx, sorted(queries, key=lambda s: queries[s] != 1)
        totals = [len(self.k[s][0]) + queries[s] for s in order]
        for s, total in zip(order, totals, strict=True):
            while len(self.tables[s]) * self.size < total:
                self.tables[s].append(self.pool.pop())
        counts = [queries[s] for s in order]
        model_input, real = self._input(order, counts, totals, pad), sum(counts)
        step = self.attention.begin(model_input, self.caches)
        mine = sorted({NULL_BLOCK, *(b for s in order for b in self.tables[s])})
        others = torch.tensor([b for b in range(_BLOCKS) if b not in mine], device=self.device)
        for layer, spec in enumerate(self.specs):
            q = ctx.normal(real + pad, spec.num_heads, spec.head_dim)
            k, v = (ctx.normal(real + pad, spec.num_kv_heads, dim) for dim in (spec.head_dim, spec.value_dim))
            v = k[..., :spec.value_dim] if spec.values_in_keys else v
            before = self.caches[layer][:, others].clone()
            out = step(layer, *(x.to(self.device) for x in (q, k, v)))
            ctx.equal(f"{what}: shape", list(out.shape), [real + pad, spec.num_heads * spec.value_dim])
            ctx.check(out.dtype == ctx.torch_dtype, f"{what}: {out.dtype} comes out")
            ctx.check(bool(out.isfinite().all()), f"{what}: not finite, padding or not")
            ctx.check(before.equal(self.caches[layer][:, others]), f"{what}: blocks of other sequences were written")
            at, found = 0, out.cpu().view(-1, spec.num_heads, spec.value_dim)
            for s, count in zip(order, counts, strict=True):
                self.k[s][layer] = torch.cat((self.k[s][layer], k[at:at + count]))
                self.v[s][layer] = torch.cat((self.v[s][layer], v[at:at + count]))
                expected = attend(q[at:at + count].double(), self.k[s][layer].double(), self.v[s][layer].double(),
                                  spec.scale, spec.window, spec.softcap, self.sinks[layer])
                ctx.close("attention", found[at:at + count], expected, f"{what}: sequence {s}, {count} queries over "
                          f"{len(self.k[s][layer])}, layer {layer}, window {spec.window}")
                at += count

    def _input(self, order: list[int], counts: list[int], totals: list[int], pad: int) -> PagedModelInput:
        positions = np.concatenate([np.arange(t - c, t) for c, t in zip(counts, totals, strict=True)])
        rows = np.repeat(np.arange(len(order)), counts)
        width = max(len(self.tables[s]) for s in order)
        tables = np.full((len(order), width), NULL_BLOCK)
        for row, s in enumerate(order):
            used = -(-totals[row] // self.size)
            tables[row, :used] = self.tables[s][:used]
        starts = np.concatenate([[0], np.cumsum(counts)])
        arrays = {"input_ids": positions * 0, "positions": positions, "query_start_loc": starts, "seq_lens": totals,
                  "slot_mapping": tables[rows, positions // self.size] * self.size + positions % self.size,
                  "block_tables": tables, "logits_indices": starts[1:] - 1}
        fields: dict[str, Any] = {n: as_tensor(np.ascontiguousarray(a, np.int32), "int32") for n, a in arrays.items()}
        decodes = sum(c == 1 for c in counts)
        made = PagedModelInput(block_size=self.size, num_decode_seqs=decodes, num_samples=len(order), **fields)
        made.validate()
        made.check()
        if pad:
            made = made.padded(num_tokens=len(positions) + pad)
        return PagedModelInput.from_buffer(made.to_buffer(), self.device)


def _specs(heads: int, kv_heads: int, dim: int, *windows: int | None) -> list[AttentionSpec]:
    return [AttentionSpec(heads, kv_heads, dim, 1.3 * dim**-0.5, window) for window in windows]


@case(2, "attention", "checkpoints")
def prefill(ctx: Context) -> None:
    """Whole prompts: one token, less than a block, exactly one, several and a part; the mask is causal."""
    for geometry in _GEOMETRIES:
        batch = Batch(ctx, _specs(*geometry, None), 16, 5)
        batch.step({0: 1, 1: 7, 2: 16, 3: 17, 4: 50}, f"prefill {geometry}")


@case(2, "attention", "checkpoints")
def decode(ctx: Context) -> None:
    """One query each over contexts of different lengths, across the edges of blocks."""
    for geometry in _GEOMETRIES:
        batch = Batch(ctx, _specs(*geometry, None, None), 16, 5)
        batch.step({0: 2, 1: 14, 2: 15, 3: 31, 4: 60}, f"prefill {geometry}")
        for i in range(3):
            batch.step(dict.fromkeys(range(5), 1), f"decode {i} {geometry}")


@case(2, "attention", "checkpoints")
def chunk(ctx: Context) -> None:
    """A prompt in chunks of any size attends to the keys and values that earlier steps wrote."""
    for geometry in _GEOMETRIES:
        batch = Batch(ctx, _specs(*geometry, None), 16, 3)
        for piece in ({0: 5, 1: 16, 2: 2}, {0: 11, 1: 3, 2: 40}, {0: 20, 1: 14}, {1: 2, 0: 9, 2: 1}):
            batch.step(piece, f"chunk {geometry}")


@case(2, "attention", "checkpoints")
def mixed(ctx: Context) -> None:
    """Decoding sequences, chunks and new prompts in one step; sequences that are not in a step keep their cache."""
    batch = Batch(ctx, _specs(*_GEOMETRIES[1], None, None), 16, 5)
    batch.step({0: 12, 1: 33, 2: 1}, "mixed, start")
    for i in range(4):
        batch.step({0: 1, 1: 1, 3: 9} if i % 2 else {2: 1, 1: 5, 4: 18, 0: 1}, f"mixed step {i}")


@case(2, "attention", "checkpoints")
def window(ctx: Context) -> None:
    """A sliding window hides the tokens before it, only in layers that have one, in prefill, chunks and decode."""
    for geometry in _GEOMETRIES[1:]:
        batch = Batch(ctx, _specs(*geometry, 8, None, 1, 24), 16, 3)
        for queries in ({0: 30, 1: 8, 2: 9}, {0: 1, 1: 1, 2: 1}, {0: 14, 1: 1, 2: 25}, {0: 1, 1: 1, 2: 1}):
            batch.step(queries, f"window {geometry}")


@case(2, "attention", "checkpoints")
def padding(ctx: Context) -> None:
    """Tokens of padding write the null block alone, and their rows are finite."""
    batch = Batch(ctx, _specs(*_GEOMETRIES[1], None), 16, 3)
    for queries in ({0: 5, 1: 20, 2: 16}, {0: 1, 1: 1, 2: 1}, {0: 1, 1: 4}, {0: 1, 1: 1, 2: 1}):
        batch.step(queries, "padded", pad=5)


@case(2, "attention", "checkpoints")
def what_a_layer_may_declare(ctx: Context) -> None:
    """Layers of unequal heads and sizes, values of another size than keys or in them, softcap, sinks: each is right, or
    refused when the attention is made, by a ConfigError that says what to do."""
    sinks, (a, b) = ctx.normal(4, scale=2.0), (AttentionSpec(4, 2, 16, 0.3), AttentionSpec(6, 6, 32, 0.2, 9))
    device = ctx.session(warm=False).device
    for name, specs in {"unequal layers": [a, b, a], "value_dim": [replace(a, value_dim=32), replace(b, value_dim=16)],
                        "softcap": [replace(a, softcap=1.5), replace(b, softcap=3.0)],
                        "sinks": [replace(a, sinks=sinks.to(device))], "values in keys": [
                            AttentionSpec(8, 1, 48, 0.2, value_dim=32, values_in_keys=True)]}.items():
        try:
            batch = Batch(ctx, specs, 16, 3)
        except ConfigError as error:
            ctx.check(error.hint is not None, f"{name}: the error names no alternative")
            continue
        for queries in ({0: 30, 1: 8, 2: 17}, {0: 1, 1: 1, 2: 1}, {0: 14, 1: 1}, {0: 1, 1: 1, 2: 1}):
            batch.step(queries, name)
