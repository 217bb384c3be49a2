"""The Triton kernels against plain PyTorch and against attention one query at a time."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_paged_attention import draw_tensors, make_cache, one_by_one, specs_of

from hal.contracts.advance import Taken
from hal.contracts.attention import AttentionSpec
from hal.contracts.inputs import PagedModelInput
from hal.features.stopping import STOP_IDS
from hal.model_config import ExpertsConfig
from hal.models.ops import HeadNorms, Ops
from hal.paged.steps import goes_on
from hal.testing.strategies import instances
from hal.weights.grid import Grid

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # else the interpreter
EXAMPLES = int(os.environ.get("HAL_EXAMPLES", 60 if DEVICE.type == "cuda" else 16))  # few, under compute-sanitizer
MATRIX = (4096, 896) if DEVICE.type == "cuda" else (20, 5000)  # many programs; or a few, and several tiles in a row
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE.type == "cuda" else [])
TOLERANCE = {torch.float32: 3e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def close(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    allowed = TOLERANCE[dtype]
    torch.testing.assert_close(got.double().cpu(), expected.double().cpu(), atol=allowed, rtol=allowed)


def moved(m: PagedModelInput) -> PagedModelInput:
    return PagedModelInput.from_buffer(m.to_buffer(), DEVICE)


def unknown(m: PagedModelInput) -> PagedModelInput:
    """As the input that a graph of prompts is captured with."""
    m = copy.copy(m)
    m.max_query_len = m.num_decode_seqs = 0
    return m


def divide(attention: Any, splits: int, early: bool = False, keys: int = 64) -> None:
    from runners.cuda.kernels.attention import Division

    attention.splits, attention.divided = lambda *_: splits, lambda *_: Division(splits, keys, early)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(m=instances(PagedModelInput, min_size=1), seed=st.integers(0, 2**31), dim=st.sampled_from((8, 64, 80, 128)),
       heads=st.sampled_from(((4, 4), (6, 2), (4, 1), (1, 1))), windows=st.sampled_from(((None,), (3,), (17, None))),
       splits=st.sampled_from((1, 2, 9)), how=st.sampled_from(("", "few", "searched")))
@settings(max_examples=EXAMPLES, deadline=None)
def test_attention(dtype: torch.dtype, m: PagedModelInput, seed: int, dim: int, heads: tuple[int, int],
                   windows: tuple[int | None, ...], splits: int, how: str) -> None:
    """`few`: in the kernel that verifies drafts, where a sequence has not too many queries for it. `searched`: where
    the host does not know which sequences decode, as in a graph."""
    from runners.cuda.attention import CudaAttention

    specs = specs_of(*heads, dim, windows)
    attention = CudaAttention(specs, device=DEVICE, dtype=dtype)
    attention.dtype = dtype
    attention.expect(m.max_query_len if how == "few" else 0)
    divide(attention, splits)
    caches = [make_cache(attention, spec, m, seed + i) for i, spec in enumerate(specs)]
    on_device = [cache.to(DEVICE) for cache in caches]
    step = attention.begin(unknown(moved(m)) if how == "searched" else moved(m), on_device)
    for layer, spec in enumerate(specs):
        q, k, v = draw_tensors(m, spec, seed - layer, dtype)
        got = step(layer, *(x.to(DEVICE) for x in (q, k, v)))
        close(got, one_by_one(m, caches[layer], spec, q, k, v), dtype)
        slots, size = m.slot_mapping.long(), m.block_size
        for which, new in ((0, k), (1, v)):
            caches[layer][which, slots // size, :, slots % size] = new
        got, expected = (cache.permute(1, 3, 0, 2, 4)[~free(m, cache)]
                         for cache in (on_device[layer].cpu(), caches[layer]))
        assert torch.equal(got, expected)


@pytest.mark.parametrize("alone", [False, True])
@given(m=instances(PagedModelInput, min_size=1), seed=st.integers(0, 2**31), softcap=st.sampled_from((None, 0.7)),
       sinks=st.booleans(), heads=st.sampled_from(((4, 4), (6, 2))), window=st.sampled_from((None, 3)),
       splits=st.sampled_from((1, 2, 9)), early=st.booleans(), few=st.booleans())
@settings(max_examples=EXAMPLES // 2, deadline=None)
def test_softcap_and_sinks(alone: bool, m: PagedModelInput, seed: int, softcap: float | None, sinks: bool,
                           heads: tuple[int, int], window: int | None, splits: int, early: bool, few: bool) -> None:
    """In decoding, whose contexts may be split, in prompts, and with `few` queries a sequence. A part without a key may
    be the one with the sink."""
    from runners.cuda.attention import CudaAttention

    m = decoding(m) if alone and (m.query_start_loc.diff() > 0).all() else m
    scores = torch.randn(heads[0], generator=torch.Generator().manual_seed(seed)) * 3 if sinks else None
    spec = AttentionSpec(*heads, 16, 0.4, window, softcap=softcap, sinks=scores)
    here = dataclasses.replace(spec, sinks=None if scores is None else scores.to(DEVICE))
    attention = CudaAttention([here], device=DEVICE, dtype=torch.float32)
    attention.dtype = torch.float32
    divide(attention, splits, early)
    attention.expect(m.max_query_len if few else 0)
    cache = make_cache(attention, spec, m, seed)
    q, k, v = draw_tensors(m, spec, seed, torch.float32)
    got = attention.begin(moved(m), [cache.to(DEVICE)])(0, *(x.to(DEVICE) for x in (q, k, v)))
    close(got, one_by_one(m, cache, spec, q, k, v), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(m=instances(PagedModelInput, min_size=1), seed=st.integers(0, 2**31), heads=st.sampled_from((4, 20)),
       splits=st.sampled_from((1, 2, 9)), alone=st.booleans())
@settings(max_examples=EXAMPLES // 3, deadline=None)
def test_values_in_keys(dtype: torch.dtype, m: PagedModelInput, seed: int, heads: int, splits: int, alone: bool,
                        ) -> None:
    """Latent attention: with all of a step's sequences decoding, and with prompts and padding among them."""
    from runners.cuda.attention import CudaAttention

    m = decoding(m) if alone and (m.query_start_loc.diff() > 0).all() else m
    wide = m.padded(num_seqs=m.dims["num_seqs"] + 1, num_tokens=m.dims["num_tokens"] + 1)
    spec = AttentionSpec(heads, 1, 40, 0.3, value_dim=32, values_in_keys=True)
    attention = CudaAttention([spec], device=DEVICE, dtype=dtype)
    attention.dtype = dtype
    divide(attention, splits)
    cache = make_cache(attention, spec, m, seed)
    q, k, v = draw_tensors(m, spec, seed, dtype)
    on_device = cache.to(DEVICE)
    more = [torch.cat([x, torch.full_like(x[:1], 7.0)]).to(DEVICE) for x in (q, k, v)]
    got = attention.begin(moved(wide), [on_device])(0, *more)
    close(got[:len(q)], one_by_one(m, cache, spec, q, k, v), dtype)
    slots, size = m.slot_mapping.long(), m.block_size
    cache[0, slots // size, :, slots % size] = k
    kept, expected = (c.cpu().permute(1, 3, 0, 2, 4)[~free(m, cache)] for c in (on_device, cache))
    assert torch.equal(kept, expected) and not got[len(q):].any()


def free(m: PagedModelInput, cache: torch.Tensor) -> torch.Tensor:
    """bool [num_blocks, block_size]: the slots that hold nothing, which attention may clear: those of the null block,
    and behind the end of each sequence."""
    size, found = m.block_size, torch.zeros(cache.shape[1], m.block_size, dtype=torch.bool)
    found[0] = True
    for table, length in zip(m.block_tables.tolist(), m.seq_lens.tolist(), strict=True):
        if length % size:
            found[table[length // size], length % size:] = True
    return found


def decoding(m: PagedModelInput) -> PagedModelInput:
    """The decoding sequences of a batch alone; all of its sequences, at their last tokens, where none decode."""
    starts, n = m.query_start_loc, m.num_decode_seqs or len(m.seq_lens)
    at = (starts[1:n + 1] - 1).long()
    rows = torch.arange(n, dtype=torch.int32)
    kept = {name: getattr(m, name)[at] for name in ("input_ids", "positions", "slot_mapping")}
    return PagedModelInput(**kept, query_start_loc=torch.arange(n + 1, dtype=torch.int32), seq_lens=m.seq_lens[:n],
                           block_tables=m.block_tables[:n], logits_indices=rows, block_size=m.block_size,
                           num_decode_seqs=n, max_query_len=1, num_samples=n)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(m=instances(PagedModelInput, min_size=1), seed=st.integers(0, 2**31), dim=st.sampled_from((16, 64, 80)),
       heads=st.sampled_from(((4, 4), (6, 2), (4, 1))), window=st.sampled_from((None, 3)),
       splits=st.sampled_from((1, 2, 9)), fp8=st.booleans(), alone=st.booleans(), early=st.booleans(),
       keys=st.sampled_from((32, 64, 128)), few=st.booleans(), gains=st.sampled_from((None, "model's", torch.float32)))
@settings(max_examples=EXAMPLES, deadline=None)
def test_rotary_attention(dtype: torch.dtype, m: PagedModelInput, seed: int, dim: int, heads: tuple[int, int],
                          window: int | None, splits: int, fp8: bool, alone: bool, early: bool, keys: int, few: bool,
                          gains: torch.dtype | str | None) -> None:
    """In one kernel where all sequences decode or have `few` queries, and in two where not, as the operations one by
    one, norms of heads among them where there are `gains`; the same bytes in the cache."""
    from runners.cuda.attention import CudaAttention
    from runners.cuda.ops import CudaOps

    m = decoding(m) if alone and (m.query_start_loc.diff() > 0).all() else m
    spec, kv = specs_of(*heads, dim, (window,))[0], heads[1]
    attention = CudaAttention([spec], device=DEVICE, dtype=dtype)
    attention.dtype = dtype
    divide(attention, splits, early, keys)
    attention.expect(m.max_query_len if few else 0)
    cache = make_cache(attention, spec, m, seed).to(DEVICE)
    cache = cache.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8) if fp8 else cache
    caches = cache.clone(), cache.clone()
    qkv = torch.cat(draw_tensors(m, spec, seed, dtype), 1).to(DEVICE)
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(int(m.positions.max()) + 1, dim, generator=generator).to(DEVICE)
    norms = None
    if gains is not None:
        norms = HeadNorms(*torch.rand(2, dim, generator=generator).to(
            DEVICE, gains if isinstance(gains, torch.dtype) else dtype), 1e-5)
    m, ops = moved(m), CudaOps()
    begun = ops.begin_rotary(m.positions, table, dtype)
    got = ops.rotary_attention(attention.begin(m, [caches[0]]), 0, qkv, kv, begun, norms)
    expected = Ops.rotary_attention(ops, attention.begin(m, [caches[1]]), 0, qkv, kv, begun, norms)
    close(got, expected, dtype)
    # Rounding of a product and a sum may be contracted in one of the two: a unit in the last place, then fp8's. With a
    # norm it is one of the factors, and what is rotated may be much smaller than they are.
    held = ~free(moved(m), cache.cpu()).to(DEVICE)
    kept = [(c.view(torch.float8_e4m3fn).float() if fp8 else c.float()).permute(1, 3, 0, 2, 4)[held] for c in caches]
    torch.testing.assert_close(*kept, atol=1e-6 if norms is None else 4 * TOLERANCE[dtype],
                               rtol=0.13 if fp8 else TOLERANCE[dtype])


@given(m=instances(PagedModelInput, min_size=1), seed=st.integers(0, 2**31), seqs=st.integers(0, 3),
       tokens=st.integers(0, 5), blocks=st.integers(0, 3), how=st.sampled_from(("", "few", "searched")),
       splits=st.sampled_from((1, 2)))
@settings(max_examples=EXAMPLES, deadline=None)
def test_padding(m: PagedModelInput, seed: int, seqs: int, tokens: int, blocks: int, how: str, splits: int) -> None:
    from runners.cuda.attention import CudaAttention

    spec, dims = specs_of(4, 2, 64, (None,))[0], m.dims
    attention = CudaAttention([spec], device=DEVICE, dtype=torch.float32)
    attention.dtype = torch.float32
    divide(attention, splits)
    attention.expect(m.max_query_len if how == "few" else 0)
    wide = m.padded(num_seqs=dims["num_seqs"] + seqs, num_tokens=dims["num_tokens"] + tokens,
                    max_blocks=dims["max_blocks"] + blocks)
    cache = make_cache(attention, spec, m, seed).to(DEVICE)
    padded = cache.clone()
    q, k, v = (x.to(DEVICE) for x in draw_tensors(m, spec, seed, torch.float32))
    more = [torch.cat([x, torch.full_like(x[:1], 7.0).expand(tokens, -1, -1)]) for x in (q, k, v)]
    real = attention.begin(moved(m), [cache])(0, q, k, v)
    got = attention.begin(unknown(moved(wide)) if how == "searched" else moved(wide), [padded])(0, *more)
    close(got[:len(q)], real, torch.float32)
    held = ~free(m, cache)
    kept, expected = (c.cpu().permute(1, 3, 0, 2, 4)[held] for c in (padded, cache))
    assert got.isfinite().all() and torch.equal(kept, expected)


def test_every_division_covers_the_context() -> None:
    from runners.cuda.attention import CudaAttention
    from runners.cuda.kernels.attention import MAX_SPLITS

    attention = CudaAttention(specs_of(8, 2, 64, (None,)), device=DEVICE, dtype=torch.float16)
    for attention.units, seqs, context, heads in itertools.product(
            (1, 132), (0, 1, 3, 32, 500), (0, 1, 33, 240, 2048, 131072), (1, 8, 300)):
        splits, keys, early = attention.divided(seqs, context, heads)
        assert 1 <= splits <= MAX_SPLITS and keys in (32, 64, 128)
        assert not early or (context <= splits * keys and splits * seqs * heads <= attention.units)


def test_warming_up_leaves_the_cache_alone() -> None:
    from runners.cuda.attention import CudaAttention

    specs = specs_of(6, 2, 64, (None, 3))
    attention = CudaAttention(specs, device=DEVICE, dtype=torch.float16)
    attention.expect(3)
    caches = [torch.randn(attention.cache_shape(spec, 2, 16), device=DEVICE).half() for spec in specs]
    kept = [cache.clone() for cache in caches]
    attention.warmup(caches)
    assert all(map(torch.equal, caches, kept))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "gains"), [(64, None), (96, torch.float32), (896, torch.float32), (4096, None)])
