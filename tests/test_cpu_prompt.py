"""Attention of prompts by the CPU's kernels, which read the paged cache where it lies, against attention in fp64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hal.contracts.attention import AttentionSpec
from hal.contracts.inputs import PagedModelInput
from runners.cpu import compiled
from runners.cpu.attention import CpuAttention
from runners.cpu.linears import Kernels

LEVELS = compiled.available()
pytestmark = pytest.mark.skipif(not LEVELS, reason="requires a CPU with AVX2")


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@settings(max_examples=30, deadline=None)
@given(earlier=st.lists(st.integers(0, 70), min_size=1, max_size=3), queries=st.integers(2, 60),
       kv_heads=st.integers(1, 3), group=st.integers(1, 7), head_dim=st.sampled_from([32, 64, 96, 128]),
       window=st.none() | st.integers(1, 80), block_size=st.sampled_from([4, 16, 32]), threads=st.integers(1, 3),
       seed=st.integers(0, 1000), level=st.sampled_from(LEVELS or ("none",)))
def test_chunks_of_prompts_attend_to_earlier_tokens_and_to_their_own(
        earlier: list[int], queries: int, kv_heads: int, group: int, head_dim: int, window: int | None,
        block_size: int, threads: int, seed: int, level: str) -> None:
    """Each sequence has `earlier` tokens in the cache, and the step brings `queries` more. Free slots of the cache hold
    NaN, which must not reach a result."""
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    spec = AttentionSpec(num_heads=kv_heads * group, num_kv_heads=kv_heads, head_dim=head_dim, scale=head_dim**-0.5,
                         window=window)
    lens = [before + queries for before in earlier]
    width = -(-max(lens) // block_size)
    tables = torch.randperm(len(lens) * width).add(1).view(len(lens), width).int()
    keys, values = ([torch.randn(n, kv_heads, head_dim).bfloat16() for n in lens] for _ in range(2))
    q = torch.randn(len(lens) * queries, spec.num_heads, head_dim).bfloat16()
    cache = torch.full((2, len(lens) * width + 1, kv_heads, block_size, head_dim), float("nan")).bfloat16()
    slots = [table[(at := torch.arange(n)) // block_size] * block_size + at % block_size
             for table, n in zip(tables, lens, strict=True)]
    for kept, stored in zip(cache, (keys, values), strict=True):
        for seq, n in enumerate(earlier):
            kept[slots[seq][:n] // block_size, :, slots[seq][:n] % block_size] = stored[seq][:n]
    starts = torch.arange(len(lens) + 1).mul(queries).int()
    m = PagedModelInput(
        input_ids=torch.zeros(len(q), dtype=torch.int32), seq_lens=torch.tensor(lens).int(), block_tables=tables,
        positions=torch.cat([torch.arange(before, n) for before, n in zip(earlier, lens, strict=True)]).int(),
        slot_mapping=torch.cat([x[-queries:] for x in slots]).int(), query_start_loc=starts,
        logits_indices=starts[1:] - 1, block_size=block_size)
    attention = CpuAttention([spec], device=torch.device("cpu"), dtype=torch.bfloat16, kernels=Kernels(level))
    step = attention.begin(m, [cache])
    k, v = (torch.cat([x[-queries:] for x in stored]) for stored in (keys, values))
    assert all(batch.blocks is None and batch.tables is not None for batch in step.batches)
    got = step(0, q, k, v).view(len(lens), queries, spec.num_heads, head_dim)
    for seq, (before, n) in enumerate(zip(earlier, lens, strict=True)):
        query_at, key_at = torch.arange(before, n)[:, None], torch.arange(n)
        seen = (key_at <= query_at) & (key_at > query_at - (window or n))
        of_seq = q[seq * queries:(seq + 1) * queries], keys[seq], values[seq]
        wide = [x.double().transpose(0, 1) for x in of_seq]
        expected = F.scaled_dot_product_attention(wide[0], *(x.repeat_interleave(group, 0) for x in wide[1:]), seen)
        torch.testing.assert_close(got[seq].double(), expected.transpose(0, 1), rtol=8e-3, atol=8e-3)


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_heads_whose_panels_are_many_bytes_take_turns(level: str) -> None:
    """As is so with long contexts. A query that is the first of its sequence sees one key."""
    spec = AttentionSpec(num_heads=6, num_kv_heads=3, head_dim=128, scale=128**-0.5)
    attention = CpuAttention([spec], device=torch.device("cpu"), dtype=torch.bfloat16, kernels=Kernels(level))
    n, size = 6000, 1500
    q, k, v = (torch.randn(n, heads, 128).bfloat16() for heads in (6, 3, 3))
    m = PagedModelInput(
        input_ids=torch.arange(n).int(), positions=torch.arange(n).int(), slot_mapping=torch.arange(n).add(size).int(),
        block_tables=torch.tensor([[1, 2, 3, 4]]).int(), query_start_loc=torch.tensor([0, n]).int(),
        seq_lens=torch.tensor([n]).int(), logits_indices=torch.tensor([n - 1]).int(), block_size=size)
    got = attention.begin(m, [torch.zeros(2, 5, 3, size, 128).bfloat16()])(0, q, k, v).view(n, 6, 128)
    assert torch.equal(got[0], v[0].repeat_interleave(2, 0))
    for at in (1, 2999, n - 1):
        keys, values = (x[:at + 1].float().transpose(0, 1).repeat_interleave(2, 0) for x in (k, v))
        expected = F.scaled_dot_product_attention(q[at].float()[:, None], keys, values)[:, 0]
        torch.testing.assert_close(got[at].float(), expected, rtol=8e-3, atol=8e-3)


@pytest.mark.parametrize("level", LEVELS)
def test_one_query_with_a_value_that_is_not_finite_affects_no_other_query(level: str) -> None:
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=64, scale=0.125)
    attention = CpuAttention([spec], device=torch.device("cpu"), dtype=torch.bfloat16, kernels=Kernels(level))
    q, cache = torch.randn(40, 4, 64).bfloat16(), torch.randn(2, 4, 2, 16, 64).bfloat16()
    at = torch.arange(40)
    m = PagedModelInput(
        input_ids=at.int(), positions=at.int(), slot_mapping=at.add(16).int(),
        block_tables=torch.tensor([[1, 2, 3]]).int(), query_start_loc=torch.tensor([0, 40]).int(),
        seq_lens=torch.tensor([40]).int(), logits_indices=torch.tensor([39]).int(), block_size=16)
    k, v = torch.randn(2, 40, 2, 64).bfloat16()
    expected = attention.begin(m, [cache])(0, q, k, v)
    q[17], k[30] = float("nan"), float("nan")
    got = attention.begin(m, [cache])(0, q, k, v)
    assert got[17].isnan().all() and got[30:].isnan().all()
    assert torch.equal(got[:17], expected[:17]) and torch.equal(got[18:30], expected[18:30])
