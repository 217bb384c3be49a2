"""Sampling without the host. One program for each row finds the thresholds. Then all tokens are compared in pieces, and
the one with the highest noisy score wins.

Filters are thresholds, as in hal.sampling.sampler. They are found by bisection over the values' bits, so nothing is
sorted. The noise is that of hal.sampling.noise: its bits are the same, and its logarithms may differ in rounding.

Scores are divided by the temperature relative to the row's largest where hal.sampling.sampler.reference says so. The
programs of an unfiltered race do not know the row's largest: each subtracts the largest of its own piece, and the
program that joins the pieces adds the distance. A row without a finite maximum gives the token -1: an element that is
NaN or infinity enters the race as infinity, and wins it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hal.sampling.sampler import LARGE
from runners.cuda.kernels.launch import COMPILED, launch_options, wait_for_inputs

_PIECE, _PROGRAMS = 512, 4096  # elements that a warp reads at a time; the number of warps that fill a device
_LANES = 4096  # lanes of the program that finds a row's thresholds, and the values that it can keep
_LARGE = tl.constexpr(LARGE)
_SHIFT = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}  # low bits that are 0 in fp32


@triton.jit
def _divided(x, y):
    """x / y in fp32, rounded to nearest. tl.div_rn takes subnormal numbers for 0 on a GPU, and a temperature or a
    quotient may be one."""
    if COMPILED:
        quotient = tl.inline_asm_elementwise("div.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True,
                                             pack=1)
    else:
        quotient = tl.div_rn(x, y)
    return quotient


@triton.jit
def _mix64(x):
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def _log_exponential(key, ids):
    """The logarithm of the tokens' noise."""
    x = ids ^ key.to(tl.int32)
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x += (key >> 32).to(tl.int32)
    x *= -0x7B935975
    x ^= (x >> 16) & 0xFFFF
    v = tl.minimum(((x & 0x7FFFFFFF).to(tl.float32) + 0.5) * 4.656612873077393e-10, 0.9999999403953552)
    # log1p(-v): the quotient corrects the rounding of 1 - v (Kahan).
    rest = 1.0 - v
    return tl.log(tl.where(rest == 1.0, v, tl.log(rest) * (v / (rest - 1.0))))


@triton.jit
def _ordered(x, SHIFT: tl.constexpr):
    """fp32 -> int32 in the same order. Values of a dtype whose low SHIFT bits are 0 become consecutive integers."""
    bits = x.to(tl.int32, bitcast=True) >> SHIFT
    return bits ^ ((bits >> 31) & (0x7FFFFFFF >> SHIFT))


@triton.jit
def _value(key, SHIFT: tl.constexpr):
    return ((key ^ ((key >> 31) & (0x7FFFFFFF >> SHIFT))) << SHIFT).to(tl.float32, bitcast=True)


