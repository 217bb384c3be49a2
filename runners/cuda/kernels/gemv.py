"""One row times a weight matrix: reading the weights is all the work, where matrix kernels waste."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Tile(NamedTuple):
    """Weights that a program reads at a time: rows, columns; and its warps."""

    rows: int
    columns: int
    warps: int


TILES = (Tile(4, 1024, 4), Tile(8, 512, 4), Tile(8, 1024, 8), Tile(16, 256, 4), Tile(2, 2048, 4))


@triton.jit
def _gemv(x, weight, bias, out, rows, size, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, COLUMNS)
    mine = row < rows
    source = weight + row.to(tl.int64)[:, None] * size
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, size, COLUMNS):
        column = start + at
        here = column < size
        value = tl.load(x + column, mask=here, other=0.0).to(tl.float32)
        tile = tl.load(source + column[None], mask=mine[:, None] & here[None], other=0.0,
                       eviction_policy="evict_first").to(tl.float32)
        acc += tile * value[None]
    total = tl.sum(acc, 1)
    if HAS_BIAS:
        total += tl.load(bias + row, mask=mine, other=0.0).to(tl.float32)
    tl.store(out + row, total.to(out.dtype.element_ty), mask=mine)


def gemv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tile: Tile) -> torch.Tensor:
    """x [1, in] and weight [out, in], contiguous -> [1, out]; sums are fp32."""
    rows, size = weight.shape
    out = torch.empty(1, rows, dtype=x.dtype, device=x.device)
    _gemv[(triton.cdiv(rows, tile.rows),)](x, weight, weight if bias is None else bias, out, rows, size,
                                           HAS_BIAS=bias is not None, ROWS=tile.rows, COLUMNS=tile.columns,
                                           num_warps=tile.warps, num_stages=2)
    return out
