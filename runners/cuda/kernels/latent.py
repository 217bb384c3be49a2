"""Paged attention whose values are the first part of its keys, of which all heads share one: latent attention (arXiv
2405.04434). A layer's cache is [1, num_blocks, 1, block_size, head_dim].

A program has some heads of one query and a part of its context. So decoding and prompts run alike, and a prompt reads
its context once for each of its queries, from the cache of the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from runners.cuda.kernels.attention import _join, _stored
from runners.cuda.kernels.launch import launch_options, wait_for_inputs

MAX_SPLITS, MAX_VALUE, MAX_REST = 32, 512, 128
_HEADS = 16  # of a program: the fewest rows of a product


@triton.jit
def _write(k, cache, slots, k_stride, block_stride, size, DIM: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr):
    wait_for_inputs(PDL)
    token, dim = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    slot = tl.load(slots + token).to(tl.int64)
    into = cache + slot // size * block_stride + slot % size * DIM + dim
    tl.store(into, _stored(tl.load(k + token * k_stride + dim, mask=dim < DIM, other=0.0), cache), mask=dim < DIM)


@triton.jit(do_not_specialize=["table_stride", "splits", "seqs"])
def _attend(q, cache, tables, lens, starts, part_out, part_max, part_sum, out, splits, seqs, q_stride, table_stride,
            block_stride, scale, HEADS: tl.constexpr, DIM: tl.constexpr, VALUE: tl.constexpr, SIZE: tl.constexpr,
            DECODE: tl.constexpr, JOINED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr,
            BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr):
    wait_for_inputs(PDL)
    token, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    if DECODE:
        seq = token
        length = tl.load(lens + seq, mask=seq < seqs, other=0)
    else:  # the query's sequence, and so many of its keys as the query sees
        count = tl.program_id(0) * 0
        for first in range(0, seqs, 128):
            lane = first + tl.arange(0, 128)
            count += tl.sum((tl.load(starts + 1 + lane, mask=lane < seqs, other=2147483647) <= token).to(tl.int32))
        there = count < seqs
        seq = count.to(tl.int64)
        after = tl.load(starts + 1 + seq, mask=there, other=0) - token.to(tl.int32)
        length = tl.where(there, tl.load(lens + seq, mask=there, other=0) - after + 1, 0)
    each = tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N
    begin = split * each
    end = tl.minimum(begin + each, length)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    dim, rest, at = tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_N)
    inside, mine = (head < HEADS)[:, None], q + token * q_stride + head[:, None] * DIM
    query = tl.load(mine + dim[None], mask=inside & (dim < VALUE)[None], other=0.0)
    more = tl.load(mine + VALUE + rest[None], mask=inside & (rest < DIM - VALUE)[None], other=0.0)
    best = tl.full((BLOCK_H,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    acc = tl.zeros((BLOCK_H, BLOCK_V), tl.float32)
    for n in range(begin, end, BLOCK_N):
        key = n + at
        seen = key < end
        block = tl.load(tables + seq * table_stride + key // SIZE, mask=seen, other=0).to(tl.int64)
        row = (cache + block * block_stride + key % SIZE * DIM)[:, None]
        value = tl.load(row + dim[None], mask=seen[:, None] & (dim < VALUE)[None], other=0.0).to(query.dtype)
        tail = tl.load(row + VALUE + rest[None], mask=seen[:, None] & (rest < DIM - VALUE)[None], other=0.0)
        score = tl.dot(query, tl.trans(value), input_precision=PRECISION)
        score += tl.dot(more, tl.trans(tail.to(query.dtype)), input_precision=PRECISION)
        score = tl.where(seen[None], score * scale, -float("inf"))
        now = tl.maximum(best, tl.max(score, 1))
        old = tl.exp2((best - now) * 1.4426950408889634)
        p = tl.exp2((score - now[:, None]) * 1.4426950408889634)
        total = total * old + tl.sum(p, 1)
        acc = acc * old[:, None] + tl.dot(p.to(value.dtype), value, input_precision=PRECISION)
        best = now
    if not JOINED:
        result = (acc / tl.where(total > 0, total, 1.0)[:, None]).to(out.dtype.element_ty)
        tl.store(out + (token * HEADS + head[:, None]) * VALUE + dim[None], result, mask=inside & (dim < VALUE)[None])
    else:
        part = (token * HEADS + head) * splits + split
        tl.store(part_max + part, best, mask=head < HEADS)
        tl.store(part_sum + part, total, mask=head < HEADS)
        if begin < end:
            tl.store(part_out + part[:, None] * BLOCK_V + dim[None], acc, mask=inside)


def head_blocks(heads: int) -> int:
    """Programs that share the heads of a query."""
    return triton.cdiv(heads, _HEADS)


def write(k: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    """k [n, 1, head_dim], tokens may have gaps, into a layer's cache."""
    dim = k.shape[-1]
    _write[(len(k),)](k, cache, slots, k.stride(0), cache.stride(1), cache.shape[3], DIM=dim,
                      BLOCK_D=triton.next_power_of_2(dim), num_warps=4, **launch_options(k))


def attend(q: torch.Tensor, cache: torch.Tensor, tables: torch.Tensor, lens: torch.Tensor, starts: torch.Tensor | None,
           *, scale: float, value: int, splits: int) -> torch.Tensor:
    """Causal attention; the queries' own keys are in the cache by now. Rows of padding are zero.

    Args:
        q: [n, heads, head_dim], tokens may have gaps. tables: [seqs, blocks] int32. lens: [seqs] int32.
        starts: [seqs + 1] int32; None: each sequence has one query. splits: programs that share a query's context.

    Returns:
        [n, heads, value].
    """
    (n, heads, dim), size = q.shape, cache.shape[3]
    block_v, block_r = (max(triton.next_power_of_2(x), 16) for x in (value, dim - value))
    parts = n * heads * splits if splits > 1 else 1
    part_out = torch.empty(parts, block_v if splits > 1 else 1, dtype=torch.float32, device=q.device)
    part_max, part_sum = torch.empty(2, parts, dtype=torch.float32, device=q.device)
    out = torch.empty(n, heads, value, dtype=q.dtype, device=q.device)
    wide = q.dtype == torch.float32
    _attend[(n, head_blocks(heads), splits)](
        q, cache, tables, lens, lens if starts is None else starts, part_out, part_max, part_sum, out, splits,
        lens.shape[0], q.stride(0), tables.stride(0), cache.stride(1), scale, HEADS=heads, DIM=dim, VALUE=value,
        SIZE=size, DECODE=starts is None, JOINED=splits > 1, BLOCK_H=_HEADS, BLOCK_V=block_v, BLOCK_R=block_r,
        BLOCK_N=16 if wide else 32, PRECISION="ieee" if wide else "tf32", num_warps=8 if block_v > 256 else 4,
        num_stages=1 if wide else 2, **launch_options(q))
    if splits > 1:
        _join[(n * heads,)](part_out, part_max, part_sum, out, None, splits, 0, HEADS=heads, DIM=value,
                            BLOCK_S=8 if splits <= 8 else MAX_SPLITS, BLOCK_D=block_v, num_warps=8, **launch_options(q))
    return out