@triton.jit
def _scan(source, at, vocab, blocks, warmth, base, least, key, DRAW: tl.constexpr, BLOCK: tl.constexpr):
    """The best of a piece in each lane, its place, and the largest score of the piece."""
    best, best_id = tl.full([BLOCK], float("-inf"), tl.float32), at
    most = best
    for _ in range(blocks):
        x = tl.load(source + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        x = tl.where(x < float("inf"), x, float("inf"))
        if DRAW and warmth > 0:
            most = tl.maximum(most, x)
            x = _divided(x - base, warmth)
            x = tl.where(x >= least, x, float("-inf"))
            if tl.max(x) > float("-inf"):  # after a filter most blocks are empty
                x -= _log_exponential(key, at)
        better = x > best
        best, best_id = tl.where(better, x, best), tl.where(better, at, best_id)
        at += BLOCK
    return best, best_id, tl.max(most)


@triton.jit(do_not_specialize=["blocks", "pieces"])
def _race(scores, temperature, lowest, shift, seeds, positions, indices, winners, bases, stride, vocab, blocks, pieces,
          DRAW: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_for_inputs(PDL)
    row, piece = tl.program_id(0), tl.program_id(1)
    at = piece * (blocks * BLOCK) + tl.arange(0, BLOCK)
    source = scores + row.to(tl.int64) * stride
    warmth, base, least, key = 0.0, 0.0, float("-inf"), tl.full([], 0, tl.int64)
    if DRAW:
        warmth = tl.load(temperature + row)
        if lowest is not None:
            least, base = tl.load(lowest + row), tl.load(shift + row)
        position = tl.load(positions + tl.load(indices + row)).to(tl.int64) + 1
        key = _mix64(_mix64(tl.load(seeds + row) + -0x61C8864680B583EB) + position * -0x61C8864680B583EB)
    best, best_id, most = _scan(source, at, vocab, blocks, warmth, base, least, key, DRAW, BLOCK)
    if DRAW:
        if lowest is None:
            far = tl.abs(_divided(most, warmth)) > _LARGE
            if far & (warmth > 0) & (tl.abs(most) < float("inf")):
                base = most
                best, best_id, most = _scan(source, at, vocab, blocks, warmth, base, least, key, DRAW, BLOCK)
        tl.store(bases + row * pieces + piece, base)
    # In one number, the largest of which is the first of the best. (+ 0.0: the two zeros are equal.)
    winner = tl.max((_ordered(best + 0.0, 0).to(tl.int64) << 32) + (0x7FFFFFFF - best_id))
    tl.store(winners + row * pieces + piece, winner)


@triton.jit(do_not_specialize=["pieces", "padding"])
def _join(winners, bases, temperature, out, rows, last, pieces, padding, DRAW: tl.constexpr, KEEP: tl.constexpr,
          BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_for_inputs(PDL)
    row, piece = tl.program_id(0), tl.arange(0, BLOCK)
    there = piece < pieces
    winner = tl.load(winners + row * pieces + piece, mask=there, other=-0x7FFFFFFFFFFFFFFF)
    if DRAW:
        warmth = tl.load(temperature + row)
        if warmth > 0:
            base = tl.load(bases + row * pieces + piece, mask=there, other=float("-inf"))
            x = _value((winner >> 32).to(tl.int32), 0)
            x = tl.where(there & (tl.abs(x) < float("inf")), x + _divided(base - tl.max(base), warmth), x)
            # What is behind the last piece decodes to NaN, which a GPU gives another sign when it computes with it.
            winner = tl.where(there, (_ordered(x + 0.0, 0).to(tl.int64) << 32) + (winner & 0x7FFFFFFF), winner)
    winner = tl.max(winner)
    best = _value((winner >> 32).to(tl.int32), 0)
    token = tl.where(tl.abs(best) < float("inf"), 0x7FFFFFFF - (winner & 0x7FFFFFFF).to(tl.int32), -1)
    tl.store(out + row, token)
    if KEEP:
        into = tl.load(rows + row)
        tl.store(last + tl.where(into < 0, padding, into), tl.maximum(token, 0))


@triton.jit
def _mass_above(source, count, pivot, best, rate, BLOCK: tl.constexpr):
    """The sum of exp2((x - best) * rate) over x > pivot. If rate is 0, this is their number."""
    at, total = tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        x = tl.load(source + start + at, mask=start + at < count, other=float("-inf")).to(tl.float32)
        total += tl.where(x > pivot, tl.exp2((x - best) * rate), 0.0)
    return tl.sum(total)


@triton.jit
def _search(source, count, low, high, best, rate, limit, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key in [low, high) such that the sum above it is at least `limit`. `low` must be such a key."""
    while low + 1 < high:
        middle = (low & high) + ((low ^ high) >> 1)
        if _mass_above(source, count, _value(middle, SHIFT), best, rate, BLOCK) < limit:
            high = middle
        else:
            low = middle
    return low


@triton.jit
def _dropped(source, count, low, high, far, best, k, p, total, rate, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key that top-k drops, then the one that top-p drops. Top-p is a share of the sum that top-k leaves,
    or of `total` without top-k."""
    if k > 0:
        low = _search(source, count, low, high, best, 0.0, k.to(tl.float32), SHIFT, BLOCK)
    if p < 1:
        if k > 0:
            total = _mass_above(source, count, _value(low, SHIFT), best, rate, BLOCK)
        low = _search(source, count, tl.maximum(low, far), high, best, rate, p * total, SHIFT, BLOCK)
    return low


@triton.jit(do_not_specialize=["filters"])
def _thresholds(scores, temperature, top_k, top_p, min_p, kept, lowest, shift, stride, vocab, filters,
                SHIFT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_for_inputs(PDL)
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    warmth, least, base = tl.load(temperature + row), float("-inf"), 0.0
    k = tl.load(top_k + row, mask=(filters & 1) != 0, other=0)
    p = tl.load(top_p + row, mask=(filters & 2) != 0, other=1.0)
    floor = tl.load(min_p + row, mask=(filters & 4) != 0, other=0.0)
    if warmth > 0:
        source, some = scores + row * stride, kept + row * BLOCK
        most = tl.full([BLOCK], float("-inf"), tl.float32)
        for start in range(0, vocab, BLOCK):
            x = tl.load(source + start + at, mask=start + at < vocab, other=float("-inf"))
            most = tl.maximum(most, x.to(tl.float32))
        best = tl.max(most)
        if tl.abs(_divided(best, warmth)) > _LARGE:
            base = tl.where(tl.abs(best) < float("inf"), best, 0.0)
        if ((k > 0) | (p < 1)) & (tl.abs(best) < float("inf")):
            rate, total = tl.minimum(1.4426950408889634 / warmth, 3.4e38), 0.0  # finite, so that the best weighs 1
            low, high = _ordered(tl.full([], float("-inf"), tl.float32), SHIFT), _ordered(best, SHIFT)
            # All values so far below the best have together a weight of less than 1 - top_p.
            far = best - (tl.log(vocab.to(tl.float32)) - tl.log(tl.maximum(1.0 - p, 1e-8)) + 1.0) * warmth
            far = tl.maximum(_ordered(far, SHIFT) - 1, low)
            if k <= 0:
                total = _mass_above(source, vocab, float("-inf"), best, rate, BLOCK)
            # What is dropped of each lane's largest is dropped of all. If no more values than lanes are left, the
            # search goes on among those.
            tl.store(some + at, most.to(scores.dtype.element_ty))
            tl.debug_barrier()
            low = _dropped(some, BLOCK, low, high, far, best, k, tl.where(k > 0, 1.0, p), total, rate, SHIFT, BLOCK)
            tl.debug_barrier()
            count = 0
            for start in range(0, vocab, BLOCK):
                x = tl.load(source + start + at, mask=start + at < vocab, other=float("-inf"))
                here = (x.to(tl.float32) > _value(low, SHIFT)).to(tl.int32)
                place = count + tl.cumsum(here) - 1
                tl.store(some + place, x, mask=(here > 0) & (place < BLOCK))
                count += tl.sum(here)
            tl.debug_barrier()
            if count <= BLOCK:
                low = _dropped(some, count, low, high, far, best, k, p, total, rate, SHIFT, BLOCK)
            else:
                low = _dropped(source, vocab, low, high, far, best, k, p, total, rate, SHIFT, BLOCK)
            least = _divided(_value(low + 1, SHIFT) - base, warmth)
        if floor > 0:
            least = tl.maximum(least, _divided(best - base, warmth) + tl.log(floor))
    tl.store(lowest + row, least)
    tl.store(shift + row, base)


def thresholds(scores: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
               min_p: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The least of (scores [n, vocab] - reference) / temperature that passes all filters, and the reference, fp32 [n]
    each; see hal.sampling.sampler."""
    n, vocab = scores.shape
    lowest, shift = torch.empty(2, n, dtype=torch.float32, device=scores.device)
    kept = torch.empty(n, _LANES, dtype=scores.dtype, device=scores.device)
    filters = sum(1 << i for i, given in enumerate((top_k, top_p, min_p)) if given is not None)
    given = [temperature if x is None else x for x in (top_k, top_p, min_p)]
    _thresholds[(n,)](scores, temperature, *given, kept, lowest, shift, scores.stride(0), vocab, filters,
                      SHIFT=_SHIFT[scores.dtype], BLOCK=_LANES, num_warps=16, **launch_options(scores))
    return lowest, shift


def greedy(logits: torch.Tensor, rows: torch.Tensor | None = None, last: torch.Tensor | None = None,
           draw: tuple[torch.Tensor | None, ...] = (None,) * 6) -> torch.Tensor:
    """logits [n, vocab], rows may have gaps between them -> int32 [n], the first of the largest; -1 where no logit is a
    finite maximum.

    Args:
        rows: int32 [n]: token i is also written to last[rows[i]], and where that is -1 to the last entry.
        last: int32, see hal.paged.pending.PendingTokens.
        draw: PagedModelInput's temperature, the two of `thresholds` or None, PagedModelInput's seed, positions,
            logits_indices: tokens are drawn where the temperature is not 0.
    """
    n, vocab = logits.shape
    blocks = triton.cdiv(triton.cdiv(vocab, _PIECE), max(_PROGRAMS // max(n, 1), 1))
    pieces = triton.cdiv(vocab, blocks * _PIECE)
    winners = torch.empty(n, pieces, dtype=torch.int64, device=logits.device)
    out, drawn = torch.empty(n, dtype=torch.int32, device=logits.device), draw[0] is not None
    bases = torch.empty(n, pieces, dtype=torch.float32, device=logits.device) if drawn else None
    _race[(n, pieces)](logits, *draw, winners, bases, logits.stride(0), vocab, blocks, pieces, DRAW=drawn,
                       BLOCK=_PIECE, num_warps=1, **launch_options(logits))
    _join[(n,)](winners, bases, draw[0], out, rows, last, pieces, 0 if last is None else len(last) - 1, DRAW=drawn,
                KEEP=last is not None, BLOCK=triton.next_power_of_2(triton.cdiv(vocab, _PIECE)), num_warps=1,
                **launch_options(logits))
    return out
