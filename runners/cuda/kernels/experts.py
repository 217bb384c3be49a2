"""A mixture of experts, of which only those that the batch chooses are read, each once for few tokens.

A choice is a token with one of its experts; choices are numbered token by token. A program computes a tile of outputs
for the choices of one expert. With few choices every program finds those of its expert by itself, since sorting takes
longer than that. With many they are sorted first, and a program has a tile of them. No size depends on the routing, so
a CUDA graph can hold all of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from runners.cuda.kernels.launch import launch_options, wait_for_inputs

FEW = 1024  # choices that a program looks through
_BY_CHOICE, _BY_EXPERT, SORTED = 0, 1, 2  # what the first axis of a grid counts


@triton.jit
def group(chosen, starts, ends, pairs, first, count, BY: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr,
          BLOCK_M: tl.constexpr):
    """A program's expert, and the range of the expert's choices that the program computes."""
    if BY == 2:
        lane, block = tl.arange(0, BLOCK_E), tl.program_id(0)
        expert = tl.sum((tl.load(ends + lane, mask=lane < count, other=2147483647) <= block).to(tl.int32))
        there = expert < count
        begin = tl.load(starts + expert, mask=there, other=0)
        total = tl.load(starts + expert + 1, mask=there, other=0) - begin
        low = (block - tl.load(ends + expert, mask=there, other=0) + tl.cdiv(total, BLOCK_M)) * BLOCK_M
        high = tl.where(there, tl.minimum(low + BLOCK_M, total), low)
    else:
        mine = tl.program_id(0)
        low, high, before = mine * 0, mine * 0, mine * 0
        expert = mine if BY == 1 else tl.load(chosen + mine).to(tl.int32) - first
        for begin in range(0, pairs, BLOCK_P):
            at = begin + tl.arange(0, BLOCK_P)
            same = (tl.load(chosen + at, mask=at < pairs, other=-1).to(tl.int32) == expert + first).to(tl.int32)
            high += tl.sum(same)
            before += tl.sum(tl.where(at < mine, same, 0))
        if BY == 0:  # the first choice of an expert stands for the others
            high = tl.where((expert >= 0) & (expert < count) & (before == 0), high, 0)
    return expert, low, high


@triton.jit
def rows_of(chosen, order, starts, pairs, first, expert, low, high, BY: tl.constexpr, BLOCK_P: tl.constexpr,
            BLOCK_M: tl.constexpr):
    """The numbers of BLOCK_M choices of an expert from its `low`-th on, and which of them there are."""
    wanted = low + tl.arange(0, BLOCK_M)
    real = wanted < high
    if BY == 2:
        rows = tl.load(order + tl.load(starts + expert) + wanted, mask=real, other=0).to(tl.int64)
    else:
        found = tl.zeros((BLOCK_M,), tl.int32)
        before = tl.program_id(0) * 0
        for begin in range(0, pairs, BLOCK_P):
            at = begin + tl.arange(0, BLOCK_P)
            mine = tl.load(chosen + at, mask=at < pairs, other=-1).to(tl.int32) == expert + first
            place = before + tl.cumsum(mine.to(tl.int32), 0) - 1
            found += tl.sum(tl.where(mine[None] & (place[None] == wanted[:, None]), at[None], 0), 1)
            before += tl.sum(mine.to(tl.int32))
        rows = found.to(tl.int64)
    return rows, real


@triton.jit
def gated(gate, up, kind: tl.constexpr, LIMIT: tl.constexpr):
    """An expert's activation of fp32 values, rounded where the plain operations round."""
    gate, up = gate.to(kind).to(tl.float32), up.to(kind).to(tl.float32)
    if LIMIT > 0:
        gate, up = tl.minimum(gate, LIMIT), tl.minimum(tl.maximum(up, -LIMIT), LIMIT) + 1.0
        gate = gate / (1.0 + tl.exp(-1.702 * gate))
    else:
        gate = gate / (1.0 + tl.exp(-gate))
    return gate.to(kind).to(tl.float32) * up