def test_norms(dtype: torch.dtype, size: int, gains: torch.dtype | None) -> None:
    """Gains in fp32 are multiplied before the result is rounded."""
    from runners.cuda.ops import CudaOps

    ours, plain, generator = CudaOps(), Ops(), torch.Generator().manual_seed(size)
    x, r = (torch.randn(5, size, generator=generator).to(DEVICE, dtype) for _ in range(2))
    weight = torch.rand(size, generator=generator).to(DEVICE, gains or dtype)
    got, expected = ours.rms_norm(x, weight, 1e-5), plain.rms_norm(x, weight, 1e-5)
    close(got, expected, dtype)
    assert dtype == torch.float32 or (got == expected).float().mean() > 0.97  # rounded twice, a quarter is another
    for a, b in zip(ours.add_rms_norm(x, r, weight, 1e-5), plain.add_rms_norm(x, r, weight, 1e-5), strict=True):
        close(a, b, dtype)
    heads = torch.randn(5, 6, 24, generator=generator).to(DEVICE, dtype)
    close(ours.rms_norm(heads[:, :4], weight[:24], 1e-5), plain.rms_norm(heads[:, :4], weight[:24], 1e-5), dtype)


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
        close(gemv(x, weight, None, tile)[0], expected, dtype)
        close(gemv(x, weight, bias, tile)[0], expected + bias.double(), dtype)
        if rows % 2 == 0:
            gate, up = expected.chunk(2, -1)
            close(gemv(x, weight, None, tile, gated=True)[0], torch.nn.functional.silu(gate) * up, dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("added", "gains"), [(False, None), (True, None), (True, torch.float32)])
