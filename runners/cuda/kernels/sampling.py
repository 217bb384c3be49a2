"""From logits to tokens without the host: thresholds by one program a row, then a race of all tokens in pieces.

Filters are thresholds, as in hal.sampling.sampler, found by bisection over the values' bits, so nothing is sorted. The
noise is that of hal.sampling.noise, bit for bit up to its logarithms.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from runners.cuda.kernels.launch import launch_options, wait_for_inputs

_PIECE, _PROGRAMS = 512, 4096  # elements read at a time by a warp; how many are there to fill a device
_LANES = 4096  # of the program that finds a row's thresholds, and the values that it can keep apart
_SHIFT = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}  # low bits that are 0 in fp32


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
    # log1p(-v): what rounding 1 - v lost is made up for by the quotient (Kahan).
    rest = 1.0 - v
    return tl.log(tl.where(rest == 1.0, v, tl.log(rest) * (v / (rest - 1.0))))


@triton.jit
def _ordered(x, SHIFT: tl.constexpr):
    """fp32 -> int32 in the same order, neighbours in a dtype whose low SHIFT bits are 0."""
    bits = x.to(tl.int32, bitcast=True) >> SHIFT
    return bits ^ ((bits >> 31) & (0x7FFFFFFF >> SHIFT))


@triton.jit
def _value(key, SHIFT: tl.constexpr):
    return ((key ^ ((key >> 31) & (0x7FFFFFFF >> SHIFT))) << SHIFT).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["blocks", "pieces"])
def _race(scores, temperature, lowest, seeds, positions, indices, winners, stride, vocab, blocks, pieces,
          DRAW: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_for_inputs(PDL)
    row, piece = tl.program_id(0), tl.program_id(1)
    at = piece * (blocks * BLOCK) + tl.arange(0, BLOCK)
    best, best_id = tl.full([BLOCK], float("-inf"), tl.float32), at
    if DRAW:
        warmth, least = tl.load(temperature + row), float("-inf")
        if lowest is not None:
            least = tl.load(lowest + row)
        position = tl.load(positions + tl.load(indices + row)).to(tl.int64) + 1
        key = _mix64(_mix64(tl.load(seeds + row) + -0x61C8864680B583EB) + position * -0x61C8864680B583EB)
    for _ in range(blocks):
        x = tl.load(scores + row.to(tl.int64) * stride + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        if DRAW and warmth > 0:
            x = tl.div_rn(x, warmth)
            x = tl.where(x >= least, x, float("-inf"))
            if tl.max(x) > float("-inf"):  # behind a filter most blocks are empty
                x -= _log_exponential(key, at)
        better = x > best  # never where x is not a number
        best, best_id = tl.where(better, x, best), tl.where(better, at, best_id)
        at += BLOCK
    # In one number, the largest of which is the first of the best. (+ 0.0: the two zeros are equal.)
    winner = tl.max((_ordered(best + 0.0, 0).to(tl.int64) << 32) + (0x7FFFFFFF - best_id))
    tl.store(winners + row * pieces + piece, winner)


@triton.jit(do_not_specialize=["pieces", "padding"])
def _join(winners, out, rows, last, pieces, padding, KEEP: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_for_inputs(PDL)
    row, piece = tl.program_id(0), tl.arange(0, BLOCK)
    winner = tl.load(winners + row * pieces + piece, mask=piece < pieces, other=-0x7FFFFFFFFFFFFFFF)
    token = 0x7FFFFFFF - (tl.max(winner) & 0x7FFFFFFF).to(tl.int32)
    tl.store(out + row, token)
    if KEEP:
        into = tl.load(rows + row)
        tl.store(last + tl.where(into < 0, padding, into), token)


@triton.jit
def _mass_above(source, count, pivot, best, rate, BLOCK: tl.constexpr):
    """The sum of exp2((x - best) * rate) over x > pivot: their number, where rate is 0."""
    at, total = tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        x = tl.load(source + start + at, mask=start + at < count, other=float("-inf")).to(tl.float32)
        total += tl.where(x > pivot, tl.exp2((x - best) * rate), 0.0)
    return tl.sum(total)


@triton.jit
def _search(source, count, low, high, best, rate, limit, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key in [low, high) above which there is not less than `limit`, given that it is so for `low`."""
    while low + 1 < high:
        middle = (low & high) + ((low ^ high) >> 1)
        if _mass_above(source, count, _value(middle, SHIFT), best, rate, BLOCK) < limit:
            high = middle
        else:
            low = middle
    return low