@triton.jit(do_not_specialize=["pairs", "first"])
def _up(x, weight, bias, chosen, order, starts, ends, out, pairs, first, count, x_stride, size, hidden,
        PER_TOKEN: tl.constexpr, LIMIT: tl.constexpr, HAS_BIAS: tl.constexpr, BY: tl.constexpr, BLOCK_P: tl.constexpr,
        BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
        PRECISION: tl.constexpr, PDL: tl.constexpr):
    wait_for_inputs(PDL)
    expert, low, high = group(chosen, starts, ends, pairs, first, count, BY, BLOCK_P, BLOCK_E, BLOCK_M)
    kind = out.dtype.element_ty
    column, inner = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    inside = column < size
    row = expert.to(tl.int64) * 2 * size + column
    gates, ups = weight + row[:, None] * hidden, weight + (row + size)[:, None] * hidden
    for at in range(low, high, BLOCK_M):
        rows, real = rows_of(chosen, order, starts, pairs, first, expert, at, high, BY, BLOCK_P, BLOCK_M)
        source = x + (rows // PER_TOKEN)[:, None] * x_stride
        gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, hidden, BLOCK_K):
            here = start + inner
            more = (here < hidden)[None]
            value = tl.load(source + here[None], mask=real[:, None] & more, other=0.0)
            w = tl.load(gates + here[None], mask=inside[:, None] & more, other=0.0)
            gate += tl.dot(value, tl.trans(w), input_precision=PRECISION)
            w = tl.load(ups + here[None], mask=inside[:, None] & more, other=0.0)
            up += tl.dot(value, tl.trans(w), input_precision=PRECISION)
        if HAS_BIAS:
            gate += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)[None]
            up += tl.load(bias + row + size, mask=inside, other=0.0).to(tl.float32)[None]
        result = gated(gate, up, kind, LIMIT)
        tl.store(out + rows[:, None] * size + column[None], result.to(kind), mask=real[:, None] & inside[None])


@triton.jit(do_not_specialize=["pairs", "first"])
def _down(x, weight, bias, chosen, order, starts, ends, out, pairs, first, count, size, hidden,
          HAS_BIAS: tl.constexpr, BY: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr,
          BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
          PDL: tl.constexpr):
    wait_for_inputs(PDL)
    expert, low, high = group(chosen, starts, ends, pairs, first, count, BY, BLOCK_P, BLOCK_E, BLOCK_M)
    column, inner = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    inside = column < hidden
    row = expert.to(tl.int64) * hidden + column
    mine = weight + row[:, None] * size
    for at in range(low, high, BLOCK_M):
        rows, real = rows_of(chosen, order, starts, pairs, first, expert, at, high, BY, BLOCK_P, BLOCK_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, size, BLOCK_K):
            here = start + inner
            more = (here < size)[None]
            value = tl.load(x + rows[:, None] * size + here[None], mask=real[:, None] & more, other=0.0)
            w = tl.load(mine + here[None], mask=inside[:, None] & more, other=0.0)
            acc += tl.dot(value, tl.trans(w), input_precision=PRECISION)
        if HAS_BIAS:
            acc += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)[None]
        tl.store(out + rows[:, None] * hidden + column[None], acc.to(out.dtype.element_ty),
                 mask=real[:, None] & inside[None])


@triton.jit(do_not_specialize=["first"])
def _combine(y, weights, chosen, out, first, count, hidden, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr,
             PDL: tl.constexpr):
    """A token's sum over its experts of this rank."""
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(PER_TOKEN):
        choice = token * PER_TOKEN + i
        expert = tl.load(chosen + choice).to(tl.int32) - first
        here = (expert >= 0) & (expert < count) & (column < hidden)
        total += tl.load(weights + choice) * tl.load(y + choice * hidden + column, mask=here, other=0.0).to(tl.float32)
    tl.store(out + token * hidden + column, total.to(out.dtype.element_ty), mask=column < hidden)


@triton.jit
def _route(logits, weights, chosen, count, SCALING: tl.constexpr, NORMALISE: tl.constexpr, PER_TOKEN: tl.constexpr,
           BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr):
    """A softmax over all experts, and its best."""
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    lane, place = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    score = tl.load(logits + token * count + lane, mask=lane < count, other=-float("inf")).to(tl.float32)
    score = tl.exp(score - tl.max(score, 0))
    score = tl.where(lane < count, score / tl.sum(score, 0), -1.0)
    values, numbers = tl.zeros((BLOCK_K,), tl.float32), tl.zeros((BLOCK_K,), tl.int32)
    for i in range(PER_TOKEN):
        best = tl.argmax(score, 0)
        values = tl.where(place == i, tl.max(score, 0), values)
        numbers = tl.where(place == i, best, numbers)
        score = tl.where(lane == best, -1.0, score)
    if NORMALISE:
        values = values / tl.sum(values, 0)
    real = place < PER_TOKEN
    tl.store(weights + token * PER_TOKEN + place, values * SCALING, mask=real)
    tl.store(chosen + token * PER_TOKEN + place, numbers, mask=real)


