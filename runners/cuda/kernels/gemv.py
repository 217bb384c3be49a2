"""One row times a weight matrix. Nearly all the time goes to reading the weights, which matrix kernels do less well."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from runners.cuda.kernels.elementwise import scaled
from runners.cuda.kernels.launch import launch_options, wait_for_inputs


class Tile(NamedTuple):
    """The tile of weights that a program reads at a time (rows, columns), and the number of its warps."""

    rows: int
    columns: int
    warps: int


TILES = (Tile(2, 2048, 4), Tile(4, 1024, 4), Tile(1, 4096, 4), Tile(1, 2048, 2), Tile(1, 1024, 1), Tile(8, 1024, 8),
         Tile(2, 1024, 2))


@triton.jit
def tile_of(source, at, size, mine):
    return tl.load(source + at[None], mask=mine[:, None] & (at < size)[None], other=0.0)


@triton.jit
def _sum(x, residual, at, size, ADD: tl.constexpr):
    value = tl.load(x + at, mask=at < size, other=0.0)
    if ADD:
        more = tl.load(residual + at, mask=at < size, other=0.0)
        value = (value.to(tl.float32) + more.to(tl.float32)).to(value.dtype)
    return value


@triton.jit
def _value(x, residual, norm, at, size, scale, NORM: tl.constexpr, ADD: tl.constexpr):
    value = _sum(x, residual, at, size, ADD)
    if NORM:
        gains = tl.load(norm + at, mask=at < size, other=0.0)
        value = scaled(value.to(tl.float32), scale, gains, value.dtype).to(value.dtype)
    return value.to(tl.float32)


@triton.jit
def _scale(value, total, at, size, eps, ADD: tl.constexpr):
    """RMSNorm's factor for a row. If the row is a sum, the first program stores it."""
    if ADD:  # noqa: SIM102 (at compile time)
        if tl.program_id(0) == 0:
            tl.store(total + at, value, mask=at < size)
    wide = value.to(tl.float32)
    return 1.0 / tl.sqrt(tl.sum(wide * wide) / size + eps)


@triton.jit
def _offsets(bias, row, rows, HAS_BIAS: tl.constexpr, GATED: tl.constexpr):
    """Biases of the outputs. If the outputs are gates, also the biases of the other factor."""
    offset = tl.zeros(row.shape, tl.float32)
    up_offset = offset
    if HAS_BIAS:
        offset = tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)
        if GATED:
            up_offset = tl.load(bias + rows + row, mask=row < rows, other=0.0).to(tl.float32)
    return offset, up_offset


@triton.jit
def _finish(result, up, out, row, rows, GATED: tl.constexpr):
    kind = out.dtype.element_ty
    if GATED:
        gate = result.to(kind).to(tl.float32)  # rounded where the unfused operations round
        result = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32) * up.to(kind).to(tl.float32)
    tl.store(out + row, result.to(kind), mask=row < rows)


@triton.jit
def _gemv(x, residual, norm, weight, bias, total, normed, out, rows, size, eps, HAS_BIAS: tl.constexpr,
          GATED: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr, KEEP: tl.constexpr, ROWS: tl.constexpr,
          COLUMNS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, COLUMNS)
    mine = row < rows
    source = weight + row.to(tl.int64)[:, None] * size
    half = tl.cast(rows, tl.int64) * size  # from a gate's weights to the other factor's
    # The weights are ready before the row is, so the first of them are read while the kernel before this one ends.
    tile = tile_of(source, at, size, mine)
    offset, up_offset = _offsets(bias, row, rows, HAS_BIAS, GATED)
    if GATED:
        second = tile_of(source + half, at, size, mine)
    WHOLE: tl.constexpr = COLUMNS >= BLOCK
    if NORM and WHOLE:
        gains = tl.load(norm + at, mask=at < size, other=0.0)
    wait_for_inputs(PDL)
    if WHOLE:
        value = _sum(x, residual, at, size, ADD)
        if NORM:  # every program for itself, rounding where the unfused operations round
            scale = _scale(value, total, at, size, eps, ADD)
            value = scaled(value.to(tl.float32), scale, gains, value.dtype).to(value.dtype)
            if KEEP:  # noqa: SIM102 (at compile time)
                if tl.program_id(0) == 0:
                    tl.store(normed + at, value, mask=at < size)
        value = value.to(tl.float32)
        step = tl.num_programs(0) * ROWS
        for first in range(tl.program_id(0) * ROWS, rows, step):  # goes on to other rows, reading ahead
            row = first + tl.arange(0, ROWS)
            source += step.to(tl.int64) * size
            following = tile_of(source, at, size, row + step < rows)
            result = tl.sum(tile.to(tl.float32) * value[None], 1)
            tile = following
            if GATED:
                following = tile_of(source + half, at, size, row + step < rows)
                up = tl.sum(second.to(tl.float32) * value[None], 1)
                second = following
            else:
                up = result
            _finish(result + offset, up + up_offset, out, row, rows, GATED)
            offset, up_offset = _offsets(bias, row + step, rows, HAS_BIAS, GATED)
    else:
        scale = 1.0
        if NORM:
            whole = tl.arange(0, BLOCK)
            scale = _scale(_sum(x, residual, whole, size, ADD), total, whole, size, eps, ADD)
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
        more = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, size, COLUMNS):
            column = start + at
            value = _value(x, residual, norm, column, size, scale, NORM, ADD)
            following = tile_of(source, column + COLUMNS, size, mine)
            acc += tile.to(tl.float32) * value[None]
            tile = following
            if GATED:
                following = tile_of(source + half, column + COLUMNS, size, mine)
                more += second.to(tl.float32) * value[None]
                second = following
        _finish(tl.sum(acc, 1) + offset, tl.sum(more, 1) + up_offset, out, row, rows, GATED)


@functools.cache
def programs_at_once(device: torch.device) -> int:
    """The number of programs that a device runs at once, of some warps each."""
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


class Norm(NamedTuple):
    """RMSNorm of the row. If there is a `residual` [1, in], it is added to the row first. If there is an `out` [1, in],
    the normed row is written there; that takes a tile of whole rows."""

    weight: torch.Tensor
    eps: float
    residual: torch.Tensor | None = None
    out: torch.Tensor | None = None


def gemv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tile: Tile, *, gated: bool = False,
         norm: Norm | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """x [1, in], normed if `norm` says so, and weight [out, in], contiguous -> [1, out], and x + residual; sums are
    fp32. `gated`: SiLU of the first half of the outputs times the second half, [1, out / 2]."""
    rows, size = weight.shape
    rows = rows // 2 if gated else rows
    out = torch.empty(1, rows, dtype=x.dtype, device=x.device)
    gains, eps, residual, normed = norm or Norm(x, 0.0)
    total = x if residual is None else torch.empty_like(x)
    added, biases = (x if residual is None else residual), (weight if bias is None else bias)
    block = triton.next_power_of_2(size)
    grid = triton.cdiv(rows, tile.rows)
    assert normed is None or tile.columns >= block
    if tile.columns >= block:
        grid = min(grid, programs_at_once(x.device))
    _gemv[(grid,)](x, added, gains, weight, biases, total, x if normed is None else normed, out, rows, size, eps,
                   HAS_BIAS=bias is not None, GATED=gated, NORM=norm is not None, ADD=residual is not None,
                   KEEP=normed is not None, ROWS=tile.rows, COLUMNS=tile.columns, BLOCK=block, num_warps=tile.warps,
                   **launch_options(x))
    return out, total
