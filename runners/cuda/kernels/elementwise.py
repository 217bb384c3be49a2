"""Small fused operations: norms, rotary embedding, SiLU-mul. Each reads its input once; arithmetic is fp32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hal.contracts.inputs import PagedModelInput
from runners.cuda.kernels.launch import launch_options, wait_for_inputs


@triton.jit
def scaled(value, scale, gains, KIND: tl.constexpr):
    """fp32 values times a norm's factor, times the gains, which are not of fp32 unless the model's norms are."""
    value = value * scale
    if gains.dtype == KIND:  # rounded here, as transformers does
        value = value.to(KIND)
    return value * gains


@triton.jit
def _normed(value, size, eps, gains, KIND: tl.constexpr):
    return scaled(value, 1.0 / tl.sqrt(tl.sum(value * value) / size + eps), gains, KIND)


@triton.jit
def _rms_norm(x, weight, out, stride, inner_stride, inner, size, eps, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_for_inputs(PDL)
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    here = at < size
    start = (row // inner).to(tl.int64) * stride + (row % inner) * inner_stride
    value = tl.load(x + start + at, mask=here, other=0.0).to(tl.float32)
    gains = tl.load(weight + at, mask=here, other=0.0)
    tl.store(out + row.to(tl.int64) * size + at, _normed(value, size, eps, gains, out.dtype.element_ty), mask=here)


@triton.jit
def _add_rms_norm(x, residual, weight, out, total, size, eps, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_for_inputs(PDL)
    start = tl.program_id(0).to(tl.int64) * size
    at = tl.arange(0, BLOCK)
    here = at < size
    value = tl.load(x + start + at, mask=here, other=0.0).to(tl.float32)
    value += tl.load(residual + start + at, mask=here, other=0.0).to(tl.float32)
    rounded = value.to(out.dtype.element_ty)
    tl.store(total + start + at, rounded, mask=here)
    gains = tl.load(weight + at, mask=here, other=0.0)
    tl.store(out + start + at, _normed(rounded.to(tl.float32), size, eps, gains, out.dtype.element_ty), mask=here)


@triton.jit
def _rotary(x, positions, table, out, stride, heads, HALF: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
            PDL: tl.constexpr):
    wait_for_inputs(PDL)
    token, head = tl.program_id(0), tl.program_id(1)
    at = tl.arange(0, BLOCK)
    here = at < HALF
    angle = tl.load(positions + token).to(tl.int64) * (2 * HALF) + at
    cos = tl.load(table + angle, mask=here, other=0.0).to(DTYPE).to(tl.float32)  # rounded, as transformers does
    sin = tl.load(table + angle + HALF, mask=here, other=0.0).to(DTYPE).to(tl.float32)
    source = x + token.to(tl.int64) * stride + head * (2 * HALF) + at
    first = tl.load(source, mask=here, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=here, other=0.0).to(tl.float32)
    into = out + (token.to(tl.int64) * heads + head) * (2 * HALF) + at
    tl.store(into, (first * cos - second * sin).to(DTYPE), mask=here)
    tl.store(into + HALF, (second * cos + first * sin).to(DTYPE), mask=here)


@triton.jit
def _silu_mul(gate_up, out, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = at < size
    gate = tl.load(gate_up + row * 2 * size + at, mask=here, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + at, mask=here, other=0.0)
    silu = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty)
    tl.store(out + row * size + at, silu * up, mask=here)


@triton.jit
def _resolve(input_ids, pending, last, out, count, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_for_inputs(PDL)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = at < count
    row = tl.load(pending + at, mask=here, other=-1)
    known = tl.load(input_ids + at, mask=here)
    tl.store(out + at, tl.where(row < 0, known, tl.load(last + row, mask=here & (row >= 0), other=0)), mask=here)


@triton.jit(do_not_specialize=["count", "width", "place", "steps"])
def _advance(tokens, stop_ids, max_new, input_ids, positions, slots, seq_lens, pending, tables, going, counts, out,
             count, width, place, steps, SIZE: tl.constexpr, STOPS: tl.constexpr, BLOCK: tl.constexpr,
             PDL: tl.constexpr):
    wait_for_inputs(PDL)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = at < count
    token = tl.load(tokens + at, mask=here, other=-1)
    tl.store(out + at * steps + place, token, mask=here)
    goes = tl.load(going + at, mask=here, other=0)
    tl.store(counts + at, tl.load(counts + at, mask=here, other=0) + goes, mask=here)
    goes = tl.where((token < 0) | (place + 1 >= tl.load(max_new + at, mask=here, other=0)), 0, goes)
    for i in tl.static_range(STOPS):
        goes = tl.where(tl.load(stop_ids + at * STOPS + i, mask=here, other=-1) == token, 0, goes)
    tl.store(going + at, goes, mask=here)
    place_of = tl.load(seq_lens + at, mask=here, other=0)  # the next token's position
    column = place_of // SIZE
    block = tl.load(tables + at.to(tl.int64) * width + column, mask=here & (goes != 0), other=0)
    tl.store(slots + at, tl.where(goes != 0, (block - column) * SIZE + place_of, 0), mask=here)
    tl.store(input_ids + at, tl.where(goes != 0, token, 0), mask=here)
    tl.store(positions + at, tl.maximum(place_of + goes - 1, 0), mask=here)
    tl.store(seq_lens + at, place_of + goes, mask=here)
    tl.store(pending + at, tl.full((BLOCK,), -1, tl.int32), mask=here)


def _warps(block: int) -> int:
    return min(max(block // 512, 1), 16)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [rows, size], or [n, heads, size] with gaps between the first dimension's entries; contiguous result."""
    size = x.shape[-1]
    inner = x.shape[1] if x.ndim == 3 else 1
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(size)
    _rms_norm[(x.shape[0] * inner,)](x, weight, out, x.stride(0), x.stride(1) if x.ndim == 3 else 0, inner, size, eps,
                                     BLOCK=block, num_warps=_warps(block), **launch_options(x))
    return out


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float,
                 ) -> tuple[torch.Tensor, torch.Tensor]:
    """x and residual, both [..., size] and contiguous -> the norm of their sum, and the sum."""
    out, total = torch.empty_like(x), torch.empty_like(x)
    size = x.shape[-1]
    block = triton.next_power_of_2(size)
    _add_rms_norm[(x.numel() // size,)](x, residual, weight, out, total, size, eps, BLOCK=block,
                                 num_warps=_warps(block), **launch_options(x))
    return out, total


def rotary(heads: torch.Tensor, positions: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """heads [n, heads, head_dim], tokens may have gaps; positions [n] int32; table [max_position, head_dim] fp32."""
    n, count, dim = heads.shape
    out = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    _rotary[(n, count)](heads, positions, table, out, heads.stride(0), count, HALF=dim // 2, DTYPE=_TYPES[heads.dtype],
                        BLOCK=triton.next_power_of_2(dim // 2), num_warps=1, **launch_options(heads))
    return out


def resolve(input_ids: torch.Tensor, pending: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """The result of PendingTokens.input_ids, int32 [n]: an entry of `last` where pending [n] is not negative."""
    n, out = len(input_ids), torch.empty_like(input_ids)
    _resolve[(triton.cdiv(n, 256),)](input_ids, pending, last, out, n, BLOCK=256, num_warps=4, **launch_options(out))
    return out


def advance(m: PagedModelInput, tokens: torch.Tensor, stop_ids: torch.Tensor, max_new: torch.Tensor,
            going: torch.Tensor, counts: torch.Tensor, out: torch.Tensor, place: int) -> None:
    """ModelInput.advance in place, in one launch, for the fields that a graph of decode steps reads; and where each
    sequence ends, as hal.paged.steps.goes_on has it.

    Args:
        m: the input of this step, which becomes that of the next. tokens: int32 [n] of this step, of the first n rows.
        stop_ids, max_new: as in the input. place: the number of this step, from 0.
        going, counts: int32 [n], which sequences took this step, and how many steps they took before; changed.
        out: int32 [n, steps], of which column `place` takes the tokens.
    """
    n = len(tokens)
    _advance[(triton.cdiv(n, 128),)](tokens, stop_ids, max_new, m.input_ids, m.positions, m.slot_mapping, m.seq_lens,
                                     m.pending_rows, m.block_tables, going, counts, out, n, m.block_tables.shape[1],
                                     place, out.shape[1], SIZE=m.block_size, STOPS=stop_ids.shape[1], BLOCK=128,
                                     num_warps=4, **launch_options(out))


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[n, 2 * m] contiguous -> [n, m]."""
    n, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(n, size, dtype=gate_up.dtype, device=gate_up.device)
    _silu_mul[(n, triton.cdiv(size, 1024))](gate_up, out, size, BLOCK=1024, num_warps=4,
                                                 **launch_options(gate_up))
    return out


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