def route(logits: torch.Tensor, per_token: int, normalise: bool, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [n, experts], contiguous -> weights fp32 and numbers int32, both [n, per_token], the best first."""
    n, count = logits.shape
    weights = torch.empty(n, per_token, dtype=torch.float32, device=logits.device)
    chosen = torch.empty(n, per_token, dtype=torch.int32, device=logits.device)
    _route[(n,)](logits, weights, chosen, count, SCALING=scaling, NORMALISE=normalise, PER_TOKEN=per_token,
                 BLOCK_E=triton.next_power_of_2(count), BLOCK_K=triton.next_power_of_2(per_token), num_warps=1,
                 **launch_options(logits))
    return weights, chosen


class Held(NamedTuple):
    """The experts that a rank holds: `count` from the number `first` on. Weights and biases as hal.models.experts has
    them, contiguous; `limit` is that of ExpertsConfig."""

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None
    first: int
    count: int
    limit: float | None


class Choices(NamedTuple):
    """How the choices of a batch are divided among programs.

    Attributes:
        groups: programs along the first axis of a grid. order, starts, ends: of `_sorted`, or anything.
        block: choices of a program's tile. options: of `group` and `rows_of`.
    """

    groups: int
    order: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor
    block: int
    options: dict[str, Any]


def divided(chosen: torch.Tensor, first: int, count: int, wide: bool) -> Choices:
    """chosen: contiguous. wide: values are fp32."""
    pairs, order, starts, ends = chosen.numel(), chosen, chosen, chosen
    if pairs <= FEW:
        by = _BY_CHOICE if pairs <= count else _BY_EXPERT
        groups, block = min(pairs, count), 16
    else:
        by, block = SORTED, 32 if wide else 128 if pairs >= 96 * count else 64
        groups = pairs // block + min(pairs, count)
        order, starts, ends = _sorted(chosen, first, count, block)
    return Choices(groups, order, starts, ends, block, {
        "BY": by, "BLOCK_E": triton.next_power_of_2(count), "BLOCK_M": block, "BLOCK_P": 16 if pairs <= 16 else 128})


def experts(x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, held: Held) -> torch.Tensor:
    """x [n, hidden], rows may have gaps; weights fp32 and chosen, both [n, per_token], contiguous -> [n, hidden], the
    weighted sum of each token's experts that this rank holds."""
    hidden, per_token, count, first = x.shape[1], chosen.shape[1], held.count, held.first
    size, pairs, wide = held.down.shape[2], chosen.numel(), x.dtype == torch.float32
    groups, order, starts, ends, block_m, options = divided(chosen, first, count, wide)
    if wide:
        up = down = 32, 32
    else:  # columns, and inner entries
        up, down = ((64, 64), (128, 64)) if options["BY"] == SORTED else ((32, 128), (64, 128))
    inner = torch.empty(pairs, size, dtype=x.dtype, device=x.device)
    y = torch.empty(pairs, hidden, dtype=x.dtype, device=x.device)
    options |= {"PRECISION": "ieee" if wide else "tf32", "num_warps": 8 if block_m == 128 else 4,
                "num_stages": 2 if wide else 3, **launch_options(x)}
    _up[(groups, triton.cdiv(size, up[0]))](
        x, held.gate_up, x if held.gate_up_bias is None else held.gate_up_bias, chosen, order, starts, ends, inner,
        pairs, first, count, x.stride(0), size, hidden, PER_TOKEN=per_token, LIMIT=held.limit or 0.0,
        HAS_BIAS=held.gate_up_bias is not None, BLOCK_N=up[0], BLOCK_K=up[1], **options)
    _down[(groups, triton.cdiv(hidden, down[0]))](
        inner, held.down, x if held.down_bias is None else held.down_bias, chosen, order, starts, ends, y, pairs, first,
        count, size, hidden, HAS_BIAS=held.down_bias is not None, BLOCK_N=down[0], BLOCK_K=down[1], **options)
    return combine(y, weights, chosen, first, count)


def combine(y: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """y [choices, hidden] -> [n, hidden], each token's weighted sum over those of its experts that this rank holds."""
    (n, per_token), hidden = chosen.shape, y.shape[1]
    out = torch.empty(n, hidden, dtype=y.dtype, device=y.device)
    block = min(triton.next_power_of_2(hidden), 1024)
    _combine[(n, triton.cdiv(hidden, block))](y, weights, chosen, out, first, count, hidden, PER_TOKEN=per_token,
                                              BLOCK=block, num_warps=4, **launch_options(y))
    return out


def _sorted(chosen: torch.Tensor, first: int, count: int, block: int,
            ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choices in the order of their experts; where each expert of this rank begins among them, [count + 1]; and where
    each one's tiles of `block` choices end, [count]. Choices of other ranks are at the end."""
    local = chosen.flatten().long() - first
    local = local.masked_fill((local < 0) | (local >= count), count)
    loads = torch.zeros(count + 1, dtype=torch.int32, device=chosen.device)
    loads = loads.scatter_add(0, local, torch.ones_like(local, dtype=torch.int32))[:count]
    starts = F.pad(loads.cumsum(0, dtype=torch.int32), (1, 0))
    return local.argsort(stable=True), starts, ((loads + (block - 1)) // block).cumsum(0, dtype=torch.int32)
