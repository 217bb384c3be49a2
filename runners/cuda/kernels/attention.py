"""Paged attention. A layer's cache is [2, num_blocks, num_kv_heads, block_size, head_dim].

Decoding is split over the context: programs of one (sequence, kv head) each reduce a part of it for the group's query
heads at once, and a second kernel joins the parts (Flash-Decoding; online softmax: arXiv 1805.02867, 2205.14135).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from runners.cuda.kernels.launch import launch_options, wait_for_inputs


@triton.jit
def _write_kv(k, v, cache, slots, k_stride, v_stride, kv_offset, block_stride, head_stride, size,
              HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
              PDL: tl.constexpr):
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    head, dim = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_D)[None]
    here = (head < HEADS) & (dim < DIM)
    into = cache + slot // size * block_stride + head * head_stride + slot % size * DIM + dim
    tl.store(into, tl.load(k + token * k_stride + head * DIM + dim, mask=here), mask=here)
    tl.store(into + kv_offset, tl.load(v + token * v_stride + head * DIM + dim, mask=here), mask=here)


@triton.jit
def _decode(q, cache, tables, lens, part_out, part_max, part_sum, out, q_stride, table_stride, kv_offset, block_stride,
            head_stride, scale, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, SIZE: tl.constexpr,
            WINDOW: tl.constexpr, SPLITS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
            BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr):
    wait_for_inputs(PDL)
    seq, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(lens + seq)
    first = tl.maximum(length - WINDOW, 0) if WINDOW > 0 else 0
    # Parts begin at whole tiles, so that all programs but one read full ones.
    each = tl.cdiv(tl.cdiv(length - first, SPLITS), BLOCK_N) * BLOCK_N
    begin = first + split * each
    end = tl.minimum(begin + each, length)
    group, dim, at = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    heads = kv_head * GROUP + group
    real = (group[:, None] < GROUP) & (dim[None] < DIM)
    query = tl.load(q + seq * q_stride + heads[:, None] * DIM + dim[None], mask=real, other=0.0)
    best = tl.full((BLOCK_G,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    base = cache + kv_head * head_stride
    for start in range(begin, end, BLOCK_N):
        key = start + at
        seen = key < end
        block = tl.load(tables + seq * table_stride + key // SIZE, mask=seen, other=0).to(tl.int64)
        row = base + block * block_stride + key % SIZE * DIM
        there = seen[:, None] & (dim[None] < DIM)
        k = tl.load(row[:, None] + dim[None], mask=there, other=0.0)
        v = tl.load(row[:, None] + kv_offset + dim[None], mask=there, other=0.0)
        score = tl.dot(query, tl.trans(k), input_precision=PRECISION) * scale
        score = tl.where(seen[None], score, -float("inf"))
        now = tl.maximum(best, tl.max(score, 1))  # finite: every tile has a key
        old = tl.exp2((best - now) * 1.4426950408889634)
        p = tl.exp2((score - now[:, None]) * 1.4426950408889634)
        total = total * old + tl.sum(p, 1)
        acc = acc * old[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        best = now
    if SPLITS == 1:
        into = out + (seq * KV_HEADS * GROUP + heads[:, None]) * DIM + dim[None]
        tl.store(into, (acc / tl.where(total > 0, total, 1.0)[:, None]).to(out.dtype.element_ty), mask=real)
    else:
        part = (seq * KV_HEADS * GROUP + heads) * SPLITS + split
        mine = group < GROUP
        tl.store(part_max + part, best, mask=mine)
        tl.store(part_sum + part, total, mask=mine)
        if begin < end:
            tl.store(part_out + part[:, None] * BLOCK_D + dim[None], acc, mask=mine[:, None])


@triton.jit
def _join(part_out, part_max, part_sum, out, SPLITS: tl.constexpr, DIM: tl.constexpr, BLOCK_S: tl.constexpr,
          BLOCK_D: tl.constexpr, PDL: tl.constexpr):
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)  # of sequences times heads
    split, dim = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    there = split < SPLITS
    best = tl.load(part_max + row * SPLITS + split, mask=there, other=-float("inf"))
    top = tl.max(best)
    used = best > -float("inf")
    weight = tl.where(used, tl.exp2((best - top) * 1.4426950408889634), 0.0)
    total = tl.sum(tl.load(part_sum + row * SPLITS + split, mask=there, other=0.0) * weight)
    # A part without keys was not written: what lies there may be anything.
    parts = tl.load(part_out + (row * SPLITS + split[:, None]) * BLOCK_D + dim[None], mask=used[:, None], other=0.0)
    acc = tl.sum(parts * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + row * DIM + dim, acc.to(out.dtype.element_ty), mask=dim < DIM)


@triton.jit
def _prefill(q, cache, tables, lens, starts, out, first_seq, q_stride, table_stride, kv_offset, block_stride,
             head_stride, scale, HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, SIZE: tl.constexpr,
             WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
             PRECISION: tl.constexpr, PDL: tl.constexpr):
    wait_for_inputs(PDL)
    seq, head = tl.program_id(2) + first_seq, tl.program_id(1)
    start = tl.load(starts + seq)
    queries = tl.load(starts + seq + 1) - start
    # The last tiles see the longest context: they go first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    if tile * BLOCK_M < queries:
        length = tl.load(lens + seq)
        m, dim, at = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
        inside = (m < queries)[:, None] & (dim[None] < DIM)
        rows = (start + m).to(tl.int64)[:, None]
        query = tl.load(q + rows * q_stride + head * DIM + dim[None], mask=inside, other=0.0)
        place = length - queries + m  # of each query in its sequence
        best = tl.full((BLOCK_M,), -float("inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        base = cache + head // GROUP * head_stride
        lowest = length - queries + tile * BLOCK_M
        end = tl.minimum(lowest + BLOCK_M, length)
        begin = tl.maximum(lowest - WINDOW + 1, 0) // BLOCK_N * BLOCK_N if WINDOW > 0 else 0
        factor = scale * 1.4426950408889634
        for n in range(begin, end, BLOCK_N):
            key = n + at
            there = key < end
            block = tl.load(tables + seq.to(tl.int64) * table_stride + key // SIZE, mask=there, other=0).to(tl.int64)
            row = base + block * block_stride + key % SIZE * DIM
            real = there[:, None] & (dim[None] < DIM)
            k = tl.load(row[:, None] + dim[None], mask=real, other=0.0)
            score = tl.dot(query, tl.trans(k), input_precision=PRECISION) * factor
            if n + BLOCK_N > lowest or WINDOW > 0:
                seen = key[None] <= place[:, None]
                if WINDOW > 0:
                    seen = seen & (key[None] > place[:, None] - WINDOW)
                score = tl.where(seen, score, -float("inf"))
            now = tl.maximum(best, tl.max(score, 1))
            safe = tl.where(now > -float("inf"), now, 0.0)  # no key of this tile, nor before it, is seen
            old = tl.exp2(best - safe)
            p = tl.exp2(score - safe[:, None])
            total = total * old + tl.sum(p, 1)
            v = tl.load(row[:, None] + kv_offset + dim[None], mask=real, other=0.0)
            acc = acc * old[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
            best = now
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out + (rows * HEADS + head) * DIM + dim[None], acc.to(out.dtype.element_ty), mask=inside)


def write_kv(k: torch.Tensor, v: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    """k, v [n, kv_heads, head_dim], tokens may have gaps, into the slots [n] of a layer's cache."""
    n, heads, dim = k.shape
    _write_kv[(n,)](k, v, cache, slots, k.stride(0), v.stride(0), cache.stride(0), cache.stride(1), cache.stride(2),
                    cache.shape[3], HEADS=heads, DIM=dim, BLOCK_H=triton.next_power_of_2(heads),
                    BLOCK_D=triton.next_power_of_2(dim), num_warps=2, **launch_options(k))


