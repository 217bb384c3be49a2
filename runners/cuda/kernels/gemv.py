"""One row times a weight matrix: reading the weights is all the work, where matrix kernels waste."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from runners.cuda.kernels.launch import launch_options, wait_for_inputs


class Tile(NamedTuple):
    """Weights that a program reads at a time: rows, columns; and its warps."""

    rows: int
    columns: int
    warps: int


TILES = (Tile(2, 2048, 4), Tile(4, 1024, 4), Tile(1, 4096, 4), Tile(1, 2048, 2), Tile(1, 1024, 1), Tile(8, 1024, 8))


@triton.jit
def _tile(source, at, size, mine):
    return tl.load(source + at[None], mask=mine[:, None] & (at < size)[None], other=0.0)


@triton.jit
def _sum(x, residual, at, size, ADD: tl.constexpr):
    value = tl.load(x + at, mask=at < size, other=0.0)
    if ADD:
        more = tl.load(residual + at, mask=at < size, other=0.0)
        value = (value.to(tl.float32) + more.to(tl.float32)).to(value.dtype)
    return value


@triton.jit
def _gemv(x, residual, norm, weight, bias, total, out, rows, size, eps, HAS_BIAS: tl.constexpr, GATED: tl.constexpr,
          NORM: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
          PDL: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, COLUMNS)
    mine = row < rows
    kind = out.dtype.element_ty
    source = weight + row.to(tl.int64)[:, None] * size
    other = source + rows.to(tl.int64) * size
    # The weights are there before the row is: the first tile is read while the kernel before this one ends.
    tile = _tile(source, at, size, mine)
    if GATED:
        second = _tile(other, at, size, mine)
        more = tl.zeros((ROWS, COLUMNS), tl.float32)
    wait_for_inputs(PDL)
    if NORM:  # every program for itself, rounding where the unfused operations round
        whole = tl.arange(0, BLOCK)
        row_sum = _sum(x, residual, whole, size, ADD)
        if ADD:
            if tl.program_id(0) == 0:
                tl.store(total + whole, row_sum, mask=whole < size)
        wide = row_sum.to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(wide * wide) / size + eps)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, size, COLUMNS):
        column = start + at
        value = _sum(x, residual, column, size, ADD)
        if NORM:
            value = (value.to(tl.float32) * scale).to(kind) * tl.load(norm + column, mask=column < size, other=0.0)
        value = value.to(tl.float32)
        following = _tile(source, column + COLUMNS, size, mine)
        acc += tile.to(tl.float32) * value[None]
        tile = following
        if GATED:
            following = _tile(other, column + COLUMNS, size, mine)
            more += second.to(tl.float32) * value[None]
            second = following
    result = tl.sum(acc, 1)
    if HAS_BIAS:
        result += tl.load(bias + row, mask=mine, other=0.0).to(tl.float32)
    if GATED:
        up = tl.sum(more, 1)
        if HAS_BIAS:
            up += tl.load(bias + rows + row, mask=mine, other=0.0).to(tl.float32)
        gate = result.to(kind).to(tl.float32)
        result = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32) * up.to(kind).to(tl.float32)
    tl.store(out + row, result.to(kind), mask=mine)


class Norm(NamedTuple):
    """RMSNorm of the row, to which `residual` [1, in] is added first where there is one."""

    weight: torch.Tensor
    eps: float
    residual: torch.Tensor | None = None


def gemv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tile: Tile, *, gated: bool = False,
         norm: Norm | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """x [1, in], normed if `norm` says so, and weight [out, in], contiguous -> [1, out], and x + residual; sums are
    fp32. `gated`: SiLU of the first half of the outputs times the second half, [1, out / 2]."""
    rows, size = weight.shape
    rows = rows // 2 if gated else rows
    out = torch.empty(1, rows, dtype=x.dtype, device=x.device)
    normed, eps, residual = norm or Norm(x, 0.0)
    total = x if residual is None else torch.empty_like(x)
    added, biases = (x if residual is None else residual), (weight if bias is None else bias)
    _gemv[(triton.cdiv(rows, tile.rows),)](
        x, added, normed, weight, biases, total, out, rows, size, eps, HAS_BIAS=bias is not None, GATED=gated,
        NORM=norm is not None, ADD=residual is not None, ROWS=tile.rows, COLUMNS=tile.columns,
        BLOCK=triton.next_power_of_2(size), num_warps=tile.warps, **launch_options(x))
    return out, total
