"""Products with weights of 8 or 4 bits, which are read as they are stored: one row of inputs, and few rows.

The layout of integers: inputs come in chunks of 128, and a word of 32 bits has 4 or 8 of them, so that a chunk is 32 or
16 words. The piece i of word j is the input i * words + j. So each piece of a chunk's words meets consecutive inputs,
whose group is the same, and nothing is rearranged in a kernel. The lowest 24 bits of a word are a fixed-point number
when they are taken for those of a floating-point number: n * 2^-149. So one instruction takes a piece out, while a
conversion has an eighth of the rate of other instructions. For one row even that is too many: its inputs become
fixed-point numbers, and one instruction multiplies two of them by two bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from hal.weights.grid import Grid
from runners.cuda.kernels.gemv import Norm, Tile, programs_at_once
from runners.cuda.kernels.launch import COMPILED, launch_options, wait_for_inputs

MOST_ROWS = 32
_CHUNKS = (128, 64, 32, 16)
_OUTPUTS = 32  # the fewest outputs of a program for few rows
_PROGRAMS = 1056  # eight for each multiprocessor of an H200
_CHUNKS_AT_ONCE = 128  # of integers in the tile of one row


@dataclass(frozen=True, slots=True)
class FewBits:
    """A weight [out, in] in the layout of these kernels.

    Attributes:
        values: [out, chunks * chunk] of float8_e4m3fn, or [out, chunks * words] int32 of integers from 0 on.
        scales: [groups, out], of the narrowest floating-point type that holds them. zeros: the same, of bytes where
            they hold them; None stands for zeros of 0.
        order: [in], which input comes where, or None: they come in their own order.
        pieces: integers of a word; 0 for float8. offset: what the integers are above the values that were given.
        e2m1: the integers are codes of 4-bit floating-point numbers, as MXFP4 has them.
        group: consecutive inputs that share a scale. chunk: inputs that a kernel takes at once; it divides the group,
            or of integers, whose chunk is 128, may be a multiple of it.
        ended: int32 zeros, which programs that share an output count themselves in, and set to zero again.
    """

    values: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    order: torch.Tensor | None
    pieces: int
    offset: int
    chunk: int
    group: int
    inputs: int
    ended: torch.Tensor
    e2m1: bool = False

    @property
    def chunks(self) -> int:
        return self.values.shape[1] * max(self.pieces, 1) // self.chunk

    @property
    def each(self) -> int:
        """Chunks that share a scale; 1 where a chunk has several scales."""
        return max(self.group // self.chunk, 1)

    @property
    def zeros_or_any(self) -> torch.Tensor:
        """The zeros, or where there are none, a tensor that stands in their place in a launch."""
        return self.scales if self.zeros is None else self.zeros

    @property
    def takes_norm(self) -> bool:
        """Whether one_row is faster if it norms its inputs itself. It is with 4 bits, since few programs do so."""
        return self.order is None and self.pieces == 8 and self.chunks <= _CHUNKS_AT_ONCE

    @property
    def form(self) -> dict[str, Any]:
        """What the kernels of a product are compiled for."""
        return {"PIECES": self.pieces, "OFFSET": self.offset, "E2M1": self.e2m1, "CHUNK": self.chunk,
                "PARTS": max(self.chunk // self.group, 1), "HAS_ZEROS": self.zeros is not None}

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """[out, in], in the order of `order`."""
        rows = len(self.values)
        out = torch.empty(rows, self.inputs, dtype=dtype, device=self.values.device)
        chunks = triton.cdiv(self.inputs, self.chunk)
        _dequantize[(triton.cdiv(rows, 32), chunks)](
            self.values, self.scales, self.zeros_or_any, out, rows, self.inputs, self.values.shape[1], self.group,
            ROWS=32, **self.form, **launch_options(out))
        return out


def few_bits(grid: Grid, e2m1: bool = False) -> FewBits | None:
    """None: the kernels do not have the grid's form. e2m1: the grid's values are codes of such numbers."""
    values, scales, zeros, order = grid.values, grid.scales, grid.zeros, None
    rows, inputs = values.shape
    if grid.index is not None:
        first = grid.index[0]
        order = first.long().argsort(stable=True)
        regular = torch.arange(inputs, device=order.device) // grid.group
        if not (grid.index == first).all() or not torch.equal(first[order].long(), regular):
            return None
        values = values[:, order]
    pieces = {torch.uint8: 8, torch.int8: 4}.get(values.dtype, 0)
    group = -(-inputs // 128) * 128 if scales.shape[1] == 1 else grid.group
    chunk = next((c for c in _CHUNKS if group % c == 0), 0)
    if not chunk or (pieces and ((group % 128 and group != chunk) or 128 // group > pieces)):
        return None
    if (zeros is not None and not pieces) or (pieces == 8 and int(values.max()) > 15):
        return None
    offset = 128 if pieces == 4 else 0
    if pieces:
        chunk, groups = 128, -(-inputs // 128) * 128 // group
        scales = F.pad(scales, (0, groups - scales.shape[1]))
        zeros = None if zeros is None else F.pad(zeros, (0, groups - zeros.shape[1]))
    values = _padded(values, scales.shape[1] * group)
    if pieces:
        parts = (values.int() + offset).view(rows, -1, pieces, 128 // pieces)
        packed = parts[:, :, 0]
        for i in range(1, pieces):
            packed = packed | parts[:, :, i] << 32 // pieces * i
        values = packed.flatten(1)
    scales = _narrowest(scales.t(), torch.float16, torch.bfloat16)
    zeros = None if zeros is None else _narrowest(zeros.t(), torch.uint8)
    ended = torch.zeros(-(-rows // _OUTPUTS), dtype=torch.int32, device=values.device)
    return FewBits(values.contiguous(), scales, zeros, order, pieces, offset, chunk, group, inputs, ended, e2m1)


def stacked(parts: Sequence[FewBits | None]) -> FewBits | None:
    """The outputs of all parts as those of one weight. None: a part has no form or an order of inputs of its own."""
    found = [part for part in parts if part is not None and part.order is None]
    if len(found) < len(parts) or any(part.form != found[0].form for part in found):
        return None
    values, scales = torch.cat([part.values for part in found]), torch.cat([part.scales for part in found], 1)
    zeros = [part.zeros for part in found if part.zeros is not None]
    return replace(found[0], values=values, scales=scales, zeros=torch.cat(zeros, 1) if zeros else None)


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
def _piece(words, NTH: tl.constexpr, PIECES: tl.constexpr, E2M1: tl.constexpr, RAISED: tl.constexpr):
    """The NTH integer n of each word, as the fp32 number n * 2^(RAISED - 149), or, where RAISED is 0, as n times 2^-149
    times two to the power of its place, which is `32 // PIECES * NTH % 24`. With E2M1 the number that the code stands
    for takes the place of n. Its bits are those of an fp32 number with another bias of the exponent, so where RAISED is
    0 the result is the number times 2^-126, whatever its place."""
    PLACE: tl.constexpr = 32 // PIECES * NTH
    if E2M1:
        bits = words << (22 - PLACE) if PLACE < 22 else words >> (PLACE - 22)
        value = (bits & (7 << 22) | words << (28 - PLACE) & -2147483648).to(tl.float32, bitcast=True)
        if RAISED > 0:
            value = value * 2.0 ** (RAISED - 23)
    else:
        MASK: tl.constexpr = (1 << 32 // PIECES) - 1
        bits = words & (MASK << PLACE) if PLACE < 24 else (words >> 24) & (MASK << (PLACE - 24))
        value = bits.to(tl.float32, bitcast=True)
        if RAISED > 0:
            value = value * 2.0 ** (RAISED - PLACE % 24)
    return value


@triton.jit
def _dequantize(values, scales, zeros, out, rows, size, width, group, PIECES: tl.constexpr, OFFSET: tl.constexpr,
                E2M1: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr, HAS_ZEROS: tl.constexpr,
                ROWS: tl.constexpr, PDL: tl.constexpr):
    row, chunk = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    WORDS: tl.constexpr = CHUNK // PIECES if PIECES > 0 else CHUNK
    word, mine = tl.arange(0, WORDS), (row < rows)[:, None]
    wait_for_inputs(PDL)
    source = values + row.to(tl.int64)[:, None] * width + (chunk * WORDS + word)[None]
    tile = tl.load(source, mask=mine, other=0 if PIECES > 0 else 0.0)
    for i in tl.static_range(PIECES if PIECES > 0 else 1):
        at = chunk * CHUNK + i * WORDS + word
        scale_at = (at // group)[None] * rows + row[:, None]
        value = _piece(tile, i, PIECES, E2M1, 126) * 2.0 ** 23 - OFFSET if PIECES > 0 else tile.to(tl.float32)
        if HAS_ZEROS:
            value -= tl.load(zeros + scale_at, mask=mine, other=0).to(tl.float32)
        value *= tl.load(scales + scale_at, mask=mine, other=0.0).to(tl.float32)
        into = out + row.to(tl.int64)[:, None] * size + at[None]
        tl.store(into, value.to(out.dtype.element_ty), mask=mine & (at < size)[None])


@triton.jit
def _float8_tile(values, scales, row, mine, rows, start, chunks, each, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """The weight's rows `row`, of which those count that are `mine`, in CHUNKS chunks from `start` on: [rows, CHUNKS,
    CHUNK], and their scales."""
    chunk = start + tl.arange(0, CHUNKS)
    there = mine[:, None] & (chunk < chunks)[None]
    source = values + row.to(tl.int64)[:, None, None] * (chunks * CHUNK) + tl.arange(0, CHUNK)[None, None]
    tile = tl.load(source + chunk[None, :, None] * CHUNK, mask=there[:, :, None], other=0.0)
    return tile, tl.load(scales + (chunk // each)[None] * rows + row[:, None], mask=there, other=0.0)


@triton.jit
def _float8_products(tile, scale, x, start, size):
    """[rows, CHUNKS]: the products of a tile and of the inputs from the chunk `start` on."""
    CHUNKS: tl.constexpr = tile.shape[1]
    CHUNK: tl.constexpr = tile.shape[2]
    at = (start + tl.arange(0, CHUNKS))[:, None] * CHUNK + tl.arange(0, CHUNK)[None]
    value = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)
    return tl.sum(tile.to(tl.float32) * value[None], 2) * scale.to(tl.float32)


@triton.jit
def row_product(x, values, scales, zeros, row, mine, rows, size, chunks, each, PIECES: tl.constexpr,
                OFFSET: tl.constexpr, E2M1: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr,
                HAS_ZEROS: tl.constexpr, CHUNKS: tl.constexpr):
    """One row of inputs times the weight's rows `row`, of which those count that are `mine`: fp32, of row's shape.
    PARTS: groups of a chunk; where it is 1, `each` chunks are a group. `rows`: of the whole weight."""
    if PIECES > 0:
        WORDS: tl.constexpr = CHUNK // PIECES
        # Axes in the order of threads, and inputs in the same shape, so that each thread loads the inputs it needs.
        some, word = tl.arange(0, CHUNKS)[:, None], tl.arange(0, WORDS)[None, None]
        source = values + row[None].to(tl.int64)[:, :, None] * (chunks * WORDS) + word
        acc = tl.zeros((CHUNKS, row.shape[0]), tl.float32)
        for start in range(0, chunks, CHUNKS):
            chunk = start + some
            there = (chunk < chunks) & mine[None]
            tile = tl.load(source + chunk[:, :, None] * WORDS, mask=there[:, :, None], other=0)
            for p in tl.static_range(PARTS):
                product = tl.zeros((CHUNKS, row.shape[0], WORDS), tl.float32)
                sums = tl.zeros((CHUNKS, 1, WORDS), tl.float32)
                for j in tl.static_range(PIECES // PARTS):
                    at = chunk[:, :, None] * CHUNK + (p * (PIECES // PARTS) + j) * WORDS + word
                    value = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)
                    piece = _piece(tile, p * (PIECES // PARTS) + j, PIECES, E2M1, 0)
                    product += piece * (value * 2.0 ** (
                        77 if E2M1 else 100 - 32 // PIECES * (p * (PIECES // PARTS) + j) % 24))
                    sums += value
                part, total = tl.sum(product, 2) * 2.0 ** 49, tl.sum(sums, 2)
                if OFFSET > 0:
                    part -= OFFSET * total
                scale_at = (chunk // each * PARTS + p) * rows + row[None]
                if HAS_ZEROS:
                    part -= tl.load(zeros + scale_at, mask=there, other=0).to(tl.float32) * total
                acc += part * tl.load(scales + scale_at, mask=there, other=0.0).to(tl.float32)
        result = tl.sum(acc, 0)
    else:
        acc = tl.zeros((row.shape[0], CHUNKS), tl.float32)
        for start in range(0, chunks, CHUNKS):
            tile, scale = _float8_tile(values, scales, row, mine, rows, start, chunks, each, CHUNK, CHUNKS)
            acc += _float8_products(tile, scale, x, start, size)
        result = tl.sum(acc, 1)
    return result


@triton.jit
def _columns(tile):
    """The four columns of a tile, which are in a thread's registers anyway."""
    even, odd = tl.split(tl.reshape(tile, (tile.shape[0], 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _tile(values, scales, zeros, first, rows, start, chunks, each, PIECES: tl.constexpr, CHUNK: tl.constexpr,
          PARTS: tl.constexpr, HAS_ZEROS: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr,
          EVEN: tl.constexpr):
    """What a weight of integers has for ROWS rows from `first` on, in CHUNKS chunks from `start` on: the words of each
    row, [units, 4], and for each part of a chunk the scales and the zeros, [units, ROWS]. Units are in the order of
    threads, so that each thread loads what it needs by itself: 4 words of a row, or the scales of all rows, at once.
    What is behind the last chunk is multiplied by inputs of 0 and by a scale of 0, whatever it is."""
    WORDS: tl.constexpr = CHUNK // PIECES
    unit = tl.arange(0, CHUNKS * WORDS // 4)
    at = (start * WORDS + unit * 4)[:, None] + tl.arange(0, 4)[None]
    row, chunk = first + tl.arange(0, ROWS), start + unit // (WORDS // 4)
    words, scale, zero = (), (), ()
    for r in tl.static_range(ROWS):
        source = values + (first + r).to(tl.int64) * (chunks * WORDS) + at
        words += (tl.load(source) if EVEN else tl.load(source, mask=(at < chunks * WORDS) & (first + r < rows)),)
    for p in tl.static_range(PARTS):
        group = (chunk // each * PARTS + p)[:, None] * rows + row[None]
        real = (chunk < chunks)[:, None] & (row < rows)[None]
        scale += (tl.load(scales + group) if EVEN else tl.load(scales + group, mask=real, other=0.0),)
        if HAS_ZEROS:
            zero += (tl.load(zeros + group) if EVEN else tl.load(zeros + group, mask=real, other=0),)
    return words, scale, zero


@triton.jit
def _permute(low, high, picks):
    """Of the eight bytes of two words the four that the lowest hexadecimal digits of `picks` name; of those named by
    their number plus 8 the sign bit, eight times."""
    if COMPILED:
        out = tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, picks], dtype=tl.int32,
                                        is_pure=True, pack=1)
    else:
        out = low & 0
        for k in tl.static_range(4):
            pick = picks >> 4 * k
            byte = tl.where((pick & 4) == 0, low, high) >> (pick & 3) * 8 & 0xFF
            out |= tl.where((pick & 8) == 0, byte, (byte >> 7) * 0xFF) << 8 * k
    return out


@triton.jit
def _codes(words, NTH: tl.constexpr, PIECES: tl.constexpr, E2M1: tl.constexpr, PARTS: tl.constexpr):
    """Four pieces of each word as the bytes of a word. With E2M1, twice the numbers and 128."""
    if E2M1:
        sizes = _permute(tl.full(words.shape, -2088599168, tl.int32), -1937209724, words >> 16 * NTH & 0x7777)
        signs = _permute(words << 4, words, 0xFBEA if NTH == 1 else 0xD9C8)
        words = sizes - 2 * (sizes & signs & 0x7F7F7F7F)
    elif PIECES == 8:
        low, high = words & 0x0F0F0F0F, words >> 4 & 0x0F0F0F0F
        words = high if NTH == 1 else low
        if PARTS == 4:
            words = _permute(low, high, 0x7362 if NTH == 1 else 0x5140)
    return words


@triton.jit
def _dot(total, pairs, codes, HIGH: tl.constexpr, SIGNED: tl.constexpr):
    """total + the two numbers of 16 bits in each word of `pairs` times the lower or the higher two bytes of `codes`."""
    if COMPILED:
        total = tl.inline_asm_elementwise(
            ("dp2a.hi." if HIGH else "dp2a.lo.") + ("s32" if SIGNED else "u32") + ".u32 $0, $1, $2, $3;", "=r,r,r,r",
            [pairs, codes, total], dtype=tl.int32, is_pure=True, pack=1)
    else:
        two = codes >> 16 if HIGH else codes
        low, high = (pairs << 16 >> 16, pairs >> 16) if SIGNED else (pairs & 0xFFFF, pairs >> 16 & 0xFFFF)
        total = total + low * (two & 0xFF) + high * (two >> 8 & 0xFF)
    return total


@triton.jit
def _add(total, pairs, codes, NTH: tl.constexpr, PIECES: tl.constexpr, E2M1: tl.constexpr, PARTS: tl.constexpr,
         PART: tl.constexpr, SIGNED: tl.constexpr):
    """As _dot, with the NTH pairs of _fixed, of whose two pieces those count that are in the PART."""
    BYTE: tl.constexpr = 1 if E2M1 or PARTS == 4 else PIECES // 4
    WORD: tl.constexpr = 4 if E2M1 or PARTS == 4 else 1
    HALF: tl.constexpr = NTH // 4 % 2
    FIRST: tl.constexpr = BYTE * 2 * HALF + WORD * (NTH // 8)
    EACH: tl.constexpr = PIECES // PARTS
    if FIRST // EACH == PART or (FIRST + BYTE) // EACH == PART:
        if FIRST // EACH != PART:
            pairs = pairs & -65536
        elif (FIRST + BYTE) // EACH != PART:
            pairs = pairs & 0xFFFF
        total = _dot(total, pairs, codes, HALF == 1, SIGNED)
    return total


@triton.jit
def _inputs(start, NTH: tl.constexpr, PIECES: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """The numbers of the inputs that the NTH pieces of a tile's words are multiplied with, [units, 4]."""
    WORDS: tl.constexpr = CHUNK // PIECES
    unit = tl.arange(0, CHUNKS * WORDS // 4)
    first = (start + unit // (WORDS // 4)) * CHUNK + unit % (WORDS // 4) * 4
    return first[:, None] + (NTH * WORDS + tl.arange(0, 4))[None]


@triton.jit
def _row(x, start, size, PIECES: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """A row's values at _inputs, for each of the pieces."""
    values = ()
    for i in tl.static_range(PIECES):
        at = _inputs(start, i, PIECES, CHUNK, CHUNKS)
        values += (tl.load(x + at, mask=at < size, other=0.0),)
    return values


@triton.jit
def _times_gains(values, residual, gains, total, size, eps, PIECES: tl.constexpr, CHUNK: tl.constexpr,
                 CHUNKS: tl.constexpr, ADD: tl.constexpr):
    """A whole row times the gains of its norm, and the norm's factor, which outputs are multiplied by: no program waits
    for it. If there is something to add to the row, the first program stores the sum."""
    sums, products, squares = (), (), tl.zeros(values[0].shape, tl.float32)
    for i in tl.static_range(PIECES):
        value = values[i].to(tl.float32)
        if ADD:
            value = (value + residual[i].to(tl.float32)).to(total.dtype.element_ty).to(tl.float32)
        squares += value * value
        sums += (value,)
        products += (value * gains[i].to(tl.float32),)
    if ADD:  # noqa: SIM102 (at compile time)
        if tl.program_id(0) == 0:
            for i in tl.static_range(PIECES):
                at = _inputs(0, i, PIECES, CHUNK, CHUNKS)
                tl.store(total + at, sums[i].to(total.dtype.element_ty), mask=at < size)
    return products, 1.0 / tl.sqrt(tl.sum(tl.sum(squares, 1), 0) / size + eps)


@triton.jit
def _fixed(row, PIECES: tl.constexpr, PARTS: tl.constexpr, E2M1: tl.constexpr, LIMBS: tl.constexpr):
    """The inputs of a tile's units, as of _row, as fixed-point numbers of LIMBS times 16 bits, relative to the largest
    of a unit: pairs of those that two pieces of a word meet, for each limb and each column [units]. Their sums over
    each part, for each limb [units]. What they are to be multiplied by, [units]; NaN if an input is not finite."""
    UNITS: tl.constexpr = row[0].shape[0]
    values, largest = (), tl.full((UNITS, 4), 47 << 23, tl.int32)  # as an fp32 number 2^-80
    for i in tl.static_range(PIECES):
        value = row[i].to(tl.float32)
        largest = tl.maximum(largest, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)  # NaN is above all
        values += (value,)
    top = tl.max(largest, 1)
    power = top & 0x7F800000
    scale, top = power.to(tl.float32, bitcast=True) * 2.0 ** -14, top.to(tl.float32, bitcast=True)
    scale += top - top
    factor = ((254 << 23) - power + (14 << 23)).to(tl.float32, bitcast=True)[:, None]
    numbers = ()
    for i in tl.static_range(PIECES):
        if LIMBS == 1:  # the lowest bits of an fp32 number near 1.5 * 2^23 are an integer
            numbers += ((values[i] * factor + 12582912.0).to(tl.int32, bitcast=True),)
        else:
            numbers += ((values[i] * (factor * 65536.0)).to(tl.int32),)
    # Which piece is the byte k of the nth word of codes: BYTE * k + WORD * n.
    BYTE: tl.constexpr = 1 if E2M1 or PARTS == 4 else PIECES // 4
    WORD: tl.constexpr = 4 if E2M1 or PARTS == 4 else 1
    pairs, sums = (), ()
    for limb in tl.static_range(LIMBS):
        for b in tl.static_range(PIECES // 4):
            for h in tl.static_range(2):
                low, high = numbers[BYTE * 2 * h + WORD * b], numbers[BYTE * (2 * h + 1) + WORD * b]
                if limb < LIMBS - 1:
                    pairs += _columns((low >> 16 & 0xFFFF) | (high & -65536))
                else:
                    pairs += _columns((low & 0xFFFF) | high << 16)
        for p in tl.static_range(PARTS):
            total = tl.zeros((UNITS,), tl.int32)
            for i in tl.static_range(PIECES * 2):
                total = _add(total, pairs[limb * PIECES * 2 + i], 0x01010101, i, PIECES, E2M1, PARTS, p, limb == 0)
            sums += (total,)
    return pairs, sums, scale


@triton.jit
def _products(acc, words, scale, zero, pairs, sums, factor, PIECES: tl.constexpr, OFFSET: tl.constexpr,
              E2M1: tl.constexpr, PARTS: tl.constexpr, HAS_ZEROS: tl.constexpr, LIMBS: tl.constexpr):
    """acc [units, ROWS] and the products of a tile."""
    row, codes, found = tl.arange(0, acc.shape[1])[None], (), tl.zeros(acc.shape, tl.float32)
    for r in tl.static_range(acc.shape[1]):
        columns = _columns(words[r])
        for i in tl.static_range(PIECES):
            codes += (_codes(columns[i % 4], i // 4, PIECES, E2M1, PARTS),)
    for p in tl.static_range(PARTS):
        part = tl.zeros(acc.shape, tl.float32)
        for limb in tl.static_range(LIMBS):
            sum = sums[limb * PARTS + p]
            whole = tl.zeros(acc.shape, tl.int32)
            for r in tl.static_range(acc.shape[1]):
                total = sum * (-128 if E2M1 else -OFFSET)
                for i in tl.static_range(PIECES * 2):
                    total = _add(total, pairs[limb * PIECES * 2 + i], codes[r * PIECES + i // 8 * 4 + i % 4], i, PIECES,
                                 E2M1, PARTS, p, limb == 0)
                whole = tl.where(row == r, total[:, None], whole)
            if HAS_ZEROS:  # noqa: SIM102 (at compile time)
                if zero[p].dtype == tl.uint8:
                    whole -= zero[p].to(tl.int32) * sum[:, None]
            some = whole.to(tl.float32)
            if HAS_ZEROS:  # noqa: SIM102
                if zero[p].dtype != tl.uint8:
                    some -= zero[p].to(tl.float32) * sum.to(tl.float32)[:, None]
            part = part * 65536.0 + some if limb > 0 else some
        found += part * scale[p].to(tl.float32)
    return acc + found * (factor * 2.0 ** ((15 if E2M1 else 16) - 16 * LIMBS))[:, None]


@triton.jit
def _one_row(x, residual, norm, values, scales, zeros, bias, total, out, rows, size, chunks, each, eps,
             PIECES: tl.constexpr, OFFSET: tl.constexpr, E2M1: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr,
             HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr,
             LIMBS: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr,
             PDL: tl.constexpr):
    """For integers. The weights are ready before the inputs are, so the first tile is read while the kernel before this
    one ends, and each further tile while the one before it is multiplied. WHOLE: a tile has all chunks, so the inputs
    stay in registers while a program goes on to other outputs. EVEN: and no more, and no tile has rows behind the last.
    NORM is used with WHOLE alone."""
    begin, step = tl.program_id(0) * ROWS, tl.num_programs(0) * ROWS
    words, scale, zero = _tile(values, scales, zeros, begin, rows, 0, chunks, each, PIECES, CHUNK, PARTS, HAS_ZEROS,
                               ROWS, CHUNKS, EVEN)
    if NORM:
        gains = _row(norm, 0, size, PIECES, CHUNK, CHUNKS)
    wait_for_inputs(PDL)
    if WHOLE:
        inputs = _row(x, 0, size, PIECES, CHUNK, CHUNKS)
        if NORM:
            added = _row(residual, 0, size, PIECES, CHUNK, CHUNKS) if ADD else inputs
            inputs, normed = _times_gains(inputs, added, gains, total, size, eps, PIECES, CHUNK, CHUNKS, ADD)
        pairs, sums, factor = _fixed(inputs, PIECES, PARTS, E2M1, LIMBS)
    for first in range(begin, rows, step):
        acc = tl.zeros((CHUNKS * CHUNK // PIECES // 4, ROWS), tl.float32)
        for start in range(0, 1 if WHOLE else chunks, CHUNKS):
            if not WHOLE:
                pairs, sums, factor = _fixed(_row(x, start, size, PIECES, CHUNK, CHUNKS), PIECES, PARTS, E2M1, LIMBS)
            ends = start + CHUNKS >= chunks
            after = tl.where(ends, first + step, first)
            if EVEN:  # the last tile is read once more
                after = tl.where(after < rows, after, first)
            more, more_scale, more_zero = _tile(
                values, scales, zeros, after, rows, tl.where(ends, 0, start + CHUNKS), chunks, each, PIECES, CHUNK,
                PARTS, HAS_ZEROS, ROWS, CHUNKS, EVEN)
            acc = _products(acc, words, scale, zero, pairs, sums, factor, PIECES, OFFSET, E2M1, PARTS,
                            HAS_ZEROS, LIMBS)
            words, scale, zero = more, more_scale, more_zero
        row = first + tl.arange(0, ROWS)
        result = tl.sum(acc, 0)
        if NORM:
            result *= normed
        if HAS_BIAS:
            result += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)
        tl.store(out + row, result.to(out.dtype.element_ty), mask=row < rows)


@triton.jit
def _one_float8_row(x, values, scales, bias, out, rows, size, chunks, each, CHUNK: tl.constexpr, HAS_BIAS: tl.constexpr,
                    ROWS: tl.constexpr, CHUNKS: tl.constexpr, PDL: tl.constexpr):
    """As _one_row, but only the first tile is read ahead: many programs at once, each of few registers, are faster."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mine = row < rows
    tile, scale = _float8_tile(values, scales, row, mine, rows, 0, chunks, each, CHUNK, CHUNKS)
    wait_for_inputs(PDL)
    acc = _float8_products(tile, scale, x, 0, size)
    for start in range(CHUNKS, chunks, CHUNKS):
        tile, scale = _float8_tile(values, scales, row, mine, rows, start, chunks, each, CHUNK, CHUNKS)
        acc += _float8_products(tile, scale, x, start, size)
    result = tl.sum(acc, 1)
    if HAS_BIAS:
        result += tl.load(bias + row, mask=mine, other=0.0).to(tl.float32)
    tl.store(out + row, result.to(out.dtype.element_ty), mask=mine)


@triton.jit
def chunk_product(acc, tile, inputs, real, size, scales, zeros, row, mine, rows, chunk, each, PIECES: tl.constexpr,
                  OFFSET: tl.constexpr, E2M1: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr,
                  HAS_ZEROS: tl.constexpr, PRECISION: tl.constexpr):
    """acc [weight's rows, rows of inputs] and what a chunk's tile of words adds to it. inputs: where each row of inputs
    begins, [1, rows of inputs], of which those count that are `real`. The rest is as of row_product. A weight is the
    first factor of a product, since tensor cores take that one from registers."""
    WORDS: tl.constexpr = tile.shape[1]
    word = tl.arange(0, WORDS)
    for p in tl.static_range(PARTS):
        total = tl.zeros((acc.shape[1],), tl.float32)
        if PIECES == 0:
            at = chunk * CHUNK + word
            value = tl.load(inputs + at[:, None], mask=real[None] & (at < size)[:, None], other=0.0)
            part = tl.dot(tile.to(tl.float32).to(value.dtype), value, input_precision=PRECISION)
        else:
            part = tl.zeros((acc.shape[0], acc.shape[1]), tl.float32)
            sums = tl.zeros((WORDS, acc.shape[1]), tl.float32)
            for j in tl.static_range(PIECES // PARTS):
                at = chunk * CHUNK + (p * (PIECES // PARTS) + j) * WORDS + word
                value = tl.load(inputs + at[:, None], mask=real[None] & (at < size)[:, None], other=0.0)
                weight = _piece(tile, p * (PIECES // PARTS) + j, PIECES, E2M1, 126)
                if value.dtype == tl.float16:  # whose smallest number is larger
                    weight = weight * 2.0 ** 23
                part = tl.dot(weight.to(value.dtype), value, part, input_precision=PRECISION)
                sums += value.to(tl.float32)
            total = tl.sum(sums, 0)
            if inputs.dtype.element_ty != tl.float16:
                part = part * 2.0 ** 23
            if OFFSET > 0:
                part -= OFFSET * total[None]
        scale_at = (chunk // each * PARTS + p) * rows + row
        if HAS_ZEROS:
            part -= tl.load(zeros + scale_at, mask=mine, other=0).to(tl.float32)[:, None] * total[None]
        acc += part * tl.load(scales + scale_at, mask=mine, other=0.0).to(tl.float32)[:, None]
    return acc


@triton.jit
def dequantized_product(acc, values, inputs, real, size, scales, zeros, row, mine, rows, chunks, each,
                        PIECES: tl.constexpr, OFFSET: tl.constexpr, E2M1: tl.constexpr, CHUNK: tl.constexpr,
                        PARTS: tl.constexpr, HAS_ZEROS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr):
    """acc and the whole product, for many rows of inputs. Arguments are as of chunk_product. A tile of weights is
    dequantised before it is multiplied, so that it may have several pieces of its words."""
    SIZE: tl.constexpr = CHUNK // PARTS if CHUNK // PARTS < 64 else 64
    WORDS: tl.constexpr = CHUNK // PIECES if PIECES > 0 else SIZE
    kind = inputs.dtype.element_ty
    source = values + row.to(tl.int64)[:, None] * (chunks * (CHUNK // PIECES if PIECES > 0 else CHUNK))
    source += tl.arange(0, WORDS)[None]
    for step in tl.range(0, chunks * (CHUNK // SIZE), num_stages=STAGES):
        if PIECES == 0:
            weight = tl.load(source + step * SIZE, mask=mine[:, None], other=0.0).to(tl.float32)
        else:
            words = tl.load(source + step * SIZE // CHUNK * WORDS, mask=mine[:, None], other=0)
            place = step * SIZE % CHUNK // WORDS + tl.arange(0, SIZE // WORDS)
            codes = tl.reshape(words[:, None] >> (place * (32 // PIECES))[None, :, None], (acc.shape[0], SIZE))
            if E2M1:
                weight = ((codes & 7) << 22 | (codes & 8) << 28).to(tl.float32, bitcast=True) * 2.0 ** 126
            else:  # the lowest bits of an fp32 number above 2^23 are an integer
                codes = codes & (1 << 32 // PIECES) - 1 | 0x4B000000
                weight = codes.to(tl.float32, bitcast=True) - (8388608.0 + OFFSET)
        scale_at = step * SIZE // (CHUNK // PARTS) // each * rows + row
        if HAS_ZEROS:
            weight -= tl.load(zeros + scale_at, mask=mine, other=0).to(tl.float32)[:, None]
        weight *= tl.load(scales + scale_at, mask=mine, other=0.0).to(tl.float32)[:, None]
        at = step * SIZE + tl.arange(0, SIZE)
        value = tl.load(inputs + at[:, None], mask=real[None] & (at < size)[:, None], other=0.0)
        acc = tl.dot(weight.to(kind), value, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _few_rows(x, values, scales, zeros, bias, out, parts, ended, count, x_stride, rows, size, chunks, each, splits,
              PIECES: tl.constexpr, OFFSET: tl.constexpr, E2M1: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr,
              HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr, SHARED: tl.constexpr, ROWS: tl.constexpr,
              BLOCK_M: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr):
    """Several programs share an output's inputs; the last of them to end adds what they found."""
    block, split = tl.program_id(0), tl.program_id(1)
    row, m = block * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_M)
    mine, real = row < rows, m < count
    WORDS: tl.constexpr = CHUNK // PIECES if PIECES > 0 else CHUNK
    word = tl.arange(0, WORDS)
    source = values + row.to(tl.int64)[:, None] * (chunks * WORDS) + word[None]
    inputs = x + m.to(tl.int64)[None] * x_stride
    acc = tl.zeros((ROWS, BLOCK_M), tl.float32)
    share = tl.cdiv(chunks, splits)
    wait_for_inputs(PDL)
    first = split * share
    for chunk in tl.range(first, tl.minimum(first + share, chunks), num_stages=4 if BLOCK_M == 16 else 2):
        tile = tl.load(source + chunk * WORDS, mask=mine[:, None], other=0 if PIECES > 0 else 0.0)
        acc = chunk_product(acc, tile, inputs, real, size, scales, zeros, row, mine, rows, chunk, each, PIECES, OFFSET,
                            E2M1, CHUNK, PARTS, HAS_ZEROS, PRECISION)
    last = split == 0
    if SHARED:
        inner = tl.arange(0, ROWS)[:, None] * BLOCK_M + m[None]
        place, step = parts + block * (ROWS * BLOCK_M) + inner, tl.num_programs(0) * (ROWS * BLOCK_M)
        tl.store(place + split * step, acc)
        tl.debug_barrier()  # all threads have stored before one of them counts the program as ended
        last = tl.atomic_add(ended + block, 1) == splits - 1
        if last:
            acc = tl.zeros((ROWS, BLOCK_M), tl.float32)
            for other in range(splits):
                acc += tl.load(place + other * step, cache_modifier=".cg")
            tl.store(ended + block, 0)
    if last:
        if HAS_BIAS:
            acc += tl.load(bias + row, mask=mine, other=0.0).to(tl.float32)[:, None]
        into = out + m.to(tl.int64)[None] * rows + row[:, None]
        tl.store(into, acc.to(out.dtype.element_ty), mask=real[None] & mine[:, None])


@triton.jit
def _round_rows(x, out, scales, size, width, x_stride, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_for_inputs(PDL)
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    value = tl.load(x + row * x_stride + at, mask=at < size, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(value), 0) / 448.0, 1e-12)
    value = tl.minimum(tl.maximum(value / scale, -448.0), 448.0)
    tl.store(out + row * width + at, value.to(tl.float8e4nv), mask=at < width)
    tl.store(scales + row, scale)


def round_rows(x: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [n, in], contiguous rows -> x / scale in float8_e4m3fn, [n, width] with zeros behind the inputs, and the scales
    of the rows, [n, 1] fp32."""
    out = torch.empty(len(x), width, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    _round_rows[(len(x),)](x, out, scales, x.shape[1], width, x.stride(0), BLOCK=block,
                           num_warps=min(max(block // 1024, 1), 16), **launch_options(x))
    return out, scales


def one_row_tile(weight: FewBits, outputs: int) -> Tile:
    """Outputs of a program, chunks of its tile, and its warps, for one row of inputs. It is what was fastest on an H200
    (benchmarks/gpu.py few_bits)."""
    if weight.pieces:
        width = min(triton.next_power_of_2(weight.chunks), _CHUNKS_AT_ONCE)
        if weight.pieces == 8:
            return Tile(8 if width <= 64 else 4, width, min(max(width // 8, 1), 8))
        return Tile(2, width, min(max(width // 16, 1), 8))
    return Tile(16, 1024 // weight.chunk, 4) if outputs >= 16384 else Tile(8, 2048 // weight.chunk, 8)


def one_row(x: torch.Tensor, weight: FewBits, bias: torch.Tensor | None, *, norm: Norm | None = None,
            tile: Tile | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """As gemv, with x in the weight's order. Only a weight that `takes_norm` is given a norm, which has no `out`. The
    columns of `tile` are chunks."""
    assert norm is None or (weight.takes_norm and norm.out is None)
    rows, size, chunks = len(weight.values), x.shape[1], weight.chunks
    tile = tile or one_row_tile(weight, rows)
    out = torch.empty(1, rows, dtype=x.dtype, device=x.device)
    gains, eps, residual, _ = norm or Norm(x, 0.0)
    total, added = (x, x) if residual is None else (torch.empty_like(x), residual)
    bias_or_any = weight.scales if bias is None else bias
    shape = {"HAS_BIAS": bias is not None, "ROWS": tile.rows, "CHUNKS": tile.columns, "num_warps": tile.warps,
             **launch_options(x)}
    blocks = triton.cdiv(rows, tile.rows)
    if weight.pieces:
        most = max(4 * programs_at_once(x.device) // tile.warps, 1)  # 16 warps for each multiprocessor
        programs = triton.cdiv(blocks, triton.cdiv(blocks, most))  # that have as many outputs as each other
        _one_row[(programs,)](
            x, added, gains, weight.values, weight.scales, weight.zeros_or_any, bias_or_any, total, out, rows, size,
            chunks, weight.each, eps, NORM=norm is not None, ADD=residual is not None, WHOLE=tile.columns >= chunks,
            EVEN=tile.columns == chunks and rows % tile.rows == 0, LIMBS=2 if x.dtype == torch.float32 else 1,
            **weight.form, **shape)
    else:
        _one_float8_row[(blocks,)](x, weight.values, weight.scales, bias_or_any, out, rows, size, chunks, weight.each,
                                   CHUNK=weight.chunk, **shape)
    return out, total


def multiply(x: torch.Tensor, weight: FewBits, bias: torch.Tensor | None, *, rows: int = 0, splits: int = 0,
             warps: int = 0) -> torch.Tensor:
    """x [n, in], contiguous rows in the weight's order, of at most MOST_ROWS rows -> [n, out]; sums are fp32.

    Args:
        rows, splits, warps: outputs of a program, programs that share an output, and warps; 0 takes what was fastest on
            an H200 (benchmarks/gpu.py few_bits). One row of inputs ignores them.
    """
    if len(x) == 1:
        return one_row(x, weight, bias)[0]
    n, size = x.shape
    out = torch.empty(n, len(weight.values), dtype=x.dtype, device=x.device)
    chunks = weight.chunks
    rows = rows or (128 if weight.pieces == 4 and n <= 16 else 64)
    blocks = triton.cdiv(out.shape[1], rows)
    splits = splits or max(min(_PROGRAMS // blocks, chunks), 1)
    block_m = max(triton.next_power_of_2(n), 16)
    size_of_parts = splits * blocks * rows * block_m if splits > 1 else 1
    shared = torch.empty(size_of_parts, dtype=torch.float32, device=x.device)
    _few_rows[(blocks, splits)](
        x, weight.values, weight.scales, weight.zeros_or_any,
        weight.scales if bias is None else bias, out, shared, weight.ended, n, x.stride(0), out.shape[1], size, chunks,
        weight.each, splits, HAS_BIAS=bias is not None, SHARED=splits > 1, ROWS=rows, BLOCK_M=block_m,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32", num_warps=warps or 4, **weight.form,
        **launch_options(x))
    return out
