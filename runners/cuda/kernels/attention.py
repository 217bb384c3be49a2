"""Paged attention. A layer's cache is [2, num_blocks, num_kv_heads, block_size, head_dim].

Decoding, also of a few tokens a sequence, is split over the context: programs of one (sequence, kv head) each reduce a
part of it for the group's query heads at once, and a second kernel joins the parts (Flash-Decoding; online softmax:
arXiv 1805.02867, 2205.14135).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from hal.models.ops import HeadNorms
from runners.cuda.kernels.elementwise import scaled
from runners.cuda.kernels.launch import launch_options, program_memory, wait_for_inputs


@triton.jit
def _turn(angles, gains, dim, HALF: tl.constexpr, NORM: tl.constexpr):
    """What `_rotated` needs at `dim`, which is known before its input: a position's cosines and sines, and the gains of
    the head's norm, there and in the other half."""
    cos, sin = tl.load(angles + dim % HALF), tl.load(angles + HALF + dim % HALF)
    gain, swapped = cos, cos
    if NORM:
        gain = tl.load(gains + dim, mask=dim < 2 * HALF, other=0.0)
        swapped = tl.load(gains + (dim + HALF) % (2 * HALF))
    return cos, tl.where(dim < HALF, -sin, sin), gain, swapped


@triton.jit
def _rotated(head, dim, mask, turn, eps, HALF: tl.constexpr, NORM: tl.constexpr):
    """Values at `head + dim`, normed if NORM, and rotated in the half-split layout; rounded operations of the model's
    dtype, as transformers has them."""
    cos, sin, gain, swapped = turn
    kind = head.dtype.element_ty
    value = tl.load(head + dim, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(head + (dim + HALF) % (2 * HALF), mask=mask, other=0.0).to(tl.float32)
    if NORM:
        squares = tl.sum(value * value, len(value.shape) - 1, keep_dims=True)
        scale = 1.0 / tl.sqrt(squares / (2 * HALF) + eps)
        value = scaled(value, scale, gain, kind).to(kind).to(tl.float32)
        other = scaled(other, scale, swapped, kind).to(kind).to(tl.float32)
    return (value * cos.to(kind).to(tl.float32) + other * sin.to(kind).to(tl.float32)).to(kind)


@triton.jit
def _stored(value, like):
    """In the dtype of a cache. The largest fp8 (e4m3) is 448, and beyond it there is only NaN."""
    if like.dtype.element_ty == tl.float8e4nv:
        value = tl.minimum(tl.maximum(value.to(tl.float32), -448.0), 448.0).to(tl.float8e4nv)
    return value


@triton.jit
def _write_kv(q, k, v, cache, slots, positions, table, q_norm, k_norm, eps, q_out, q_stride, k_stride, v_stride,
              kv_offset, block_stride, head_stride, size, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
              DIM: tl.constexpr, ROTARY: tl.constexpr, NORM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_H: tl.constexpr,
              BLOCK_D: tl.constexpr, PDL: tl.constexpr):
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    head, dim = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_D)[None]
    here = (head < KV_HEADS) & (dim < DIM)
    into = cache + slot // size * block_stride + head * head_stride + slot % size * DIM + dim
    source = k + token * k_stride + head * DIM
    if ROTARY:
        angles = table + tl.load(positions + token).to(tl.int64) * DIM
        turn = _turn(angles, k_norm, dim, DIM // 2, NORM)
        tl.store(into, _stored(_rotated(source, dim, here, turn, eps, DIM // 2, NORM), cache), mask=here)
        row = tl.arange(0, BLOCK_Q)[:, None]
        real = (row < HEADS) & (dim < DIM)
        turn = _turn(angles, q_norm, dim, DIM // 2, NORM)
        turned = _rotated(q + token * q_stride + row * DIM, dim, real, turn, eps, DIM // 2, NORM)
        tl.store(q_out + (token * HEADS + row) * DIM + dim, turned, mask=real)
    else:
        tl.store(into, _stored(tl.load(source + dim, mask=here), cache), mask=here)
    tl.store(into + kv_offset, _stored(tl.load(v + token * v_stride + head * DIM + dim, mask=here), cache), mask=here)


@triton.jit
def _tile(base, tables, start, end, kv_offset, block_stride, DIM: tl.constexpr, SIZE: tl.constexpr,
          BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Keys and values of BLOCK_N places, and which of them there are."""
    key, dim = start + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    seen = key < end
    block = tl.load(tables + key // SIZE, mask=seen, other=0).to(tl.int64)
    row = base + block * block_stride + key % SIZE * DIM
    there = seen[:, None] & (dim[None] < DIM)
    k = tl.load(row[:, None] + dim[None], mask=there, other=0.0)
    return k, tl.load(row[:, None] + kv_offset + dim[None], mask=there, other=0.0), seen


@triton.jit
def _capped(score, CAP: tl.constexpr):
    """CAP * tanh(score / CAP); without a CAP, the score itself."""
    if CAP > 0:
        score = CAP - 2 * CAP / (tl.exp2(score * (2 * 1.4426950408889634 / CAP)) + 1)
    return score


@triton.jit
def _attend(query, k, v, seen, best, total, acc, scale, CAP: tl.constexpr, PRECISION: tl.constexpr):
    """One tile into the running maximum, sum and output; it has a key."""
    score = _capped(tl.dot(query, tl.trans(k.to(query.dtype)), input_precision=PRECISION) * scale, CAP)
    score = tl.where(seen[None], score, -float("inf"))
    now = tl.maximum(best, tl.max(score, 1))
    old = tl.exp2((best - now) * 1.4426950408889634)
    p = tl.exp2((score - now[:, None]) * 1.4426950408889634)
    acc = acc * old[:, None] + tl.dot(p.to(query.dtype), v.to(query.dtype), input_precision=PRECISION)
    return now, total * old + tl.sum(p, 1), acc


@triton.jit(do_not_specialize=["table_stride", "splits"])
def _decode(q, k_new, v_new, cache, tables, lens, slots, positions, table, q_norm, k_norm, eps, sinks, part_out,
            part_max, part_sum, out, splits, q_stride, k_stride, v_stride, table_stride, kv_offset, block_stride,
            head_stride, scale, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, SIZE: tl.constexpr,
            WINDOW: tl.constexpr, CAP: tl.constexpr, SINKS: tl.constexpr, JOINED: tl.constexpr, WRITE: tl.constexpr,
            ROTARY: tl.constexpr, NORM: tl.constexpr, EARLY: tl.constexpr, BLOCK_G: tl.constexpr,
            BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr):
    if not EARLY:
        wait_for_inputs(PDL)
    seq, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(lens + seq)
    first = tl.maximum(length - WINDOW, 0) if WINDOW > 0 else 0
    # Parts begin at whole tiles, so that all programs but one read full ones.
    each = tl.cdiv(tl.cdiv(length - first, splits), BLOCK_N) * BLOCK_N
    begin = first + split * each
    end = tl.minimum(begin + each, length - 1 if WRITE else length)  # the newest key is not in the cache yet
    group, dim = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    heads = kv_head * GROUP + group
    real = (group[:, None] < GROUP) & (dim[None] < DIM)
    base, mine = cache + kv_head * head_stride, tables + seq * table_stride
    if WRITE:
        slot = tl.load(slots + seq).to(tl.int64)
        if ROTARY:
            angles = table + tl.load(positions + seq).to(tl.int64) * DIM
            q_turn = _turn(angles, q_norm, dim[None], DIM // 2, NORM)
            k_turn = _turn(angles, k_norm, dim, DIM // 2, NORM)
    if EARLY:  # what earlier steps have cached is there already
        k, v, seen = _tile(base, mine, begin, end, kv_offset, block_stride, DIM, SIZE, BLOCK_N, BLOCK_D)
        wait_for_inputs(PDL)
    if ROTARY:
        query = _rotated(q + seq * q_stride + heads[:, None] * DIM, dim[None], real, q_turn, eps, DIM // 2, NORM)
    else:
        query = tl.load(q + seq * q_stride + heads[:, None] * DIM + dim[None], mask=real, other=0.0)
    if WRITE:  # the newest key: one program of each head writes it, and sees it as later steps will
        writes = (split == splits - 1) & (length > 0)
        here = (dim < DIM) & writes
        if ROTARY:
            k_last = _rotated(k_new + seq * k_stride + kv_head * DIM, dim, here, k_turn, eps, DIM // 2, NORM)
        else:
            k_last = tl.load(k_new + seq * k_stride + kv_head * DIM + dim, mask=here, other=0.0)
        k_last = _stored(k_last, cache)
        v_last = _stored(tl.load(v_new + seq * v_stride + kv_head * DIM + dim, mask=here, other=0.0), cache)
        into = base + slot // SIZE * block_stride + slot % SIZE * DIM + dim
        tl.store(into, k_last, mask=here)
        tl.store(into + kv_offset, v_last, mask=here)
    best = tl.full((BLOCK_G,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    some, start = begin < end, begin
    if SINKS:  # a head's sink is the score of a key without a value, which the first part has seen
        best = tl.where(split == 0, tl.load(sinks + heads, mask=group < GROUP, other=0.0).to(tl.float32), best)
        total = tl.where(split == 0, 1.0, total)
    if EARLY:
        if some:
            best, total, acc = _attend(query, k, v, seen, best, total, acc, scale, CAP, PRECISION)
        start += BLOCK_N
    for at in range(start, end, BLOCK_N):
        k, v, seen = _tile(base, mine, at, end, kv_offset, block_stride, DIM, SIZE, BLOCK_N, BLOCK_D)
        best, total, acc = _attend(query, k, v, seen, best, total, acc, scale, CAP, PRECISION)
    if WRITE:
        some = some | writes
        if writes:
            last = _capped(tl.sum(query.to(tl.float32) * k_last.to(tl.float32)[None], 1) * scale, CAP)
            now = tl.maximum(best, last)
            old = tl.exp2((best - now) * 1.4426950408889634)
            p_last = tl.exp2((last - now) * 1.4426950408889634)
            total = total * old + p_last
            acc = acc * old[:, None] + p_last[:, None] * v_last.to(tl.float32)[None]
            best = now
    if not JOINED:
        row = out + (seq * KV_HEADS * GROUP + heads[:, None]) * DIM + dim[None]
        tl.store(row, (acc / tl.where(total > 0, total, 1.0)[:, None]).to(out.dtype.element_ty), mask=real)
    else:
        part = (seq * KV_HEADS * GROUP + heads) * splits + split
        inside = group < GROUP
        tl.store(part_max + part, best, mask=inside)
        tl.store(part_sum + part, total, mask=inside)
        if SINKS:
            some = some | (split == 0)
        if some:
            tl.store(part_out + part[:, None] * BLOCK_D + dim[None], acc, mask=inside[:, None])


@triton.jit(do_not_specialize=["splits", "seqs"])
def _join(part_out, part_max, part_sum, out, starts, splits, seqs, HEADS: tl.constexpr, DIM: tl.constexpr,
          BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr):
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)  # of tokens times heads
    split, dim = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    there = split < splits
    if starts is not None:  # tokens behind the last sequence have no parts, and their output is zero
        there = there & (row < tl.load(starts + seqs) * HEADS)
    best = tl.load(part_max + row * splits + split, mask=there, other=-float("inf"))
    top = tl.max(best)
    used = best > -float("inf")
    weight = tl.where(used, tl.exp2((best - top) * 1.4426950408889634), 0.0)
    total = tl.sum(tl.load(part_sum + row * splits + split, mask=there, other=0.0) * weight)
    # A part without keys was not written: what lies there may be anything. To know it before reading takes longer.
    parts = tl.load(part_out + (row * splits + split[:, None]) * BLOCK_D + dim[None], mask=there[:, None], other=0.0)
    parts = tl.where(used[:, None], parts, 0.0)
    acc = tl.sum(parts * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + row * DIM + dim, acc.to(out.dtype.element_ty), mask=dim < DIM)


@triton.jit
def _attend_some(query, k, v, seen, best, total, acc, scale, CAP: tl.constexpr, PRECISION: tl.constexpr):
    """As _attend, for a tile of which a query may see no key; the maximum counts in binary logarithms."""
    score = tl.dot(query, tl.trans(k.to(query.dtype)), input_precision=PRECISION) * scale
    score = tl.where(seen, _capped(score, CAP) * 1.4426950408889634, -float("inf"))
    now = tl.maximum(best, tl.max(score, 1))
    safe = tl.where(now > -float("inf"), now, 0.0)
    old, p = tl.exp2(best - safe), tl.exp2(score - safe[:, None])
    acc = acc * old[:, None] + tl.dot(p.to(query.dtype), v.to(query.dtype), input_precision=PRECISION)
    return now, total * old + tl.sum(p, 1), acc


@triton.jit(do_not_specialize=["table_stride", "splits"])
def _extend(q, k_new, v_new, cache, tables, lens, starts, slots, positions, table, q_norm, k_norm, eps, sinks,
            part_out, part_max, part_sum, out, splits, q_stride, k_stride, v_stride, table_stride, kv_offset,
            block_stride, head_stride, scale, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
            SIZE: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, SINKS: tl.constexpr, JOINED: tl.constexpr,
            ROTARY: tl.constexpr, NORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr,
            BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr):
    seq, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    start, length = tl.load(starts + seq), tl.load(lens + seq)
    queries = tl.load(starts + seq + 1) - start
    first = tl.maximum(length - queries + 1 - WINDOW, 0) if WINDOW > 0 else 0
    each = tl.cdiv(tl.cdiv(length - first, splits), BLOCK_N) * BLOCK_N
    begin = first + split * each
    end = tl.minimum(begin + each, length - queries)  # the new keys are not in the cache yet
    dim = tl.arange(0, BLOCK_D)
    base, mine = cache + kv_head * head_stride, tables + seq * table_stride
    # What earlier steps have cached is there already.
    k, v, seen = _tile(base, mine, begin, end, kv_offset, block_stride, DIM, SIZE, BLOCK_N, BLOCK_D)
    wait_for_inputs(PDL)
    if queries > 0:
        m = tl.arange(0, BLOCK_M)
        nth, heads = m // GROUP, kv_head * GROUP + m % GROUP
        inside, token = nth < queries, (start + nth).to(tl.int64)
        real = inside[:, None] & (dim[None] < DIM)
        source = (q + token * q_stride + heads * DIM)[:, None]
        if ROTARY:
            angles = table + tl.load(positions + token, mask=inside, other=0).to(tl.int64) * DIM
            turn = _turn(angles[:, None], q_norm, dim[None], DIM // 2, NORM)
            query = _rotated(source, dim[None], real, turn, eps, DIM // 2, NORM)
        else:
            query = tl.load(source + dim[None], mask=real, other=0.0)
        lowest = length - queries + nth - WINDOW if WINDOW > 0 else nth - nth - 1  # keys behind it are seen
        best = tl.full((BLOCK_M,), -float("inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        if SINKS:  # as in _decode
            sink = tl.load(sinks + heads, mask=inside, other=0.0).to(tl.float32) * 1.4426950408889634
            best, total = tl.where(split == 0, sink, best), tl.where(split == 0, 1.0, total)
        at = tl.arange(0, BLOCK_N)
        if begin < end:
            there = seen[None] & ((begin + at)[None] > lowest[:, None])
            best, total, acc = _attend_some(query, k, v, there, best, total, acc, scale, CAP, PRECISION)
        for now in range(begin + BLOCK_N, end, BLOCK_N):
            k, v, seen = _tile(base, mine, now, end, kv_offset, block_stride, DIM, SIZE, BLOCK_N, BLOCK_D)
            there = seen[None] & ((now + at)[None] > lowest[:, None])
            best, total, acc = _attend_some(query, k, v, there, best, total, acc, scale, CAP, PRECISION)
        if split == splits - 1:  # the new keys: one program of each head writes them, and sees them as later steps will
            t = tl.arange(0, BLOCK_T)
            here, row = (t < queries)[:, None] & (dim[None] < DIM), (start + t).to(tl.int64)
            from_k = (k_new + row * k_stride + kv_head * DIM)[:, None]
            if ROTARY:
                turns = table + tl.load(positions + row, mask=t < queries, other=0).to(tl.int64) * DIM
                turn = _turn(turns[:, None], k_norm, dim[None], DIM // 2, NORM)
                k_last = _stored(_rotated(from_k, dim[None], here, turn, eps, DIM // 2, NORM), cache)
            else:
                k_last = _stored(tl.load(from_k + dim[None], mask=here, other=0.0), cache)
            from_v = (v_new + row * v_stride + kv_head * DIM)[:, None]
            v_last = _stored(tl.load(from_v + dim[None], mask=here, other=0.0), cache)
            slot = tl.load(slots + row, mask=t < queries, other=0).to(tl.int64)
            into = (base + slot // SIZE * block_stride + slot % SIZE * DIM)[:, None] + dim[None]
            tl.store(into, k_last, mask=here)
            tl.store(into + kv_offset, v_last, mask=here)
            visible = (t[None] <= nth[:, None]) & ((length - queries + t)[None] > lowest[:, None])
            best, total, acc = _attend_some(query, k_last, v_last, visible, best, total, acc, scale, CAP, PRECISION)
        rows = token * (KV_HEADS * GROUP) + heads
        if not JOINED:
            value = acc / tl.where(total > 0, total, 1.0)[:, None]
            tl.store(out + rows[:, None] * DIM + dim[None], value.to(out.dtype.element_ty), mask=real)
        else:
            part = rows * splits + split
            tl.store(part_max + part, best * 0.6931471805599453, mask=inside)  # _join counts in natural logarithms
            tl.store(part_sum + part, total, mask=inside)
            if (begin < end) | (split == splits - 1) | (SINKS & (split == 0)):
                tl.store(part_out + part[:, None] * BLOCK_D + dim[None], acc, mask=inside[:, None])


@triton.jit
def _tile_of(starts, nth, seqs, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr):
    """The sequence and the tile of its queries that is the nth of all; a tile behind every query if there are fewer.
    Leading sequences of one query have none."""
    s = tl.arange(0, BLOCK_S)
    there = s < seqs
    begin, end = tl.load(starts + s, mask=there, other=0), tl.load(starts + s + 1, mask=there, other=0)
    tiles = tl.where(there & (end != s + 1), (end - begin + BLOCK_M - 1) // BLOCK_M, 0)
    before = tl.cumsum(tiles, 0) <= nth
    seq = tl.minimum(tl.sum(before.to(tl.int32), 0), seqs - 1)
    return seq, nth - tl.sum(tl.where(before & (s < seq), tiles, 0), 0)


@triton.jit
def _attend_keys(query, base, table, kv_offset, block_stride, begin, end, last, place, best, total, acc, factor,
                 DIM: tl.constexpr, SIZE: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, MASKED: tl.constexpr,
                 BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """The keys from `begin`, a whole tile, to `end`, of which those before `last` exist, into the running maximum, sum
    and output. Unless MASKED, all exist and every query sees all of them."""
    dim, at = tl.arange(0, BLOCK_D)[None], tl.arange(0, BLOCK_N)
    for n in range(begin, end, BLOCK_N):
        key = n + at
        there = key < last if MASKED else key >= 0
        real = there[:, None] & (dim < DIM)
        block = tl.load(table + key // SIZE, mask=there, other=0) if MASKED else tl.load(table + key // SIZE)
        source = base + (block.to(tl.int64) * block_stride + key % SIZE * DIM)[:, None] + dim
        k = tl.load(source, mask=real, other=0.0) if MASKED or DIM < BLOCK_D else tl.load(source)
        score = tl.dot(query, tl.trans(k.to(query.dtype)), input_precision=PRECISION)
        if CAP > 0:
            score = _capped(score * factor, CAP)
        if MASKED:
            seen = key[None] <= place[:, None]
            if WINDOW > 0:
                seen = seen & (key[None] > place[:, None] - WINDOW)
            score = tl.where(seen, score, -float("inf"))
        scale = factor if CAP <= 0 else 1.4426950408889634
        now = tl.maximum(best, tl.max(score, 1) * scale)
        safe = tl.where(now > -float("inf"), now, 0.0) if MASKED else now  # -inf: no key was seen up to now
        old = tl.exp2(best - safe)
        p = tl.exp2(score * scale - safe[:, None])
        total = total * old + tl.sum(p, 1)
        if MASKED or DIM < BLOCK_D:
            v = tl.load(source + kv_offset, mask=real, other=0.0)
        else:
            v = tl.load(source + kv_offset)
        v = v.to(query.dtype)
        acc = acc * old[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        best = now
    return best, total, acc


@triton.jit(do_not_specialize=["first_seq", "seqs", "table_stride"])
def _prefill(q, cache, tables, lens, starts, sinks, out, first_seq, seqs, q_stride, table_stride, kv_offset,
             block_stride, head_stride, scale, HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
             SIZE: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, SINKS: tl.constexpr, BLOCK_M: tl.constexpr,
             BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr,
             PDL: tl.constexpr):
    wait_for_inputs(PDL)
    # The last tiles see the longest context: they go first.
    seq, head, tile = tl.program_id(2) + first_seq, tl.program_id(1), tl.num_programs(0) - 1 - tl.program_id(0)
    if BLOCK_S:
        seq, tile = _tile_of(starts, tile, seqs, BLOCK_M, BLOCK_S)
    start = tl.load(starts + seq)
    queries = tl.load(starts + seq + 1) - start
    if tile * BLOCK_M < queries:
        length = tl.load(lens + seq)
        m, dim = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
        inside = (m < queries)[:, None] & (dim[None] < DIM)
        rows = (start + m).to(tl.int64)[:, None]
        query = tl.load(q + rows * q_stride + head * DIM + dim[None], mask=inside, other=0.0)
        place = length - queries + m  # of each query in its sequence
        best = tl.full((BLOCK_M,), -float("inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        if SINKS:
            best = tl.zeros((BLOCK_M,), tl.float32) + tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
            total += 1.0
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        base = cache + head // GROUP * head_stride
        lowest = length - queries + tile * BLOCK_M
        end = tl.minimum(lowest + BLOCK_M, length)
        begin = tl.maximum(lowest - WINDOW + 1, 0) // BLOCK_N * BLOCK_N if WINDOW > 0 else 0
        factor = scale if CAP > 0 else scale * 1.4426950408889634
        table = tables + seq.to(tl.int64) * table_stride
        inner = begin  # from here, and up to `seen`, every query sees every key
        if WINDOW > 0:
            inner = tl.minimum(tl.maximum(tl.cdiv(lowest + BLOCK_M - WINDOW, BLOCK_N) * BLOCK_N, begin), end)
            best, total, acc = _attend_keys(
                query, base, table, kv_offset, block_stride, begin, inner, end, place, best, total, acc, factor, DIM,
                SIZE, WINDOW, CAP, True, BLOCK_N, BLOCK_D, PRECISION)
        seen = tl.maximum((lowest + 1) // BLOCK_N * BLOCK_N, inner)
        best, total, acc = _attend_keys(
            query, base, table, kv_offset, block_stride, inner, seen, end, place, best, total, acc, factor, DIM, SIZE,
            WINDOW, CAP, False, BLOCK_N, BLOCK_D, PRECISION)
        best, total, acc = _attend_keys(
            query, base, table, kv_offset, block_stride, seen, end, end, place, best, total, acc, factor, DIM, SIZE,
            WINDOW, CAP, True, BLOCK_N, BLOCK_D, PRECISION)
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out + (rows * HEADS + head) * DIM + dim[None], acc.to(out.dtype.element_ty), mask=inside)


MAX_SPLITS = 64


class Division(NamedTuple):
    """How decoding sequences are divided among programs.

    Attributes:
        splits: programs that share a sequence's context. keys: of a tile, as far as registers allow, and at least 64
            where nothing is read early.
        early: each program reads its first tile before the launches before it have ended, if their newest keys are
            written on the way.
    """

    splits: int = 1
    keys: int = 64
    early: bool = False


class New(NamedTuple):
    """A step's own keys and values, [n, kv_heads, head_dim], tokens may have gaps, and their slots [n] in the cache.

    `rotary`: positions [n] int32 and a table [max_position, head_dim] fp32 of cosines and sines, where q and k are not
    rotated yet. `norms`: of the heads of q and k, where those are not normed yet, which comes before.
    """

    k: torch.Tensor
    v: torch.Tensor
    slots: torch.Tensor
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    norms: HeadNorms | None = None

    def turning(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float]:
        """Arguments of the kernels; anything where they do not count."""
        return *(self.rotary or (self.slots, self.slots)), *(self.norms or (self.slots, self.slots, 0.0))


def write_kv(q: torch.Tensor, new: New, cache: torch.Tensor) -> torch.Tensor:
    """Keys, normed and rotated as `new` says, and values into a layer's cache; returns q [n, heads, head_dim], normed
    and rotated."""
    (n, heads, dim), kv_heads = q.shape, new.k.shape[1]
    turned = q if new.rotary is None else torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _write_kv[(n,)](q, new.k, new.v, cache, new.slots, *new.turning(), turned, q.stride(0), new.k.stride(0),
                    new.v.stride(0), cache.stride(0), cache.stride(1), cache.stride(2), cache.shape[3], HEADS=heads,
                    KV_HEADS=kv_heads, DIM=dim, ROTARY=new.rotary is not None, NORM=new.norms is not None,
                    BLOCK_Q=triton.next_power_of_2(heads), BLOCK_H=triton.next_power_of_2(kv_heads),
                    BLOCK_D=triton.next_power_of_2(dim), num_warps=4, **launch_options(q))
    return turned


def decode(q: torch.Tensor, cache: torch.Tensor, tables: torch.Tensor, lens: torch.Tensor, out: torch.Tensor, *,
           scale: float, window: int | None, how: Division, new: New | None = None, softcap: float | None = None,
           sinks: torch.Tensor | None = None) -> None:
    """One query a sequence. scale, window, softcap, sinks: as in AttentionSpec.

    Args:
        q: [n, heads, head_dim], tokens may have gaps. tables: [n, blocks] int32. lens: [n] int32; 0 gives zeros.
        out: [n, heads, head_dim], contiguous. how: how the sequences are divided among programs.
        new: each sequence's newest key and value, which are written, and q normed and rotated, on the way; None: all
            are there. Everything but q and the new k and v may be read while the launches before it still run, so
            whoever writes lengths, tables, slots, positions or earlier keys does it before a launch that is not
            programmatic: a copy, or any kernel of PyTorch's.
    """
    n, heads, dim = q.shape
    kv_heads, size = cache.shape[2], cache.shape[3]
    group, block_d, splits = heads // kv_heads, max(triton.next_power_of_2(dim), 16), how.splits
    parts = n * heads * splits if splits > 1 else 1
    part_out = torch.empty(parts, block_d if splits > 1 else 1, dtype=torch.float32, device=q.device)
    part_max, part_sum = torch.empty(2, parts, dtype=torch.float32, device=q.device)
    wide = q.dtype == torch.float32
    early = how.early and new is not None
    block_n = 32 if wide or block_d > 128 else how.keys if early else max(how.keys, 64)
    given = new or New(q, q, lens)
    k, v, slots, rotary, norms = given
    _decode[(n, kv_heads, splits)](
        q, k, v, cache, tables, lens, slots, *given.turning(), lens if sinks is None else sinks, part_out, part_max,
        part_sum, out, splits, q.stride(0), k.stride(0), v.stride(0), tables.stride(0), cache.stride(0),
        cache.stride(1), cache.stride(2), scale, KV_HEADS=kv_heads, GROUP=group, DIM=dim, SIZE=size,
        WINDOW=window or 0, CAP=softcap or 0.0, SINKS=sinks is not None, JOINED=splits > 1, WRITE=new is not None,
        ROTARY=rotary is not None, NORM=norms is not None, EARLY=early,
        BLOCK_G=max(triton.next_power_of_2(group), 16), BLOCK_D=block_d, BLOCK_N=block_n,
        PRECISION="ieee" if wide else "tf32", num_warps=2 if block_n * block_d <= 2048 else 4,
        num_stages=4 if block_n == 64 and not early else 2, **launch_options(q))
    if splits > 1:
        _join[(n * heads,)](part_out, part_max, part_sum, out, None, splits, 0, HEADS=heads, DIM=dim,
                            BLOCK_S=8 if splits <= 8 else MAX_SPLITS, BLOCK_D=block_d, num_warps=4, **launch_options(q))


def most_queries(group: int, dim: int, dtype: torch.dtype) -> int:
    """The most queries of a sequence that `extend` takes, with `group` query heads for a kv head: what a program holds
    in registers and shared memory."""
    return min((32 << 10) // (max(triton.next_power_of_2(dim), 16) * dtype.itemsize), 128) // group


def extend(q: torch.Tensor, new: New, cache: torch.Tensor, tables: torch.Tensor, lens: torch.Tensor,
           starts: torch.Tensor, out: torch.Tensor, *, queries: int, splits: int, scale: float, window: int | None,
           softcap: float | None = None, sinks: torch.Tensor | None = None) -> None:
    """A few queries a sequence, causal, such as drafts to verify. The context is split as `decode` splits it, and is
    read once for all queries and heads of a group. scale, window, softcap, sinks: as in AttentionSpec.

    Args:
        q: [n, heads, head_dim], tokens may have gaps. starts: [seqs + 1] int32. tables, lens: of all sequences.
        new: as in `decode`, of all tokens; those of padding are not written.
        queries: the most of a sequence, see `most_queries`. splits: programs that share a sequence's context.
        out: [n, heads, head_dim], contiguous. Rows behind the last token become zero if splits is above 1; otherwise
            they are left alone.
    """
    n, heads, dim = q.shape
    kv_heads, size, seqs = cache.shape[2], cache.shape[3], lens.shape[0]
    group, block_d = heads // kv_heads, max(triton.next_power_of_2(dim), 16)
    parts = n * heads * splits if splits > 1 else 1
    part_out = torch.empty(parts, block_d if splits > 1 else 1, dtype=torch.float32, device=q.device)
    part_max, part_sum = torch.empty(2, parts, dtype=torch.float32, device=q.device)
    wide, block_m = q.dtype == torch.float32, max(triton.next_power_of_2(queries * group), 16)
    block_n, stages = (32, 2) if wide or block_d > 128 else (64, 3)
    _extend[(seqs, kv_heads, splits)](
        q, new.k, new.v, cache, tables, lens, starts, new.slots, *new.turning(), lens if sinks is None else sinks,
        part_out, part_max, part_sum, out, splits, q.stride(0), new.k.stride(0), new.v.stride(0), tables.stride(0),
        cache.stride(0), cache.stride(1), cache.stride(2), scale, KV_HEADS=kv_heads, GROUP=group, DIM=dim, SIZE=size,
        WINDOW=window or 0, CAP=softcap or 0.0, SINKS=sinks is not None, JOINED=splits > 1,
        ROTARY=new.rotary is not None, NORM=new.norms is not None, BLOCK_M=block_m,
        BLOCK_T=max(triton.next_power_of_2(queries), 16), BLOCK_D=block_d, BLOCK_N=block_n,
        PRECISION="ieee" if wide else "tf32", num_warps=8 if block_m > 64 else 4, num_stages=stages,
        **launch_options(q))
    if splits > 1:
        _join[(n * heads,)](part_out, part_max, part_sum, out, starts, splits, seqs, HEADS=heads, DIM=dim,
                            BLOCK_S=8 if splits <= 8 else MAX_SPLITS, BLOCK_D=block_d, num_warps=4, **launch_options(q))


def prefill(q: torch.Tensor, cache: torch.Tensor, tables: torch.Tensor, lens: torch.Tensor, starts: torch.Tensor,
            out: torch.Tensor, *, first_seq: int, max_queries: int, scale: float, window: int | None,
            softcap: float | None = None, sinks: torch.Tensor | None = None) -> None:
    """Several queries a sequence, causal; their own keys are in the cache by now. scale, window, softcap, sinks: as in
    AttentionSpec.

    Args:
        q: [n, heads, head_dim] of the whole step, tokens may have gaps. starts: [seqs + 1] int32.
        first_seq: sequences before it are left alone; -1: leading sequences of one query are, however many there are.
        max_queries: of one sequence; not needed where first_seq is -1.
        out: [n, heads, head_dim], contiguous.
    """
    (n, heads, dim), seqs, searched = q.shape, lens.shape[0], first_seq < 0
    kv_heads, size = cache.shape[2], cache.shape[3]
    wide, block_d = q.dtype == torch.float32, max(triton.next_power_of_2(dim), 16)
    block_m, block_n, stages = (32, 32, 2) if wide or block_d > 128 else (64, 64, 3)
    if block_m == 64 and (searched or max_queries > 64):
        # With an H100's memory a tile has twice the keys: prompts of 512 to 8,192 take 0.85 to 0.92 of the time.
        block_m, block_n, stages = (128, 128, 2) if program_memory(q.device) > 200 << 10 else (128, 64, 3)
    tiles = n // block_m + min(seqs, n) if searched else triton.cdiv(max_queries, block_m)
    grid = (tiles, heads, 1 if searched else seqs - first_seq)
    _prefill[grid](
        q, cache, tables, lens, starts, lens if sinks is None else sinks, out, max(first_seq, 0), seqs, q.stride(0),
        tables.stride(0), cache.stride(0), cache.stride(1), cache.stride(2), scale, HEADS=heads,
        GROUP=heads // kv_heads, DIM=dim, SIZE=size, WINDOW=window or 0, CAP=softcap or 0.0, SINKS=sinks is not None,
        BLOCK_M=block_m, BLOCK_D=block_d, BLOCK_N=block_n, BLOCK_S=triton.next_power_of_2(seqs) if searched else 0,
        PRECISION="ieee" if wide else "tf32", num_warps=8 if block_m == 128 else 4,
        num_stages=stages, **launch_options(q))
