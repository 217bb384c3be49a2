"""Paged attention against attention written out for one query at a time, and against itself with padding."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hal.contracts.attention import AttentionSpec, refuse_unsupported
from hal.contracts.inputs import PagedModelInput
from hal.errors import ConfigError
from hal.models.ops import Ops
from hal.paged.attention import PagedAttention
from hal.testing.strategies import instances
from runners.cpu import compiled
from runners.cpu.attention import CpuAttention, CpuStep
from runners.cpu.linears import Kernels
from runners.cpu.ops import CpuOps

pytestmark = pytest.mark.torch_release
CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
CLASSES = (PagedAttention, CpuAttention)
LEVELS = compiled.available()


def specs_of(heads: int, kv_heads: int, dim: int, windows: tuple[int | None, ...]) -> list[AttentionSpec]:
    return [AttentionSpec(heads, kv_heads, dim, 0.4, window) for window in windows]


def draw_tensors(m: PagedModelInput, spec: AttentionSpec, seed: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k and v as a model hands them over: views of one tensor with gaps between the tokens."""
    generator = torch.Generator().manual_seed(seed)
    widths = [spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim, spec.num_kv_heads * spec.value_dim]
    qkv = torch.randn(len(m.input_ids), sum(widths), generator=generator).to(dtype)
    dims = spec.head_dim, spec.head_dim, spec.value_dim
    q, k, v = (x.unflatten(1, (-1, dim)) for x, dim in zip(qkv.split(widths, 1), dims, strict=True))
    return [q, k, k[..., :spec.value_dim] if spec.values_in_keys else v]