def decode(q: torch.Tensor, cache: torch.Tensor, tables: torch.Tensor, lens: torch.Tensor, out: torch.Tensor, *,
           scale: float, window: int | None, splits: int) -> None:
    """One query a sequence.

    Args:
        q: [n, heads, head_dim], tokens may have gaps. tables: [n, blocks] int32. lens: [n] int32; 0 gives zeros.
        out: [n, heads, head_dim], contiguous. splits: programs that share a sequence's context.
    """
    n, heads, dim = q.shape
    kv_heads, size = cache.shape[2], cache.shape[3]
    group, block_d = heads // kv_heads, max(triton.next_power_of_2(dim), 16)
    parts = n * heads * splits if splits > 1 else 1
    part_out = torch.empty(parts, block_d if splits > 1 else 1, dtype=torch.float32, device=q.device)
    part_max, part_sum = torch.empty(2, parts, dtype=torch.float32, device=q.device)
    wide = q.dtype == torch.float32
    _decode[(n, kv_heads, splits)](
        q, cache, tables, lens, part_out, part_max, part_sum, out, q.stride(0), tables.stride(0), cache.stride(0),
        cache.stride(1), cache.stride(2), scale, KV_HEADS=kv_heads, GROUP=group, DIM=dim, SIZE=size,
        WINDOW=window or 0, SPLITS=splits, BLOCK_G=max(triton.next_power_of_2(group), 16), BLOCK_D=block_d,
        BLOCK_N=32 if wide or block_d > 128 else 64, PRECISION="ieee" if wide else "tf32", num_warps=4,
        num_stages=2 if wide or block_d > 128 else 4, **launch_options(q))
    if splits > 1:
        _join[(n * heads,)](part_out, part_max, part_sum, out, SPLITS=splits, DIM=dim,
                            BLOCK_S=triton.next_power_of_2(splits), BLOCK_D=block_d, num_warps=4, **launch_options(q))


def prefill(q: torch.Tensor, cache: torch.Tensor, tables: torch.Tensor, lens: torch.Tensor, starts: torch.Tensor,
            out: torch.Tensor, *, first_seq: int, max_queries: int, scale: float, window: int | None) -> None:
    """Several queries a sequence, causal; their own keys are in the cache by now.

    Args:
        q: [n, heads, head_dim] of the whole step, tokens may have gaps. starts: [seqs + 1] int32.
        first_seq: sequences before it are left alone. max_queries: of one sequence.
        out: [n, heads, head_dim], contiguous.
    """
    heads, dim = q.shape[1:]
    kv_heads, size = cache.shape[2], cache.shape[3]
    wide, block_d = q.dtype == torch.float32, max(triton.next_power_of_2(dim), 16)
    block_m, block_n = (32, 32) if wide or block_d > 128 else (128 if max_queries > 64 else 64, 64)
    grid = (triton.cdiv(max_queries, block_m), heads, lens.shape[0] - first_seq)
    _prefill[grid](
        q, cache, tables, lens, starts, out, first_seq, q.stride(0), tables.stride(0), cache.stride(0), cache.stride(1),
        cache.stride(2), scale, HEADS=heads, GROUP=heads // kv_heads, DIM=dim, SIZE=size, WINDOW=window or 0,
        BLOCK_M=block_m, BLOCK_D=block_d, BLOCK_N=block_n, PRECISION="ieee" if wide else "tf32",
        num_warps=8 if block_m == 128 else 4, num_stages=2 if wide or block_d > 128 else 3, **launch_options(q))