@pytest.mark.parametrize(("rows", "size"), [(6, 64), (130, 1000), MATRIX])
def test_norm_and_gemv(dtype: torch.dtype, added: bool, gains: torch.dtype | None, rows: int, size: int) -> None:
    """In one kernel as one by one."""
    from runners.cuda.kernels.gemv import TILES, Norm, gemv

    generator, plain = torch.Generator().manual_seed(rows), Ops()
    weight, x, residual, norm, bias = (torch.randn(*shape, generator=generator).div(8).to(DEVICE, dtype)
                                       for shape in ((rows, size), (1, size), (1, size), (size,), (rows,)))
    norm = norm.to(gains or dtype)
    normed, total = plain.add_rms_norm(x, residual, norm, 1e-5) if added else (plain.rms_norm(x, norm, 1e-5), x)
    expected = normed.double() @ weight.double().t() + bias.double()
    gate, up = expected.chunk(2, -1)
    for tile in TILES:
        given = Norm(norm, 1e-5, residual if added else None)
        y, sums = gemv(x, weight, bias, tile, norm=given)
        close(y, expected, dtype)
        assert torch.equal(sums, total)
        close(gemv(x, weight, bias, tile, gated=True, norm=given)[0], torch.nn.functional.silu(gate) * up, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "first", "few"), [(1, 4, 1024), (50, 5, 1024), (20, 5, 1)] + (
    [(1700, 0, 1024)] if DEVICE.type == "cuda" else []))
