"""The products of adapters (LoRA) of different slots in one batch: x A^T, and (x A^T) B^T added to a layer's outputs.

Tokens are sorted by slot once for each step. A program has a block of one slot's tokens, and the programs of blocks
that a slot does not fill end at once. So no size depends on which tokens have which adapter, and a CUDA graph can hold
the launches. The sum over the inputs is divided among programs, since few tokens alone would leave the device idle; the
second kernel adds the parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from runners.cuda.kernels.launch import launch_options, wait_for_inputs

_FEW, _PART, _MOST_PARTS = 128, 256, 16  # tokens of a step that decodes; inputs of a part of a sum, and parts


class Sorted(NamedTuple):
    """A step's tokens by slot. Attributes: order: int64 [num_tokens]. starts: int32 [slots + 1], places in `order` at
    which the tokens of each slot begin; those without an adapter come first."""

    order: torch.Tensor
    starts: torch.Tensor


def by_slot(slots: torch.Tensor, count: int) -> Sorted:
    """slots: int32 [num_tokens], -1 for none. count: of all slots."""
    ordered, order = slots.sort(stable=True)
    wanted = torch.arange(count + 1, dtype=slots.dtype, device=slots.device)
    return Sorted(order, torch.searchsorted(ordered, wanted, out_int32=True))


@triton.jit
def _places(starts, slot, block, BLOCK_M: tl.constexpr):
    """The places of a program's tokens, and which of them there are."""
    places = tl.load(starts + slot) + block * BLOCK_M + tl.arange(0, BLOCK_M)
    return places, places < tl.load(starts + slot + 1)


@triton.jit(do_not_specialize=["tokens"])
def _shrink(x, a, order, starts, out, tokens, x_stride, size, columns, each, PARTS: tl.constexpr,
            BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
            PDL: tl.constexpr):
    wait_for_inputs(PDL)
    slot, part = tl.program_id(1).to(tl.int64), tl.program_id(2) % PARTS
    places, real = _places(starts, slot, tl.program_id(0), BLOCK_M)
    column = tl.program_id(2) // PARTS * BLOCK_R + tl.arange(0, BLOCK_R)
    if tl.max(real.to(tl.int32), 0) > 0:
        rows = tl.load(order + places, mask=real, other=0)
        acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for begin in range(part * each, min(part * each + each, size), BLOCK_K):
            here = begin + tl.arange(0, BLOCK_K)
            value = tl.load(x + rows[:, None] * x_stride + here[None], mask=real[:, None] & (here < size)[None],
                            other=0.0)
            w = tl.load(a + (slot * columns + column[None]) * size + here[:, None],
                        mask=(column < columns)[None] & (here < size)[:, None], other=0.0)
            acc += tl.dot(value, w, input_precision=PRECISION)
        tl.store(out + (part * tokens + places[:, None]) * columns + column[None], acc,
                 mask=real[:, None] & (column < columns)[None])


@triton.jit(do_not_specialize=["tokens"])
def _expand(inner, b, order, starts, tiles, y, y_stride, tokens, outputs, columns, rank, PARTS: tl.constexpr,
            BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
            PDL: tl.constexpr):
    tile, slot = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = tl.load(tiles + tile * 3) + tl.arange(0, BLOCK_N)
    inside, lane = column < tl.load(tiles + tile * 3 + 1), tl.arange(0, BLOCK_R)
    there = lane < rank
    first = tl.load(tiles + tile * 3 + 2) * rank + lane
    wait_for_inputs(PDL)
    places, real = _places(starts, slot, tl.program_id(2), BLOCK_M)
    if tl.max(real.to(tl.int32), 0) > 0:
        w = tl.load(b + (slot * outputs + column[None]) * rank + lane[:, None], mask=inside[None] & there[:, None],
                    other=0.0)
        rows = tl.load(order + places, mask=real, other=0)
        at = y + rows[:, None] * y_stride + column[None]
        mask = real[:, None] & inside[None]
        before = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        source = inner + places[:, None] * columns + first[None]
        value = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for part in tl.static_range(PARTS):  # unrolled, so that no load waits for another
            value += tl.load(source + part * tokens * columns, mask=real[:, None] & there[None], other=0.0)
        kind = y.dtype.element_ty
        delta = tl.dot(value.to(kind), w, input_precision=PRECISION)
        tl.store(at, (before + delta).to(kind), mask=mask)


def tiles_of(outputs: Sequence[int], device: torch.device) -> torch.Tensor:
    """int32 [tiles, 3]: begin, end of its projection, and the projection, of each tile of a merged layer's outputs."""
    width, at, tiles = _width(sum(outputs)), 0, []
    for i, size in enumerate(outputs):
        tiles += [(begin, at + size, i) for begin in range(at, at + size, width)]
        at += size
    return torch.tensor(tiles, dtype=torch.int32, device=device)


def _width(outputs: int) -> int:
    return 256 if outputs > 8192 else 128


def adapt(y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, step: Sorted, tiles: torch.Tensor,
          ) -> torch.Tensor:
    """Add each token's (x A^T) B^T to y, in place.

    Args:
        y: [n, out]. x: [n, in]. The rows of both are contiguous. a: [slots, projections * rank, in]. b: [slots,
            out, rank]. tiles: of `tiles_of`.
    """
    (slots, columns, size), (_, outputs, rank), n = a.shape, b.shape, len(x)
    if not n:
        return y
    block = 16 if n <= _FEW else 64
    parts = min(max(size // _PART, 1), _MOST_PARTS) if n <= _FEW else 1
    each = triton.cdiv(size, parts * 128) * 128
    wide, deep = min(max(16, triton.next_power_of_2(columns)), 64), max(16, triton.next_power_of_2(rank))
    common = {"PARTS": parts, "BLOCK_M": block, "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",
              **launch_options(x)}
    inner = torch.empty(parts, n, columns, dtype=torch.float32, device=x.device)
    blocks = triton.cdiv(n, block)
    _shrink[blocks, slots, parts * triton.cdiv(columns, wide)](
        x, a, step.order, step.starts, inner, n, x.stride(0), size, columns, each, BLOCK_R=wide, BLOCK_K=128, **common)
    _expand[len(tiles), slots, blocks](inner, b, step.order, step.starts, tiles, y, y.stride(0), n, outputs, columns,
                                       rank, BLOCK_R=deep, BLOCK_N=_width(outputs), **common)
    return y
