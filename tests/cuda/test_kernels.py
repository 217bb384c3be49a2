"""The Triton kernels against plain PyTorch and against attention one query at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_paged_attention import draw_tensors, make_cache, one_by_one, specs_of

from hal.inputs import PagedModelInput
from hal.models.ops import Ops
from hal.testing.strategies import instances

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # else the interpreter
EXAMPLES = 60 if DEVICE.type == "cuda" else 25
MATRIX = (4096, 896) if DEVICE.type == "cuda" else (20, 5000)  # many programs; or a few, and several tiles in a row
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE.type == "cuda" else [])
TOLERANCE = {torch.float32: 3e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def close(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    allowed = TOLERANCE[dtype]
    torch.testing.assert_close(got.double().cpu(), expected.double().cpu(), atol=allowed, rtol=allowed)


def moved(m: PagedModelInput) -> PagedModelInput:
    return PagedModelInput.decode(m.encode(), DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(m=instances(PagedModelInput, min_size=1), seed=st.integers(0, 2**31), dim=st.sampled_from((8, 64, 80, 128)),
       heads=st.sampled_from(((4, 4), (6, 2), (4, 1), (1, 1))), windows=st.sampled_from(((None,), (3,), (17, None))),
       splits=st.sampled_from((1, 2, 5)))
@settings(max_examples=EXAMPLES, deadline=None)
def test_attention(dtype: torch.dtype, m: PagedModelInput, seed: int, dim: int, heads: tuple[int, int],
                   windows: tuple[int | None, ...], splits: int) -> None:
    from runners.cuda.attention import CudaAttention

    specs = specs_of(*heads, dim, windows)
    attention = CudaAttention(specs, device=DEVICE, dtype=dtype)
    attention.dtype = dtype
    attention.splits = lambda *_: splits
    caches = [make_cache(attention, m, seed + i) for i in range(len(specs))]
    on_device = [cache.to(DEVICE) for cache in caches]
    step = attention.begin(moved(m), on_device)
    for layer, spec in enumerate(specs):
        q, k, v = draw_tensors(m, spec, seed - layer, dtype)
        got = step(layer, *(x.to(DEVICE) for x in (q, k, v)))
        close(got, one_by_one(m, caches[layer], spec, q, k, v), dtype)
        slots, size = m.slot_mapping.long(), m.block_size
        for which, new in ((0, k), (1, v)):
            caches[layer][which, slots // size, :, slots % size] = new
        assert torch.equal(on_device[layer].cpu(), caches[layer])


@given(m=instances(PagedModelInput, min_size=1), seed=st.integers(0, 2**31), seqs=st.integers(0, 3),
       tokens=st.integers(0, 5), blocks=st.integers(0, 3))
@settings(max_examples=EXAMPLES, deadline=None)
def test_padding(m: PagedModelInput, seed: int, seqs: int, tokens: int, blocks: int) -> None:
    from runners.cuda.attention import CudaAttention

    spec, dims = specs_of(4, 2, 64, (None,))[0], m.dims
    attention = CudaAttention([spec], device=DEVICE, dtype=torch.float32)
    attention.dtype = torch.float32
    wide = m.padded(num_seqs=dims["num_seqs"] + seqs, num_tokens=dims["num_tokens"] + tokens,
                    max_blocks=dims["max_blocks"] + blocks)
    cache = make_cache(attention, m, seed).to(DEVICE)
    padded = cache.clone()
    q, k, v = (x.to(DEVICE) for x in draw_tensors(m, spec, seed, torch.float32))
    more = [torch.cat([x, torch.full_like(x[:1], 7.0).expand(tokens, -1, -1)]) for x in (q, k, v)]
    real = attention.begin(moved(m), [cache])(0, q, k, v)
    got = attention.begin(moved(wide), [padded])(0, *more)
    close(got[:len(q)], real, torch.float32)
    assert got.isfinite().all() and torch.equal(padded[:, 1:], cache[:, 1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [64, 96, 896, 4096])
def test_norms(dtype: torch.dtype, size: int) -> None:
    from runners.cuda.ops import CudaOps

    ours, plain, generator = CudaOps(), Ops(), torch.Generator().manual_seed(size)
    x, r = (torch.randn(5, size, generator=generator).to(DEVICE, dtype) for _ in range(2))
    weight = torch.rand(size, generator=generator).to(DEVICE, dtype)
    close(ours.rms_norm(x, weight, 1e-5), plain.rms_norm(x, weight, 1e-5), dtype)
    for a, b in zip(ours.add_rms_norm(x, r, weight, 1e-5), plain.add_rms_norm(x, r, weight, 1e-5), strict=True):
        close(a, b, dtype)
    heads = torch.randn(5, 6, 32, generator=generator).to(DEVICE, dtype)
    close(ours.rms_norm(heads[:, :4], weight[:32], 1e-5), plain.rms_norm(heads[:, :4], weight[:32], 1e-5), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 80, 128])
def test_rotary_and_silu(dtype: torch.dtype, dim: int) -> None:
    from runners.cuda.ops import CudaOps

    ours, plain, generator = CudaOps(), Ops(), torch.Generator().manual_seed(dim)
    qkv = torch.randn(7, 8, dim, generator=generator).to(DEVICE, dtype)
    positions = torch.randint(0, 50, (7,), generator=generator).int().to(DEVICE)
    table = torch.randn(50, dim, generator=generator).to(DEVICE)
    got, expected = (ops.rotary(qkv[:, :6], ops.begin_rotary(positions, table, dtype)) for ops in (ours, plain))
    close(got, expected, dtype)
    gate_up = torch.randn(7, 2 * 1500, generator=generator).to(DEVICE, dtype)
    close(ours.silu_mul(gate_up), plain.silu_mul(gate_up), dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("rows", "size"), [(7, 64), (130, 1000), MATRIX])
def test_gemv(dtype: torch.dtype, rows: int, size: int) -> None:
    from runners.cuda.kernels.gemv import TILES, gemv

    generator = torch.Generator().manual_seed(rows)
    weight, x, bias = (torch.randn(*shape, generator=generator).div(8).to(DEVICE, dtype)
                       for shape in ((rows, size), (1, size), (rows,)))
    expected = x.double() @ weight.double().t()
    for tile in TILES:
        close(gemv(x, weight, None, tile), expected, dtype)
        close(gemv(x, weight, bias, tile), expected + bias.double(), dtype)
        if rows % 2 == 0:
            gate, up = expected.chunk(2, -1)
            close(gemv(x, weight, None, tile, gated=True), torch.nn.functional.silu(gate) * up, dtype)
