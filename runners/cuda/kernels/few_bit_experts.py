"""Experts whose weights are in few bits, which are read as they are stored: those that the batch chooses and no others.

One weight holds the outputs of all experts of a rank, expert by expert. With one token each expert has one row of
inputs, so a vector kernel computes it. With few choices a program reads its weights once for 16 choices and multiplies
the integers themselves. With many choices a program dequantises each tile of weights for a whole block of choices.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from runners.cuda.kernels.experts import SORTED, Choices, combine, divided, gated, group, rows_of
from runners.cuda.kernels.few_bits import FewBits, chunk_product, dequantized_product, one_row_tile, row_product
from runners.cuda.kernels.launch import launch_options, wait_for_inputs


@triton.jit(do_not_specialize=["first"])
def _one_token(x, values, scales, zeros, bias, chosen, out, first, count, x_stride, outputs, size, chunks, each,
               PER_TOKEN: tl.constexpr, GATED: tl.constexpr, LIMIT: tl.constexpr, HAS_BIAS: tl.constexpr,
               PIECES: tl.constexpr, OFFSET: tl.constexpr, E2M1: tl.constexpr, CHUNK: tl.constexpr,
               PARTS: tl.constexpr, HAS_ZEROS: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr,
               PDL: tl.constexpr):
    """Some outputs of one choice. GATED: an expert has `outputs` gates, and then as many rows of the other factor."""
    choice = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    mine = column < outputs
    FACTORS: tl.constexpr = 2 if GATED else 1
    kind = out.dtype.element_ty
    wait_for_inputs(PDL)
    expert = tl.load(chosen + choice).to(tl.int32) - first
    if (expert >= 0) & (expert < count):
        row, rows = expert.to(tl.int64) * FACTORS * outputs + column, count * FACTORS * outputs
        source = x + choice // PER_TOKEN * x_stride
        result = row_product(source, values, scales, zeros, row, mine, rows, size, chunks, each, PIECES, OFFSET, E2M1,
                             CHUNK, PARTS, HAS_ZEROS, CHUNKS)
        if HAS_BIAS:
            result += tl.load(bias + row, mask=mine, other=0.0).to(tl.float32)
        if GATED:
            up = row_product(source, values, scales, zeros, row + outputs, mine, rows, size, chunks, each, PIECES,
                             OFFSET, E2M1, CHUNK, PARTS, HAS_ZEROS, CHUNKS)
            if HAS_BIAS:
                up += tl.load(bias + row + outputs, mask=mine, other=0.0).to(tl.float32)
            result = gated(result, up, kind, LIMIT)
        tl.store(out + choice * outputs + column, result.to(kind), mask=mine)


@triton.jit(do_not_specialize=["pairs", "first"])
def _tiles(x, values, scales, zeros, bias, chosen, order, starts, ends, out, pairs, first, count, x_stride, outputs,
           size, chunks, each, PER_TOKEN: tl.constexpr, GATED: tl.constexpr, LIMIT: tl.constexpr,
           HAS_BIAS: tl.constexpr, PIECES: tl.constexpr, OFFSET: tl.constexpr, E2M1: tl.constexpr, CHUNK: tl.constexpr,
           PARTS: tl.constexpr, HAS_ZEROS: tl.constexpr, BY: tl.constexpr, BLOCK_P: tl.constexpr,
           BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
           PRECISION: tl.constexpr, PDL: tl.constexpr):
    """Some outputs of the choices of one expert. GATED: as of _one_token; a tile of weights has both factors then."""
    wait_for_inputs(PDL)
    expert, low, high = group(chosen, starts, ends, pairs, first, count, BY, BLOCK_P, BLOCK_E, BLOCK_M)
    kind = out.dtype.element_ty
    FACTORS: tl.constexpr = 2 if GATED else 1
    WORDS: tl.constexpr = CHUNK // PIECES if PIECES > 0 else CHUNK
    place, column = tl.arange(0, FACTORS * BLOCK_N), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    of_place = tl.program_id(1) * BLOCK_N + place % BLOCK_N
    mine, inside = of_place < outputs, column < outputs
    row = expert.to(tl.int64) * FACTORS * outputs + place // BLOCK_N * outputs + of_place
    rows = count * FACTORS * outputs
    source = values + row[:, None] * (chunks * WORDS) + tl.arange(0, WORDS)[None]
    for begin in range(low, high, BLOCK_M):
        choices, real = rows_of(chosen, order, starts, pairs, first, expert, begin, high, BY, BLOCK_P, BLOCK_M)
        inputs = x + (choices // PER_TOKEN * x_stride)[None]
        acc = tl.zeros((FACTORS * BLOCK_N, BLOCK_M), tl.float32)
        if BY == 2:
            acc = dequantized_product(acc, values, inputs, real, size, scales, zeros, row, mine, rows, chunks, each,
                                      PIECES, OFFSET, E2M1, CHUNK, PARTS, HAS_ZEROS, STAGES, PRECISION)
        else:
            for chunk in tl.range(0, chunks, num_stages=STAGES):
                tile = tl.load(source + chunk * WORDS, mask=mine[:, None], other=0 if PIECES > 0 else 0.0)
                acc = chunk_product(acc, tile, inputs, real, size, scales, zeros, row, mine, rows, chunk, each, PIECES,
                                    OFFSET, E2M1, CHUNK, PARTS, HAS_ZEROS, PRECISION)
        if HAS_BIAS:
            acc += tl.load(bias + row, mask=mine, other=0.0).to(tl.float32)[:, None]
        if GATED:
            gate, up = tl.split(tl.permute(tl.reshape(acc, (2, BLOCK_N, BLOCK_M)), (1, 2, 0)))
            acc = gated(gate, up, kind, LIMIT)
        tl.store(out + choices[None] * outputs + column[:, None], acc.to(kind), mask=real[None] & inside[:, None])


class Stacks(NamedTuple):
    """The experts that a rank holds: `count` from the number `first` on. Biases as hal.models.experts has them; `limit`
    is that of ExpertsConfig."""

    gate_up: FewBits
    down: FewBits
    gate_up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None
    first: int
    count: int
    limit: float | None

    @property
    def form(self) -> str:
        """Experts of the same form run the same compiled kernels."""
        return str([(w.form, w.scales.dtype, None if w.zeros is None else w.zeros.dtype)
                    for w in (self.gate_up, self.down)])


class Tile(NamedTuple):
    """How a program of few choices works: its outputs, the tiles of weights on the way at once, and its warps."""

    outputs: int
    stages: int
    warps: int


# By the integers of a word, as of FewBits.pieces: what was fastest on an H200 (benchmarks/gpu.py experts).
FEW_TILES = {0: Tile(32, 4, 2), 4: Tile(64, 4, 2), 8: Tile(32, 4, 1)}
_ONE_TILE = 4, 16, 2  # outputs of a program, chunks of its tile, and warps, for one token and weights of integers


def experts(x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, held: Stacks, tile: Tile | None = None,
            ) -> torch.Tensor:
    """As runners.cuda.kernels.experts. tile: of few choices; None: of FEW_TILES."""
    per_token = chosen.shape[1]
    how = None if len(x) == 1 else divided(chosen, held.first, held.count, x.dtype == torch.float32)
    inner = _layer(x, chosen, held, held.gate_up, held.gate_up_bias, how, tile, per_token, True)
    y = _layer(inner, chosen, held, held.down, held.down_bias, how, tile, 1, False)
    return combine(y, weights, chosen, held.first, held.count)


def _layer(x: torch.Tensor, chosen: torch.Tensor, held: Stacks, weight: FewBits, bias: torch.Tensor | None,
           how: Choices | None, tile: Tile | None, per_token: int, gated: bool) -> torch.Tensor:
    """One layer of all experts, for every choice -> [choices, outputs]. x has a row for every `per_token` choices."""
    pairs, wide = chosen.numel(), x.dtype == torch.float32
    outputs = len(weight.values) // held.count // (2 if gated else 1)
    out = torch.empty(pairs, outputs, dtype=x.dtype, device=x.device)
    tensors = (x, weight.values, weight.scales, weight.zeros_or_any, weight.scales if bias is None else bias, chosen)
    sizes = (held.first, held.count, x.stride(0), outputs, weight.inputs, weight.chunks, weight.each)
    options: dict[str, Any] = {"PER_TOKEN": per_token, "GATED": gated, "LIMIT": held.limit or 0.0,
                               "HAS_BIAS": bias is not None, **weight.form, **launch_options(x)}
    if how is None:
        rows, width, warps = _ONE_TILE if weight.pieces else one_row_tile(weight, outputs)
        _one_token[(pairs, triton.cdiv(outputs, rows))](
            *tensors, out, *sizes, ROWS=rows, CHUNKS=min(width, triton.next_power_of_2(weight.chunks)), num_warps=warps,
            **options)
        return out
    tile = tile or FEW_TILES[weight.pieces]
    if how.options["BY"] == SORTED:
        tile = Tile(32, 2, 4) if wide else Tile(128, 3, 8)
        tile = tile._replace(outputs=tile.outputs // 2) if gated else tile
    elif not gated:
        tile = tile._replace(outputs=2 * tile.outputs)
    _tiles[(how.groups, triton.cdiv(outputs, tile.outputs))](
        *tensors, how.order, how.starts, how.ends, out, pairs, *sizes, BLOCK_N=tile.outputs, STAGES=tile.stages,
        PRECISION="ieee" if wide else "tf32", num_warps=tile.warps, **how.options, **options)
    return out