def test_experts(dtype: torch.dtype, tokens: int, first: int, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One program for each choice, for each expert, and for each tile of sorted choices; with all experts on the rank,
    and with some. What no token chooses is not read."""
    from runners.cuda.kernels import experts
    from runners.cuda.ops import CudaOps

    monkeypatch.setattr(experts, "FEW", few)
    hidden, size, total, k = (2048, 768, 128, 8) if DEVICE.type == "cuda" else (72, 40, 12, 3)
    generator, first = torch.Generator().manual_seed(tokens), total * first // 12
    count = total - first
    gate_up, down, x, router, biases, offsets = (
        torch.randn(*shape, generator=generator).mul(scale).to(DEVICE, dtype) for scale, *shape in (
            (hidden ** -0.5, count * 2 * size, hidden), (size ** -0.5, count, hidden, size), (1, tokens, hidden),
            (hidden ** -0.5, total, hidden), (0.3, count * 2 * size), (0.3, count * hidden)))
    for biased, limit in ((False, None), (True, 0.5)):
        config = ExpertsConfig(count=total, per_token=k, size=size, layers=(0,), bias=biased, limit=limit, scaling=1.5)
        layer: Any = SimpleNamespace(config=config, first=first, count=count, size=size, few_bits=False,
                                     gate_up=gate_up.clone(), down=down.clone(), router=router, router_bias=None,
                                     correction=None, packed=None,
                                     gate_up_bias=biases if biased else None, down_bias=offsets if biased else None)
        weights, chosen = CudaOps().route(x, layer)
        plain_weights, plain_chosen = Ops().route(x, layer)
        close(weights, plain_weights, dtype)
        assert dtype != torch.float32 or torch.equal(chosen.long(), plain_chosen)  # otherwise logits may be equal
        expected = Ops().experts(x.cpu(), weights.cpu(), chosen.long().cpu(), on_host(layer))
        for expert in set(range(first, total)) - set(chosen.flatten().tolist()):
            layer.gate_up.view(count, -1)[expert - first] = torch.nan
            layer.down[expert - first] = torch.nan
        close(CudaOps().experts(x, weights, chosen, layer), expected, dtype)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float32], ids=str)
@pytest.mark.parametrize(("total", "first", "count", "k", "hidden", "size", "biased"), [
    (128, 0, 128, 8, *((2048, 768) if DEVICE.type == "cuda" else (72, 8)), False), (12, 4, 4, 3, 72, 24, True),
    (5, 0, 5, 2, 64, 40, True), (1, 0, 1, 1, 130, 16, False), (60, 30, 30, 4, 96, 30, False)])
def test_mixture_of_one_token(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, total: int, first: int, count: int,
                              k: int, hidden: int, size: int, biased: bool) -> None:
    """Its choices, of which of equal scores the lower number is the first, and then the whole of it, with a residual
    and without one. What the token does not choose is not read. An expert's last layer is in one tile, or in several.
    """
    from runners.cuda.kernels import experts, one_token
    from runners.cuda.ops import CudaOps

    generator = torch.Generator().manual_seed(total)
    gate_up, down, router, biases, offsets, of_router, x, residual, logits = (
        torch.randn(*shape, generator=generator).mul(scale).to(DEVICE, dtype) for scale, *shape in (
            (hidden ** -0.5, count * 2 * size, hidden), (size ** -0.5, count, hidden, size),
            (hidden ** -0.5, total, hidden), (0.3, count * 2 * size), (0.3, count * hidden), (0.3, total),
            (1, 1, hidden), (1, 1, hidden), (2, 1, total)))
    logits[0, total // 3:total // 3 * 2] = logits[0, :total // 3]
    config = ExpertsConfig(count=total, per_token=k, size=size, layers=(0,), bias=biased, scaling=1.5,
                           normalise=not biased, limit=0.5 if biased else None)
    layer: Any = SimpleNamespace(config=config, first=first, count=count, size=size, few_bits=False, eps=1e-5,
                                 router=router, correction=None, packed=None,
                                 router_bias=of_router if biased else None, gate_up_bias=biases if biased else None,
                                 down_bias=offsets if biased else None)

    def expected(x: torch.Tensor, logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Also sets the layer's weights, and those that are not chosen to values that are not numbers."""
        scores, chosen = logits.float().cpu().softmax(-1), chosen.cpu().long()
        weights = scores.gather(1, chosen)
        weights = weights / (weights.sum() if config.normalise else 1) * config.scaling
        layer.gate_up, layer.down = gate_up.clone(), down.clone()
        result = Ops().experts(x.cpu(), weights, chosen, on_host(layer))
        others = [i - first for i in range(first, first + count) if i not in chosen]
        layer.gate_up.view(count, -1)[others] = torch.nan
        layer.down[others] = torch.nan
        return result

    best = torch.tensor([sorted(range(total), key=lambda i: (-float(logits[0, i]), i))[:k]])
    y = expected(x, logits, best)
    for columns in (one_token._COLUMNS, 16):
        monkeypatch.setattr(one_token, "_COLUMNS", columns)
        got, chosen = one_token.experts(x, logits, experts.Held(
            layer.gate_up, layer.down, layer.gate_up_bias, layer.down_bias, first, count, config.limit), k,
            config.normalise, 1.5)
        assert chosen.dtype == torch.int32 and torch.equal(chosen.cpu().long(), best)
        close(got, y, dtype)
    norm = torch.rand(hidden, generator=generator).to(DEVICE, dtype)
    for added in (residual, None):
        layer.gate_up, layer.down = gate_up, down
        got, normed, whole, chosen = CudaOps().mixture(x, added, norm, layer)
        plain_normed, plain_whole = Ops().apply_norm(x, added, norm, layer.eps)
        assert torch.equal(whole, plain_whole)
        close(normed, plain_normed, dtype)
        logits = torch.nn.functional.linear(normed, router, layer.router_bias)
        close(logits.gather(1, chosen.long()), logits.topk(k).values, dtype)
        close(got, expected(normed, logits, chosen), dtype)


def on_host(layer: Any) -> Any:
    """The layer with its tensors on the CPU, where Ops groups the tokens by expert."""
    return SimpleNamespace(**{name: value.cpu() if isinstance(value, torch.Tensor) else value
                              for name, value in vars(layer).items()})


@pytest.mark.parametrize("count, padded, size", [(1, 1, 16), (5, 8, 4), (200, 224, 1)])
def test_advance_in_place_is_what_the_fields_declare(count: int, padded: int, size: int) -> None:
    from runners.cuda.kernels import elementwise

    steps, rng = 3, torch.Generator().manual_seed(count)

    def ints(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=rng, dtype=torch.int32)

    lens = ints(1, 30, padded)
    lens[count:] = 0
    tables = ints(1, 99, padded, -(-33 // size))
    at = (lens - 1).clamp(min=0)
    blocks = tables.gather(1, (at // size)[:, None].long())[:, 0]
    fields = {"input_ids": ints(0, 9, padded) * (lens > 0), "positions": at, "seq_lens": lens, "block_tables": tables,
              "slot_mapping": torch.where(lens > 0, blocks * size + at % size, 0),
              "query_start_loc": torch.arange(padded + 1, dtype=torch.int32).clamp(max=count),
              "logits_indices": torch.arange(padded, dtype=torch.int32), "pending_rows": ints(-1, 4, padded),
              "stop_ids": torch.where(ints(0, 2, padded, STOP_IDS) > 0, ints(0, 60, padded, STOP_IDS), -1),
              "max_new": ints(1, steps + 1, padded)}
    m = PagedModelInput(**{name: x.int().to(DEVICE) for name, x in fields.items()}, block_size=size, num_steps=steps,
                        num_samples=count, max_query_len=1)
    own = copy.copy(m)
    for name in fields:
        own.__dict__[name] = m[name].clone()
    going, alive = torch.ones(count, dtype=torch.int32, device=DEVICE), m.seq_lens > 0
    counts, out = torch.zeros_like(going), going.new_empty(count, steps)
    expected = torch.zeros_like(counts)
    for place in range(steps):
        tokens = ints(-1, 60, count).to(DEVICE)
        elementwise.advance(own, tokens, own.stop_ids, own.max_new, going, counts, out, place)
        expected += alive[:count]
        alive = goes_on(m, tokens, place + 1, alive)
        m = m.advance(Taken(torch.nn.functional.pad(tokens, (0, padded - count)), alive))
        assert torch.equal(out[:, place], tokens) and torch.equal(counts, expected)
        assert torch.equal(going.bool(), alive[:count])
        for name in ("input_ids", "positions", "slot_mapping", "seq_lens"):
            assert torch.equal(own[name], m[name]), name
        assert torch.equal(own.pending_rows[:count], m.pending_rows[:count])


def grids(draw: int, out: int = 40, wide: int = 200) -> list[Grid]:
    """Weights of every form: rows, groups and blocks of scales, zero points, and an order of inputs of their own."""
    generator = torch.Generator().manual_seed(draw)

    def positive(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator) * 0.01 + 0.005

    by = {group: -(-wide // group) for group in (128, 64, 32, 16)}
    eight = torch.randint(-127, 128, (out, wide), generator=generator).to(torch.int8)
    fp8 = torch.randn(out, wide, generator=generator).mul(50).to(torch.float8_e4m3fn)
    four = torch.randint(0, 16, (out, wide), generator=generator).to(torch.uint8)
    zeros = torch.randint(0, 16, (out, by[128]), generator=generator).float()
    index = (torch.randperm(wide, generator=generator) // 128).int()  # 128 inputs of each group but the last
    return [Grid(eight, positive(out, 1), wide, (out,)), Grid(fp8, positive(out, 1), wide, (out,)),
            Grid(fp8, positive(out, by[128]), 128, (out,)), Grid(eight, positive(out, by[32]), 32, (out,)),
            Grid(four, positive(out, by[128]), 128, (out,), zeros), Grid(four, positive(out, by[64]), 64, (out,)),
            Grid(four, positive(out, by[32]), 32, (out,), torch.full((out, by[32]), 8.0)),
            Grid(four, positive(out, by[16]), 16, (out,)), Grid(four, positive(out, 1), wide, (out,), zeros[:, :1]),
            Grid(four, positive(out, by[128]), 128, (out - 8, 8), zeros, index.expand(2, -1))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 16, 37])
def test_weights_of_few_bits(dtype: torch.dtype, rows: int) -> None:
    from runners.cuda.kernels.few_bits import few_bits, multiply

    outputs = 10 if rows == 1 else 40  # the interpreter takes long for one row
    for i, grid in enumerate(grids(rows, outputs)):
        generator = torch.Generator().manual_seed(i)
        x = torch.randn(rows, 200, generator=generator).to(dtype)
        bias = torch.randn(outputs, generator=generator).to(dtype) if i % 2 else None
        product = x.double() @ grid.dequantized(torch.float64).t()
        expected = product + (0 if bias is None else bias.double())
        moved = dataclasses.replace(grid, **{name: getattr(grid, name).to(DEVICE) for name in (
            "values", "scales", "zeros", "index") if getattr(grid, name) is not None})
        weight = few_bits(moved)
        assert weight is not None
        ours = x.to(DEVICE) if weight.order is None else x.to(DEVICE)[:, weight.order]
        got = multiply(ours.contiguous(), weight, None if bias is None else bias.to(DEVICE))
        close(got / 10, expected / 10, dtype)  # products of 200 terms, whose weights tensor cores take in the dtype
        close(ours @ weight.dequantized(dtype).t() / 10, product / 10, dtype)


@pytest.mark.parametrize(("dtype", "width"), [(DTYPES[0], 8), (DTYPES[-1], 2)], ids=str)
def test_one_row_of_few_bits(dtype: torch.dtype, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile has all five chunks of the inputs, or three tiles have them. Programs go on to other outputs, of which the
    last tiles have too few or none."""
    from runners.cuda.kernels import few_bits
    from runners.cuda.kernels.gemv import Norm, Tile

    monkeypatch.setattr(few_bits, "programs_at_once", lambda device: 1)
    several = grids(width, 9, 600)
    halves = dataclasses.replace(several[4], zeros=several[4].zeros + 0.5)
    codes = dataclasses.replace(several[6], zeros=None)
    for i, grid in enumerate([*several, halves, codes]):
        generator = torch.Generator().manual_seed(i)
        x, bias = (torch.randn(*shape, generator=generator).to(DEVICE, dtype) for shape in ((1, 600), (9,)))
        moved = dataclasses.replace(grid, **{name: getattr(grid, name).to(DEVICE) for name in (
            "values", "scales", "zeros", "index") if getattr(grid, name) is not None})
        weight = few_bits.few_bits(moved, grid is codes)
        assert weight is not None
        expected = x.double() @ weight.dequantized(torch.float32).double().t() + (bias.double() if i % 2 else 0)
        got = few_bits.one_row(x, weight, bias if i % 2 else None, tile=Tile(2, width, 1))[0]
        close(got / 10, expected / 10, dtype)
        if weight.takes_norm and width >= weight.chunks:
            gains, residual = x[0].abs() + 0.5, x.flip(1)
            got, total = few_bits.one_row(x, weight, None, tile=Tile(2, width, 1), norm=Norm(gains, 1e-5, residual))
            normed = F.rms_norm(total.double(), (600,), gains.double(), 1e-5)
            assert torch.equal(total, x + residual)
            close(got / 10, normed @ weight.dequantized(torch.float32).double().t() / 10, dtype)


@pytest.mark.parametrize("size", [48, 200])
def test_rows_are_rounded_to_fp8_by_their_largest(size: int) -> None:
    from hal.weights.grid import LARGEST, encoded
    from runners.cuda.kernels.few_bits import round_rows

    x = torch.randn(5, size, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[3] = 0
    values, scales = (y.cpu() for y in round_rows(x.to(DEVICE), 208))
    expected = (x.abs().amax(1, keepdim=True).float() / LARGEST["fp8"]).clamp(min=1e-12)
    torch.testing.assert_close(scales, expected)
    assert not values[:, size:].float().any()
    # A quotient between two numbers of the format may be rounded to either. The interpreter forgets to carry into the
    # exponent.
    alike = torch.isclose(values[:, :size].float(), encoded(x, expected, "fp8").float(), rtol=0.13, atol=0.01)
    assert alike.float().mean() > (0.95 if DEVICE.type == "cpu" else 0.9999)


def test_forms_that_no_kernel_has() -> None:
    from runners.cuda.kernels.few_bits import few_bits

    values = torch.zeros(8, 48, dtype=torch.uint8)
    assert few_bits(Grid(values, torch.ones(8, 4), 12, (8,))) is None
    index = torch.arange(48).view(2, 24).t().flatten() // 24
    assert few_bits(Grid(values, torch.ones(8, 2), 24, (4, 4), None, torch.stack((index, index.flip(0))))) is None
    assert few_bits(Grid(values + 200, torch.ones(8, 3), 16, (8,))) is None  # integers of 8 bits from 0 on
    assert few_bits(Grid(values.to(torch.int8), torch.ones(8, 3), 16, (8,))) is None  # too many groups in a chunk


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("name", ["fp8", "int8", "int4", "mxfp4"])
def test_layers_of_few_bits(name: str, rows: int) -> None:
    """A layer keeps the kernels' form alone, and gives what the reference gives, rounding inputs aside."""
    from hal.config import Topology
    from hal.contracts.communicator import LocalCommunicator
    from hal.models.layers import Build, Linear
    from hal.weights import LinearSpec, Projection
    from hal.weights.configs import ON_LOAD
    from hal.weights.mxfp4 import Mxfp4
    from runners.cuda.ops import CudaOps

    ops, scheme = CudaOps(), ON_LOAD.get(name, Mxfp4())
    build = Build(Topology(), LocalCommunicator(), ops, torch.float32, DEVICE, lambda _: scheme)
    layer = Linear(build, LinearSpec(160, (Projection("x", 24), Projection("y", 24)), "out"), bias=True)
    generator = torch.Generator().manual_seed(rows)
    stored = {"weight_packed": torch.randint(0, 256, (48, 80), generator=generator),
              "weight_scale": torch.randint(123, 127, (48, 5), generator=generator)}
    if scheme.on_load:
        stored = scheme.quantize(torch.randn(48, 160, generator=generator))
    for tensor, value in stored.items():
        layer.get_parameter(tensor).data.copy_(value)
    layer.bias.data.fill_(0.5)
    expected = layer.scheme.dequantize(layer).double().cpu()
    ops.pack_linear(layer)
    assert set(dict(layer.named_parameters())) == {"bias"}
    x = torch.randn(rows, 160, generator=torch.Generator().manual_seed(0))
    close(ops.linear(x.to(DEVICE), layer), x.double() @ expected.t() + 0.5, torch.float32)
    x, residual, gains = x.to(DEVICE), x.to(DEVICE).flip(1), torch.linspace(0.5, 2, 160, device=DEVICE)
    for added, gated in ((None, False), (residual, True)):
        y, total = ops.norm_linear(layer, x, added, gains, 1e-5, gated=gated)
        real = x if added is None else x + added
        normed = F.rms_norm(real.double(), (160,), gains.double(), 1e-5).cpu() @ expected.t() + 0.5
        assert torch.equal(total, real)
        expected_y = F.silu(normed[:, :24]) * normed[:, 24:] if gated else normed
        close(y / expected_y.abs().max(), expected_y / expected_y.abs().max(), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "size", "outputs", "rank"), [
    (1, 40, (24,), 3), (7, 1100, (48, 16, 16), 8), (20, 96, (130, 140), 16), (150, 200, (24, 8), 20)])
def test_adapters_of_several_slots(dtype: torch.dtype, tokens: int, size: int, outputs: tuple[int, ...], rank: int,
                                   ) -> None:
    """Each token gets the products of its own slot, at the offset of each projection, and one without a slot none.
    There are a sum over the inputs in parts, tiles of the outputs, more than one block of tokens, an empty slot."""
    from runners.cuda.kernels.adapters import by_slot, expand, inner_of, shrink, tiles_of

    generator, slots = torch.Generator().manual_seed(tokens), 5
    of_token = torch.randint(-1, slots, (tokens,), generator=generator, dtype=torch.int32)
    of_token[of_token == 3] = 1
    x, y = (torch.randn(tokens, n, generator=generator).to(dtype) for n in (size, sum(outputs)))
    a = torch.randn(slots, len(outputs) * rank, size, generator=generator).mul_(size ** -0.5).to(dtype)
    b = torch.randn(slots, sum(outputs), rank, generator=generator).mul_(rank ** -0.5).to(dtype)
    expected = y.double()
    for token, slot in enumerate(of_token.tolist()):
        inner = x[token].double() @ a[slot].double().t()
        parts = [w @ inner[i * rank:(i + 1) * rank] for i, w in enumerate(b[slot].double().split(outputs))]
        expected[token] += torch.cat(parts) if slot >= 0 else 0.0
    x, a, step = x.to(DEVICE), a.to(DEVICE), by_slot(of_token.to(DEVICE), slots)
    inner = inner_of(x, a)
    shrink(x, a, step, inner)
    got = expand(y.to(DEVICE), inner, b.to(DEVICE), step, tiles_of(outputs, DEVICE))
    close(got, expected, dtype)
