"""A mixture of experts for one token: its choices, and their products with one row, which are all reading of weights.

The choices are found anew by every program that needs them: that takes less time than a kernel would, and the kernel
of the second layer can know them, and have its first weights on the way, before the first layer has ended.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from runners.cuda.kernels.experts import Held, gated
from runners.cuda.kernels.gemv import programs_at_once, tile_of
from runners.cuda.kernels.launch import launch_options, wait_for_inputs, wait_then_launch


@triton.jit
def _keys_of(logits, total, BLOCK_E: tl.constexpr, WARPS: tl.constexpr):
    """The scores as integers [WARPS, BLOCK_E] of which the largest is the best, and of equal scores that of the lower
    number. Logits have 16 bits, so the lowest bits have place for the number: no two are equal, whatever the logits.
    Each warp has all of them, so that warps find the best without a word to each other."""
    lane = tl.arange(0, BLOCK_E)[None] + tl.zeros((WARPS, 1), tl.int32)
    # The kernel before this one may still run, so that the multiprocessor's own cache may be out of date.
    value = tl.load(logits + lane, mask=lane < total, other=0.0, cache_modifier=".cg").to(tl.float32) + 0.0
    bits = value.to(tl.int32, bitcast=True)
    bits = tl.where(lane < total, (bits ^ (bits >> 31 & 0x7FFFFFFF)) & -8192, -2147483648)
    return bits | 8191 - lane


@triton.jit
def _take_best(keys):
    """The largest keys, and the keys without them."""
    best = tl.max(keys, 1)
    return best, tl.where(keys == best[:, None], -2147483648, keys)


@triton.jit
def _number_of(key):
    return 8191 - (key & 8191)


@triton.jit
def _logit_of(key):
    bits = (key & -8192 ^ (key >> 31 & 0x7FFFFFFF)) & -8192
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _store_choice(keys, weights, chosen, choice, total, SCALING: tl.constexpr, NORMALISE: tl.constexpr,
                 PER_TOKEN: tl.constexpr):
    """The number and the weight of one choice: a softmax over all experts, or over the chosen ones."""
    largest = _logit_of(tl.max(keys, 1))
    whole = tl.sum(tl.where(_number_of(keys) < total, tl.exp(_logit_of(keys) - largest[:, None]), 0.0), 1)
    mine, number = whole * 0, tl.zeros(whole.shape, tl.int32)
    among = mine
    for i in range(PER_TOKEN):
        best, keys = _take_best(keys)
        score = tl.exp(_logit_of(best) - largest)
        among += score
        mine, number = tl.where(i == choice, score, mine), tl.where(i == choice, _number_of(best), number)
    tl.store(weights + choice, tl.max(mine / (among if NORMALISE else whole), 0) * SCALING)
    tl.store(chosen + choice, tl.max(number, 0))


@triton.jit
def _part(source, step, expert, count, parts, at, size, hidden, mine, PER_TOKEN: tl.constexpr):
    """The tile of a step of _down."""
    here = (step < PER_TOKEN * parts) & (expert >= 0) & (expert < count)
    source += expert.to(tl.int64) * hidden * size + step % parts * at.shape[0]
    return tl.load(source + at[None], mask=(mine & here)[:, None] & (step % parts * at.shape[0] + at < size)[None],
                   other=0.0)


@triton.jit
def _prefetch(start, offset, length):
    """Bring `length` bytes, a multiple of 16, to L2. One thread asks for all of them."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; "
        "@p cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0; }",
        "=r,l,r", [start.to(tl.int64) + offset, length], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _add_both(a, b, c, d):
    return a + c, b + d


@triton.jit(do_not_specialize=["first"])
def _up(x, logits, weight, bias, down, out, weights, chosen, first, count, total, size, hidden, ahead,
        SCALING: tl.constexpr, NORMALISE: tl.constexpr, PER_TOKEN: tl.constexpr, LIMIT: tl.constexpr,
        HAS_BIAS: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr,
        WARPS: tl.constexpr, PDL: tl.constexpr):
    """Some of the inner values of one choice."""
    choice, at = tl.program_id(0), tl.arange(0, BLOCK)
    kind = out.dtype.element_ty
    wait_then_launch(PDL)
    keys = _keys_of(logits, total, BLOCK_E, WARPS)
    best, left = _take_best(keys)
    for _ in range(choice):
        best, left = _take_best(left)
    expert = tl.max(_number_of(best), 0) - first
    here = (expert >= 0) & (expert < count)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    gates = weight + (expert.to(tl.int64) * 2 * size + row)[:, None] * hidden
    half = tl.cast(size, tl.int64) * hidden  # from a gate's weights to the other factor's
    inside = (row < size) & here
    gate, up = tile_of(gates, at, hidden, inside), tile_of(gates + half, at, hidden, inside)
    value = tl.load(x + at, mask=at < hidden, other=0.0).to(tl.float32)
    if tl.program_id(1) == tl.num_programs(1) - 1:  # which has the fewest rows
        _store_choice(keys, weights, chosen, choice, total, SCALING, NORMALISE, PER_TOKEN)
    if here:
        step = tl.num_programs(1) * ROWS
        for begin in range(tl.program_id(1) * ROWS, size, step):  # goes on to other rows, reading ahead
            row = begin + tl.arange(0, ROWS)
            inside = row < size
            gates += step.to(tl.int64) * hidden
            next_gate = tile_of(gates, at, hidden, row + step < size)
            next_up = tile_of(gates + half, at, hidden, row + step < size)
            if AHEAD:  # noqa: SIM102 (at compile time)
                if begin + step >= size:  # else the memory is idle until the second layer begins
                    _prefetch(down + expert.to(tl.int64) * size * hidden, tl.program_id(1) * ahead, ahead)
            result, other = tl.reduce((gate.to(tl.float32) * value[None], up.to(tl.float32) * value[None]), 1,
                                      _add_both)
            if HAS_BIAS:
                offsets = bias + expert * 2 * size + row
                result += tl.load(offsets, mask=inside, other=0.0).to(tl.float32)
                other += tl.load(offsets + size, mask=inside, other=0.0).to(tl.float32)
            tl.store(out + choice * size + row, gated(result, other, kind, LIMIT).to(kind), mask=inside)
            gate, up = next_gate, next_up


