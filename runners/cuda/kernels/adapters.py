"""The products of adapters (LoRA) of different slots in one batch: x A^T, and (x A^T) B^T added to a layer's outputs.

Tokens are sorted by slot once for each step. A program has a block of one slot's tokens, and the programs of blocks
that a slot does not fill end at once. So no size depends on which tokens have which adapter, and a CUDA graph can hold
the launches. The sum over the inputs is divided among programs, since few tokens alone would leave the device idle; the
second kernel adds the parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from runners.cuda.kernels.launch import launch_options, wait_for_inputs

_FEW, _PART, _MOST_PARTS = 128, 512, 16  # tokens of a step that decodes; inputs of a part of a sum, and parts


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
        # One load of all parts, since loads in a loop wait for one another.
        source = inner + tl.arange(0, PARTS)[:, None, None] * (tokens * columns) + (places * columns)[None, :, None]
        value = tl.load(source + first[None, None], mask=real[None, :, None] & there[None, None], other=0.0)
        kind = y.dtype.element_ty
        delta = tl.dot(tl.sum(value, 0).to(kind), w, input_precision=PRECISION)
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


def shrink(x: torch.Tensor, a: torch.Tensor, step: Sorted, inner: torch.Tensor, alone: bool = False) -> None:
    """Fill `inner`, of `inner_of`, with parts of the sums of each token's x A^T.

    Args:
        x: [n, in], contiguous rows. a: [slots, projections * rank, in]. alone: it does not start
            before the launches ahead of it have ended, which a launch that waits for another stream needs.
    """
    (slots, columns, size), (parts, n, _) = a.shape, inner.shape
    block, each = _block(n), triton.cdiv(size, parts * 128) * 128
    wide = min(max(16, triton.next_power_of_2(columns)), 64)
    _shrink[triton.cdiv(n, block), slots, parts * triton.cdiv(columns, wide)](
        x, a, step.order, step.starts, inner, n, x.stride(0), size, columns, each, BLOCK_R=wide, BLOCK_K=128,
        **_common(x, parts, block, alone))


def inner_of(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Memory [parts, n, projections * rank], fp32."""
    most = max(x.shape[1] // _PART, 1) if len(x) <= _FEW else 1
    parts = min(1 << most.bit_length() - 1, _MOST_PARTS)
    return torch.empty(parts, len(x), a.shape[1], dtype=torch.float32, device=x.device)


def expand(y: torch.Tensor, inner: torch.Tensor, b: torch.Tensor, step: Sorted, tiles: torch.Tensor,
           alone: bool = False) -> torch.Tensor:
    """Add each token's (x A^T) B^T to y, in place.

    Args:
        y: [n, out], contiguous rows. inner: of `shrink`. b: [slots, out, rank]. tiles: of `tiles_of`. alone: as of
            `shrink`.
    """
    (slots, outputs, rank), (parts, n, columns) = b.shape, inner.shape
    block = _block(n)
    _expand[len(tiles), slots, triton.cdiv(n, block)](
        inner, b, step.order, step.starts, tiles, y, y.stride(0), n, outputs, columns, rank,
        BLOCK_R=max(16, triton.next_power_of_2(rank)), BLOCK_N=_width(outputs), **_common(y, parts, block, alone))
    return y


def _block(tokens: int) -> int:
    return 16 if tokens <= _FEW else 64


def _common(x: torch.Tensor, parts: int, block: int, alone: bool) -> dict[str, Any]:
    return {"PARTS": parts, "BLOCK_M": block, "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",
            **({"PDL": False} if alone else launch_options(x))}