@triton.jit
def _dropped(source, count, low, high, far, best, k, p, total, rate, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key that top-k drops, then top-p: a share of what top-k left, else of `total`."""
    if k > 0:
        low = _search(source, count, low, high, best, 0.0, k.to(tl.float32), SHIFT, BLOCK)
    if p < 1:
        if k > 0:
            total = _mass_above(source, count, _value(low, SHIFT), best, rate, BLOCK)
        low = _search(source, count, tl.maximum(low, far), high, best, rate, p * total, SHIFT, BLOCK)
    return low


@triton.jit(do_not_specialize=["filters"])
def _thresholds(scores, temperature, top_k, top_p, min_p, kept, lowest, stride, vocab, filters, SHIFT: tl.constexpr,
                BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_for_inputs(PDL)
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    warmth, least = tl.load(temperature + row), float("-inf")
    k = tl.load(top_k + row, mask=(filters & 1) != 0, other=0)
    p = tl.load(top_p + row, mask=(filters & 2) != 0, other=1.0)
    floor = tl.load(min_p + row, mask=(filters & 4) != 0, other=0.0)
    if (warmth > 0) & ((k > 0) | (p < 1) | (floor > 0)):
        source, some = scores + row * stride, kept + row * BLOCK
        most = tl.full([BLOCK], float("-inf"), tl.float32)
        for start in range(0, vocab, BLOCK):
            x = tl.load(source + start + at, mask=start + at < vocab, other=float("-inf"))
            most = tl.maximum(most, x.to(tl.float32))
        best = tl.max(most)
        if ((k > 0) | (p < 1)) & (best > float("-inf")):
            rate, total = 1.4426950408889634 / warmth, 0.0
            low, high = _ordered(tl.full([], float("-inf"), tl.float32), SHIFT), _ordered(best, SHIFT)
            # All that is so far below the best weighs less than 1 - top_p together.
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
            least = tl.div_rn(_value(low + 1, SHIFT), warmth)
        least = tl.maximum(least, tl.div_rn(best, warmth) + tl.log(floor))
    tl.store(lowest + row, least)


def thresholds(scores: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
               min_p: torch.Tensor | None) -> torch.Tensor:
    """The least of scores [n, vocab] / temperature that passes all filters, fp32 [n]; see hal.sampling.sampler."""
    n, vocab = scores.shape
    lowest = torch.empty(n, dtype=torch.float32, device=scores.device)
    kept = torch.empty(n, _LANES, dtype=scores.dtype, device=scores.device)
    filters = sum(1 << i for i, given in enumerate((top_k, top_p, min_p)) if given is not None)
    given = [temperature if x is None else x for x in (top_k, top_p, min_p)]
    _thresholds[(n,)](scores, temperature, *given, kept, lowest, scores.stride(0), vocab, filters,
                      SHIFT=_SHIFT[scores.dtype], BLOCK=_LANES, num_warps=16, **launch_options(scores))
    return lowest


def greedy(logits: torch.Tensor, rows: torch.Tensor | None = None, last: torch.Tensor | None = None,
           draw: tuple[torch.Tensor | None, ...] = (None,) * 5) -> torch.Tensor:
    """logits [n, vocab], rows may have gaps between them -> int32 [n], the first of the largest.

    Args:
        rows: int32 [n]: token i is also written to last[rows[i]], and where that is -1 to the last entry.
        last: int32, see hal.relay.TokenRelay.
        draw: PagedModelInput's temperature, `thresholds` or None, PagedModelInput's seeds, positions, logits_indices:
            tokens are drawn where the temperature is not 0.
    """
    n, vocab = logits.shape
    blocks = triton.cdiv(triton.cdiv(vocab, _PIECE), max(_PROGRAMS // max(n, 1), 1))
    pieces = triton.cdiv(vocab, blocks * _PIECE)
    winners = torch.empty(n, pieces, dtype=torch.int64, device=logits.device)
    out = torch.empty(n, dtype=torch.int32, device=logits.device)
    _race[(n, pieces)](logits, *draw, winners, logits.stride(0), vocab, blocks, pieces, DRAW=draw[0] is not None,
                       BLOCK=_PIECE, num_warps=1, **launch_options(logits))
    _join[(n,)](winners, out, rows, last, pieces, 0 if last is None else len(last) - 1, KEEP=last is not None,
                BLOCK=triton.next_power_of_2(triton.cdiv(vocab, _PIECE)), num_warps=1, **launch_options(logits))
    return out