@triton.jit(do_not_specialize=["first"])
def _down(x, logits, weights, chosen, weight, bias, out, first, count, total, size, hidden, parts,
          PER_TOKEN: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr,
          COLUMNS: tl.constexpr, WARPS: tl.constexpr, PDL: tl.constexpr):
    """Some outputs, summed over all choices, of which each has `parts` tiles. Two tiles are on the way beside the one
    that is being multiplied. The first are, before the first layer has ended."""
    at, row = tl.arange(0, COLUMNS), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mine = row < hidden
    source = weight + row.to(tl.int64)[:, None] * size
    best, left = _take_best(_keys_of(logits, total, BLOCK_E, WARPS))
    expert = tl.max(_number_of(best), 0)
    if parts == 1:
        best, left = _take_best(left)
    second = tl.max(_number_of(best), 0)
    tile = _part(source, 0, expert - first, count, parts, at, size, hidden, mine, PER_TOKEN)
    following = _part(source, 1, second - first, count, parts, at, size, hidden, mine, PER_TOKEN)
    wait_for_inputs(PDL)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(PER_TOKEN * parts):
        choice, later = step // parts, (step + 2) // parts
        expert = tl.load(chosen + later, mask=later < PER_TOKEN, other=0) - first
        further = _part(source, step + 2, expert, count, parts, at, size, hidden, mine, PER_TOKEN)
        expert = tl.load(chosen + choice) - first
        inner = step % parts * COLUMNS + at
        here = (inner < size) & (expert >= 0) & (expert < count)  # other choices have no inner values
        value = tl.load(x + choice * size + inner, mask=here, other=0.0).to(tl.float32) * tl.load(weights + choice)
        acc += tile.to(tl.float32) * value[None]
        tile, following = following, further
    result = tl.sum(acc, 1)
    if HAS_BIAS:
        for choice in range(PER_TOKEN):
            expert = tl.load(chosen + choice) - first
            here = mine & (expert >= 0) & (expert < count)
            offset = tl.load(bias + expert * hidden + row, mask=here, other=0.0).to(tl.float32)
            result += offset * tl.load(weights + choice)
    tl.store(out + row, result.to(out.dtype.element_ty), mask=mine)


# What was fastest on an H200 for Qwen3-30B-A3B. Of the first layer: values of a tile, and the part of the second
# layer's weights that its programs bring to L2. Of the second: outputs of a program, columns of a tile.
_VALUES, _AHEAD = 4096, 0.25
_OUTPUTS, _COLUMNS = 4, 1024


def experts(x: torch.Tensor, logits: torch.Tensor, held: Held, per_token: int, normalise: bool, scaling: float,
            ) -> tuple[torch.Tensor, torch.Tensor]:
    """x [1, hidden] and logits [1, all experts], contiguous, of 16 bits -> [1, hidden], the weighted sum of the chosen
    experts that this rank holds, and the numbers of all chosen ones, int32 [1, per_token]. There are at most 8,192
    experts."""
    hidden, total, size, device = x.shape[1], logits.shape[1], held.down.shape[2], x.device
    block, block_e = triton.next_power_of_2(hidden), triton.next_power_of_2(total)
    rows = max(_VALUES // block, 1)
    inner = torch.empty(per_token, size, dtype=x.dtype, device=device)
    weights = torch.empty(1, per_token, dtype=torch.float32, device=device)
    chosen = torch.empty(1, per_token, dtype=torch.int32, device=device)
    out = torch.empty_like(x)
    options: dict[str, Any] = {"PER_TOKEN": per_token, "BLOCK_E": block_e, "WARPS": 4, "num_warps": 4,
                               **launch_options(x)}
    biases, offsets = (w if b is None else b for w, b in (
        (held.gate_up, held.gate_up_bias), (held.down, held.down_bias)))
    sizes = held.first, held.count, total, size, hidden
    programs = max(min(programs_at_once(device) // per_token, triton.cdiv(size, rows)), 1)
    whole = hidden * size * x.itemsize
    ahead = int(_AHEAD * whole / programs) // 16 * 16 if whole % 16 == 0 and options["PDL"] else 0
    _up[(per_token, programs)](
        x, logits, held.gate_up, biases, held.down, inner, weights, chosen, *sizes, ahead, SCALING=scaling,
        NORMALISE=normalise, LIMIT=held.limit or 0.0, HAS_BIAS=held.gate_up_bias is not None, ROWS=rows, BLOCK=block,
        AHEAD=ahead > 0, **options)
    columns = min(triton.next_power_of_2(size), _COLUMNS)
    _down[(triton.cdiv(hidden, _OUTPUTS),)](
        inner, logits, weights, chosen, held.down, offsets, out, *sizes, triton.cdiv(size, columns),
        HAS_BIAS=held.down_bias is not None, ROWS=_OUTPUTS, COLUMNS=columns, **options)
    return out, chosen
