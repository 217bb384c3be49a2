"""Products with weights of 8 or 4 bits, which are read as they are stored: one row of inputs, and few rows.

The layout of 4 bits: inputs come in chunks, whose size divides the group of a scale. A chunk of C inputs is C / 8 int32
words, and the nibble i of word j holds the input i * C / 8 + j. So each nibble of a chunk's words meets consecutive
inputs, and nothing is rearranged in a kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from hal.weights.grid import Grid
from runners.cuda.kernels.launch import launch_options, wait_for_inputs

MOST_ROWS = 16
_CHUNKS = (128, 64, 32, 16)


@dataclass(frozen=True, slots=True)
class FewBits:
    """A weight [out, in] in the layout of these kernels.

    Attributes:
        values: [out, chunks * chunk] of int8 or float8_e4m3fn, or [out, chunks * chunk / 8] int32 of 4 bits.
        scales: [out, chunks / per_scale], of the narrowest floating-point type that holds them. zeros: the same, of
            bytes where they hold them; None stands for zeros of 0.
        order: [in], which input comes where, or None: they come in their own order.
    """

    values: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    order: torch.Tensor | None
    bits: int
    chunk: int
    per_scale: int
    inputs: int

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """[out, in], in the order of `order`."""
        rows, values = len(self.values), self.values
        if self.bits == 4:
            words = values.view(rows, -1, 1, self.chunk // 8)
            shifts = torch.arange(0, 32, 4, device=values.device, dtype=torch.int32)
            values = words >> shifts.view(8, 1) & 15
        wide = values.reshape(rows, self.scales.shape[1], -1).float()
        if self.zeros is not None:
            wide = wide - self.zeros.unsqueeze(-1)
        return (wide * self.scales.unsqueeze(-1)).flatten(1)[:, :self.inputs].to(dtype)


def few_bits(grid: Grid) -> FewBits | None:
    """None: the kernels do not have the grid's form."""
    values, scales, zeros, order = grid.values, grid.scales, grid.zeros, None
    rows, inputs = values.shape
    if grid.index is not None:
        first = grid.index[0]
        order = first.long().argsort(stable=True)
        regular = torch.arange(inputs, device=order.device) // grid.group
        if not (grid.index == first).all() or not torch.equal(first[order].long(), regular):
            return None
        values = values[:, order]
    bits = 4 if values.dtype == torch.uint8 else 8
    group = -(-inputs // 128) * 128 if scales.shape[1] == 1 else grid.group
    chunk = next((c for c in _CHUNKS if group % c == 0), None)
    if chunk is None or (bits == 4 and int(values.max()) > 15):
        return None
    values = _padded(values, scales.shape[1] * group)
    if bits == 4:
        nibbles = values.view(rows, -1, 8, chunk // 8).int()
        packed = nibbles[:, :, 0]
        for i in range(1, 8):
            packed = packed | nibbles[:, :, i] << 4 * i
        values = packed.flatten(1)
    scales = _narrowest(scales, torch.float16, torch.bfloat16)
    zeros = None if zeros is None else _narrowest(zeros, torch.uint8)
    return FewBits(values.contiguous(), scales, zeros, order, bits, chunk, group // chunk, inputs)


def _narrowest(values: torch.Tensor, *dtypes: torch.dtype) -> torch.Tensor:
    """In the first of the types that holds them, or in fp32."""
    found = next((values.to(d) for d in dtypes if torch.equal(values.to(d).float(), values.float())), values.float())
    return found.contiguous()


def _padded(values: torch.Tensor, width: int) -> torch.Tensor:
    if values.shape[1] == width:
        return values
    if values.dtype == torch.float8_e4m3fn:  # some releases cannot pad it
        return F.pad(values.view(torch.int8), (0, width - values.shape[1])).view(torch.float8_e4m3fn)
    return F.pad(values, (0, width - values.shape[1]))


@triton.jit
def _one_row(x, values, scales, zeros, bias, out, rows, size, chunks, per_scale, BITS: tl.constexpr,
             CHUNK: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr,
             CHUNKS: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mine = row < rows
    WORDS: tl.constexpr = CHUNK // 8 if BITS == 4 else CHUNK
    word, some = tl.arange(0, WORDS), tl.arange(0, CHUNKS)
    source = values + row.to(tl.int64)[:, None, None] * (chunks * WORDS) + word[None, None]
    groups = chunks // per_scale
    acc = tl.zeros((ROWS, CHUNKS), tl.float32)
    wait_for_inputs(PDL)
    for start in range(0, chunks, CHUNKS):
        chunk = start + some
        there = mine[:, None] & (chunk < chunks)[None]
        tile = tl.load(source + chunk[None, :, None] * WORDS, mask=there[:, :, None], other=0.0 if BITS == 8 else 0)
        scale_at = row[:, None] * groups + (chunk // per_scale)[None]
        scale = tl.load(scales + scale_at, mask=there, other=0.0).to(tl.float32)
        if BITS == 8:
            at = chunk[:, None] * CHUNK + word[None]
            value = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)
            part = tl.sum(tile.to(tl.float32) * value[None], 2)
            total = tl.sum(value, 1)
        else:
            product = tl.zeros((ROWS, CHUNKS, WORDS), tl.float32)
            sums = tl.zeros((CHUNKS, WORDS), tl.float32)
            for i in tl.static_range(8):
                at = chunk[:, None] * CHUNK + i * WORDS + word[None]
                value = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)
                product += ((tile >> (4 * i)) & 15).to(tl.float32) * value[None]
                sums += value
            part = tl.sum(product, 2)
            total = tl.sum(sums, 1)
        if HAS_ZEROS:
            part -= tl.load(zeros + scale_at, mask=there, other=0).to(tl.float32) * total[None]
        acc += part * scale
    result = tl.sum(acc, 1)
    if HAS_BIAS:
        result += tl.load(bias + row, mask=mine, other=0.0).to(tl.float32)
    tl.store(out + row, result.to(out.dtype.element_ty), mask=mine)


@triton.jit
def _few_rows(x, values, scales, zeros, bias, out, count, x_stride, rows, size, chunks, per_scale,
              BITS: tl.constexpr, CHUNK: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr,
              ROWS: tl.constexpr, WORDS: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
              PDL: tl.constexpr):
    """A tile is ROWS outputs by WORDS values, or words of 8 values."""
    row, m, word = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_M), tl.arange(0, WORDS)
    mine, real = row < rows, m < count
    EACH: tl.constexpr = CHUNK // 8 if BITS == 4 else CHUNK
    words, groups = chunks * EACH, chunks // per_scale
    source = values + row.to(tl.int64)[:, None] * words
    inputs = x + m.to(tl.int64)[:, None] * x_stride
    acc = tl.zeros((BLOCK_M, ROWS), tl.float32)
    wait_for_inputs(PDL)
    for start in range(0, words, WORDS):
        at = start + word
        there = mine[:, None] & (at < words)[None]
        tile = tl.load(source + at[None], mask=there, other=0.0 if BITS == 8 else 0)
        scale_at = row[:, None] * groups + (at // EACH // per_scale)[None]
        scale = tl.load(scales + scale_at, mask=there, other=0.0).to(tl.float32)
        if HAS_ZEROS:
            zero = tl.load(zeros + scale_at, mask=there, other=0).to(tl.float32)
        else:
            zero = tl.zeros((ROWS, WORDS), tl.float32)
        if BITS == 8:
            value = tl.load(inputs + at[None], mask=real[:, None] & (at < size)[None], other=0.0)
            weight = ((tile.to(tl.float32) - zero) * scale).to(value.dtype)
            acc += tl.dot(value, tl.trans(weight), input_precision=PRECISION)
        else:
            for i in tl.static_range(8):
                place = at // EACH * CHUNK + i * EACH + at % EACH
                value = tl.load(inputs + place[None], mask=real[:, None] & (place < size)[None], other=0.0)
                weight = ((((tile >> (4 * i)) & 15).to(tl.float32) - zero) * scale).to(value.dtype)
                acc += tl.dot(value, tl.trans(weight), input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias + row, mask=mine, other=0.0).to(tl.float32)[None]
    into = out + m.to(tl.int64)[:, None] * rows + row[None]
    tl.store(into, acc.to(out.dtype.element_ty), mask=real[:, None] & mine[None])


def multiply(x: torch.Tensor, weight: FewBits, bias: torch.Tensor | None, *, rows: int = 0, width: int = 0,
             warps: int = 4) -> torch.Tensor:
    """x [n, in], contiguous rows in the weight's order, of at most MOST_ROWS rows -> [n, out]; sums are fp32.

    Args:
        rows, width: outputs of a program, and chunks (one row of inputs) or values of its tile; 0 takes the usual ones.
    """
    n, size = x.shape
    out = torch.empty(n, len(weight.values), dtype=x.dtype, device=x.device)
    each = weight.chunk // 8 if weight.bits == 4 else weight.chunk
    chunks = weight.values.shape[1] // each
    zeros = weight.scales if weight.zeros is None else weight.zeros
    shape = {"BITS": weight.bits, "CHUNK": weight.chunk, "HAS_ZEROS": weight.zeros is not None,
             "HAS_BIAS": bias is not None, **launch_options(x)}
    args = (weight.values, weight.scales, zeros, weight.scales if bias is None else bias, out)
    if n == 1:
        rows = rows or 4
        usual = 1024 // weight.chunk if weight.bits == 8 else 2048 // weight.chunk
        width = width or min(triton.next_power_of_2(chunks), usual)
        _one_row[(triton.cdiv(out.shape[1], rows),)](
            x, *args, out.shape[1], size, chunks, weight.per_scale, ROWS=rows, CHUNKS=width, num_warps=warps, **shape)
    else:
        rows, width = rows or 32, width or (64 if weight.bits == 8 else 16)
        _few_rows[(triton.cdiv(out.shape[1], rows),)](
            x, *args, n, x.stride(0), out.shape[1], size, chunks, weight.per_scale, ROWS=rows, WORDS=width,
            BLOCK_M=16, PRECISION="ieee" if x.dtype == torch.float32 else "tf32", num_warps=warps, **shape)
    return out