def planes(cache: torch.Tensor, spec: AttentionSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a cache, [num_blocks, num_kv_heads, block_size, dim] each."""
    if spec.values_in_keys:
        return cache[0], cache[0][..., :spec.value_dim]
    return (cache[0], cache[1]) if len(cache) == 2 else cache[0].split((spec.head_dim, spec.value_dim), -1)


def make_cache(attention: PagedAttention, spec: AttentionSpec, m: PagedModelInput, seed: int) -> torch.Tensor:
    """One layer's cache full of earlier tokens. The null block and the blocks that the step is first to write hold
    NaN, which another sequence may have left there."""
    blocks = int(m.block_tables.max()) + 2 if m.block_tables.numel() else 2
    generator = torch.Generator().manual_seed(seed)
    cache = torch.randn(attention.cache_shape(spec, blocks, m.block_size), generator=generator).to(attention.dtype)
    cache[:, 0] = torch.nan
    queries = m.query_start_loc.diff().tolist()
    for table, length, count in zip(m.block_tables.tolist(), m.seq_lens.tolist(), queries, strict=True):
        for column in range(-(-(length - count) // m.block_size), -(-length // m.block_size)):
            cache[:, table[column]] = torch.nan
    return cache


def one_by_one(m: PagedModelInput, cache: torch.Tensor, spec: AttentionSpec, q: torch.Tensor, k: torch.Tensor,
               v: torch.Tensor) -> torch.Tensor:
    """Every head of every token by itself, in fp64, over keys picked slot by slot."""
    size, group = m.block_size, spec.num_heads // spec.num_kv_heads
    out = torch.zeros(len(q), spec.num_heads, spec.value_dim, dtype=torch.float64)
    starts, lens = m.query_start_loc.tolist(), m.seq_lens.tolist()
    for seq, context in enumerate(lens):
        first = context - (starts[seq + 1] - starts[seq])
        table = m.block_tables[seq].tolist()

        def key(position: int, which: int, first: int = first, table: list[int] = table,
                start: int = starts[seq]) -> torch.Tensor:
            if position >= first:
                return (k, v)[which][start + position - first].double()
            return planes(cache, spec)[which][table[position // size], :, position % size].double()

        for token in range(starts[seq], starts[seq + 1]):
            position = first + token - starts[seq]
            seen = range(0 if spec.window is None else max(0, position - spec.window + 1), position + 1)
            keys, values = (torch.stack([key(p, which) for p in seen]) for which in (0, 1))  # [seen, kv heads, dim]
            for head in range(spec.num_heads):
                scores = keys[:, head // group] @ q[token, head].double() * spec.scale
                if spec.softcap is not None:
                    scores = spec.softcap * torch.tanh(scores / spec.softcap)
                weights = scores.exp()
                rest = 0.0 if spec.sinks is None else float(spec.sinks[head].double().exp())
                out[token, head] = weights / (weights.sum() + rest) @ values[:, head // group]
    return out.flatten(1)


# Layers that differ in all that a layer may declare.
UNLIKE = (AttentionSpec(4, 2, 8, 0.4), AttentionSpec(6, 3, 16, 0.2, 5, softcap=1.5),
          AttentionSpec(2, 2, 8, 0.4, value_dim=4, sinks=torch.tensor([0.5, -2.0])),
          AttentionSpec(4, 1, 4, 0.7, 3, value_dim=12, softcap=2.0, sinks=torch.tensor([3.0, 0.0, -1.0, 1.0])),
          AttentionSpec(3, 3, 8, 0.4, softcap=0.7), AttentionSpec(4, 4, 8, 0.4, value_dim=16),
          AttentionSpec(4, 1, 24, 0.3, value_dim=16, values_in_keys=True))


@pytest.mark.slow
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@given(m=instances(PagedModelInput), seed=st.integers(0, 2**31), gathered=st.sampled_from((1, 4000, 1 << 20)))
@settings(max_examples=30, deadline=None)
def test_layers_may_differ_in_all_that_they_declare(cls: type[PagedAttention], dtype: torch.dtype, m: PagedModelInput,
                                                    seed: int, gathered: int) -> None:
    check_layers(cls, UNLIKE, dtype, m, seed, gathered)


@pytest.mark.slow
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@given(m=instances(PagedModelInput), seed=st.integers(0, 2**31), gathered=st.sampled_from((1, 4000, 1 << 20)),
       heads=st.sampled_from(((4, 4), (6, 2), (4, 1), (1, 1))), windows=st.sampled_from(((None,), (3,), (17, None))))
@settings(max_examples=60, deadline=None)
def test_attention_is_what_one_query_at_a_time_gives(cls: type[PagedAttention], dtype: torch.dtype, m: PagedModelInput,
                                                     seed: int, gathered: int, heads: tuple[int, int],
                                                     windows: tuple[int | None, ...]) -> None:
    check_layers(cls, specs_of(*heads, 8, windows), dtype, m, seed, gathered)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@given(m=instances(PagedModelInput), seed=st.integers(0, 2**31), dim=st.sampled_from((32, 96)),
       heads=st.sampled_from(((4, 4), (6, 2), (7, 1))), windows=st.sampled_from(((None,), (3,), (17, None))))
@settings(max_examples=12, deadline=None)
def test_the_cpus_kernels_read_the_cache_where_it_lies(level: str, dtype: torch.dtype, m: PagedModelInput, seed: int,
                                                       dim: int, heads: tuple[int, int],
                                                       windows: tuple[int | None, ...]) -> None:
    specs = [dataclasses.replace(spec, scale=dim**-0.5) for spec in specs_of(*heads, dim, windows)]
    attention = CpuAttention(specs, device=CPU, dtype=dtype, kernels=Kernels(level))
    assert attention.reads
    check_layers(lambda *_, **__: attention, specs, dtype, m, seed, 1)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "window"), [(7, 1, 64, None), (4, 4, 32, 5), (6, 2, 128, None)])
def test_one_kernel_rotates_writes_and_attends(level: str, dtype: torch.dtype, heads: int, kv_heads: int, dim: int,
                                               window: int | None) -> None:
    """The operations one by one give the same output, and write the same slots of the cache."""
    lens, size = np.array([1, 16, 17, 40, 3]), 8
    spec, ops = AttentionSpec(heads, kv_heads, dim, dim**-0.5, window), CpuOps(Kernels(level))
    n, blocks = len(lens), 6
    tables = np.arange(1, 1 + n * blocks, dtype=np.int32).reshape(n, blocks)
    packed = PagedModelInput.schema.allocate(
        {"num_tokens": n, "num_seqs": n, "max_blocks": blocks, "num_logits": n}, set(), block_size=size,
        num_decode_seqs=n, max_query_len=1, num_samples=n)
    slots = tables[np.arange(n), (lens - 1) // size] * size + (lens - 1) % size
    for name, value in {"positions": lens - 1, "seq_lens": lens, "query_start_loc": np.arange(n + 1),
                        "slot_mapping": slots, "block_tables": tables, "logits_indices": np.arange(n)}.items():
        packed.fill(name, value)
    for name in packed.arrays.keys() - {"positions", "seq_lens", "query_start_loc", "slot_mapping", "block_tables",
                                        "logits_indices"}:
        packed.fill(name, None)
    m = packed.to(CPU)
    plain, ours = PagedAttention([spec], device=CPU, dtype=dtype), CpuAttention([spec], device=CPU, dtype=dtype,
                                                                               kernels=Kernels(level))
    cache = torch.randn(plain.cache_shape(spec, 1 + n * blocks, size)).to(dtype)
    cache[:, 0] = torch.nan
    qkv, table = torch.randn(n, heads + 2 * kv_heads, dim).to(dtype), torch.randn(64, dim)
    begun, caches = ops.begin_rotary(m.positions, table, dtype), [cache.clone(), cache.clone()]
    expected = Ops().rotary_attention(plain.begin(m, caches[:1]), 0, qkv, kv_heads, begun)
    step = ours.begin(m, caches[1:])
    assert isinstance(step, CpuStep) and step.alone
    got = ops.rotary_attention(step, 0, qkv, kv_heads, begun)
    torch.testing.assert_close(caches[1][:, 1:], caches[0][:, 1:], atol=TOLERANCE[dtype] / 20, rtol=8e-3)
    assert torch.equal(caches[1][0, 1:] == cache[0, 1:], caches[0][0, 1:] == cache[0, 1:]), "other slots were written"
    torch.testing.assert_close(got, expected, atol=2 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def check_layers(cls: Callable[..., PagedAttention], specs: Sequence[AttentionSpec], dtype: torch.dtype,
                 m: PagedModelInput, seed: int, gathered: int) -> None:
    attention = cls(specs, device=CPU, dtype=dtype)
    attention.gather_bytes = gathered
    caches = [make_cache(attention, spec, m, seed + i) for i, spec in enumerate(specs)]
    before = [cache.clone() for cache in caches]
    step = attention.begin(m, caches)
    for layer, spec in enumerate(specs):
        q, k, v = draw_tensors(m, spec, seed - layer, dtype)
        got = step(layer, q, k, v)
        assert got.dtype == dtype and list(got.shape) == [len(q), spec.num_heads * spec.value_dim]
        expected = one_by_one(m, before[layer], spec, q, k, v)
        torch.testing.assert_close(got.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
        # The cache differs in this step's slots, which hold its keys and values, and where it was NaN.
        slots, size, after = m.slot_mapping.long(), m.block_size, before[layer].nan_to_num(nan=0.0)
        for plane, new in zip(planes(after, spec), (k, v), strict=True):
            plane[slots // size, :, slots % size] = new
        assert torch.equal(caches[layer][:, 1:], after[:, 1:])


@pytest.mark.parametrize(("spec", "name"), [(UNLIKE[1], "softcap"), (UNLIKE[2], "value_dim"), (UNLIKE[5], "value_dim"),
                                            (UNLIKE[6], "values_in_keys"),
                                            (AttentionSpec(2, 2, 8, 0.4, sinks=torch.zeros(2)), "sinks")], ids=str)
def test_what_an_attention_cannot_do_is_refused_with_an_alternative(spec: AttentionSpec, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"(?s)does not support {name}.*attention layer 1.*--device cpu.*PagedAtt"):
        refuse_unsupported([UNLIKE[0], spec], "mine")
    refuse_unsupported([spec], "mine", ("softcap", "value_dim", "sinks", "values_in_keys"))


@pytest.mark.slow
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@given(m=instances(PagedModelInput), seed=st.integers(0, 2**31), seqs=st.integers(0, 3), tokens=st.integers(0, 5),
       blocks=st.integers(0, 3), heads=st.sampled_from(((4, 2), (4, 4))), windows=st.sampled_from(((None,), (5,))))
@settings(max_examples=200, deadline=None)
def test_padding_changes_no_real_row(cls: type[PagedAttention], dtype: torch.dtype, m: PagedModelInput, seed: int,
                                     seqs: int, tokens: int, blocks: int, heads: tuple[int, int],
                                     windows: tuple[int | None, ...]) -> None:
    spec = specs_of(*heads, 8, windows)[0]
    attention = cls([spec], device=CPU, dtype=dtype)
    dims = m.dims
    wide = m.padded(num_seqs=dims["num_seqs"] + seqs, num_tokens=dims["num_tokens"] + tokens,
                    max_blocks=dims["max_blocks"] + blocks)
    wide.check()
    cache = make_cache(attention, spec, m, seed)
    padded_cache = cache.clone()
    q, k, v = draw_tensors(m, spec, seed, dtype)
    wide_q, wide_k, wide_v = (torch.cat([x, torch.full_like(x[:1], torch.nan).expand(tokens, -1, -1)]) if len(x) else
                              torch.full((tokens, *x.shape[1:]), torch.nan, dtype=dtype) for x in (q, k, v))
    real = attention.begin(m, [cache])(0, q, k, v)
    got = attention.begin(wide, [padded_cache])(0, wide_q, wide_k, wide_v)
    assert torch.equal(got[:len(q)], real)
    assert got.isfinite().all()
    assert torch.equal(padded_cache[:, 1:], cache[:, 1:])


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("window", [None, 6])
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_chunks_give_what_the_whole_prompt_gives(cls: type[PagedAttention], window: int | None,
                                                 data: st.DataObject) -> None:
    total, size = data.draw(st.integers(2, 30)), 4
    cuts = sorted(data.draw(st.sets(st.integers(1, total - 1), max_size=4)))
    spec = specs_of(4, 2, 8, (window,))[0]
    attention = cls([spec], device=CPU, dtype=torch.float32)
    table = torch.randperm(-(-total // size), generator=torch.Generator().manual_seed(total)).int() + 1
    q, k, v = torch.randn(3, total, 4, 8, generator=torch.Generator().manual_seed(total))
    k, v = k[:, :2], v[:, :2]

    def run(ends: list[int]) -> torch.Tensor:
        cache, start, outs = torch.zeros(attention.cache_shape(spec, 12, size)), 0, []
        for end in ends:
            at = torch.arange(start, end, dtype=torch.int32)
            m = PagedModelInput(
                input_ids=at, positions=at, slot_mapping=table[at // size] * size + at % size, block_size=size,
                query_start_loc=torch.tensor([0, end - start]).int(), seq_lens=torch.tensor([end]).int(),
                block_tables=table[None], logits_indices=torch.zeros(0).int(), num_decode_seqs=int(end - start == 1))
            m.check()
            outs.append(attention.begin(m, [cache])(0, q[start:end], k[start:end], v[start:end]))
            start = end
        return torch.cat(outs)

    torch.testing.assert_close(run([*cuts, total]), run([total]))


def test_a_fully_masked_row_does_not_arise() -> None:
    """The narrowest window still shows a query its own key."""
    spec = AttentionSpec(1, 1, 4, 1 / math.sqrt(4), 1)
    m = PagedModelInput(
        input_ids=torch.zeros(3).int(), positions=torch.tensor([6, 0, 1]).int(), block_size=4,
        slot_mapping=torch.tensor([10, 12, 13]).int(), query_start_loc=torch.tensor([0, 1, 3]).int(),
        seq_lens=torch.tensor([7, 2]).int(), block_tables=torch.tensor([[1, 2], [3, 0]]).int(),
        logits_indices=torch.zeros(0).int(), num_decode_seqs=1)
    m.check()
    v = torch.arange(12.0).view(3, 1, 4)
    cache = torch.zeros(2, 4, 1, 4, 4)
    got = PagedAttention([spec], device=CPU, dtype=torch.float32).begin(m, [cache])(0, v, v, v)
    torch.testing.assert_close(got, v.flatten(1))
