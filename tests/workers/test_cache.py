"""The cache's moves against a numpy model, and its size against arithmetic by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from worker_cases import MODEL, SIZE, engine

from hal.config import Topology, WorkerConfig
from hal.contracts.inputs import WorkerInput
from hal.errors import CapacityError, InputError
from hal.testing.null import NullRunner
from workers.worker.cache import CacheEngine, count_blocks

BLOCKS, HOST = 9, 7


def config(**options: Any) -> WorkerConfig:
    return WorkerConfig(engine(**options), MODEL, Topology())


def caches() -> list[torch.Tensor]:
    return [torch.arange(2 * BLOCKS * 3, dtype=torch.float32).view(2, BLOCKS, 3) + 1000 * layer for layer in range(2)]


def pairs(draw: Any, sources: range, targets: range) -> np.ndarray | None:
    if draw(st.booleans()):
        return None
    to = draw(st.lists(st.sampled_from(targets), unique=True, max_size=4))
    return np.array([(draw(st.sampled_from(sources)), t) for t in to], np.int32).reshape(-1, 2)


def made() -> CacheEngine:
    cache = CacheEngine(caches(), BLOCKS)
    cache.reserve_host(HOST)
    return cache


@st.composite
def steps(draw: Any) -> list[WorkerInput]:
    """Legal steps: device and host blocks freed by one swap are filled by another whenever chance has it so."""
    blocks, host = range(1, BLOCKS), range(HOST)
    return [WorkerInput(blocks_to_swap_out=pairs(draw, blocks, host), blocks_to_swap_in=pairs(draw, host, blocks),
                        blocks_to_copy=pairs(draw, blocks, blocks)) for _ in range(draw(st.integers(1, 4)))]


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(steps())
def test_moves_blocks_like_the_model(given_steps: list[WorkerInput]) -> None:
    """The model, for each layer and for K and V: swaps read everything first; then copies read everything first."""
    cache = made()
    device = np.stack([c.numpy().copy() for c in caches()])
    host = np.zeros((2, 2, HOST, 3), np.float32)
    for step in given_steps:
        step.validate()
        step.check()
        cache.apply(step)
        old, old_host = device.copy(), host.copy()
        for source, to in ([] if step.blocks_to_swap_out is None else step.blocks_to_swap_out):
            host[:, :, to] = old[:, :, source]
        for source, to in ([] if step.blocks_to_swap_in is None else step.blocks_to_swap_in):
            device[:, :, to] = old_host[:, :, source]
        old = device.copy()
        for source, to in ([] if step.blocks_to_copy is None else step.blocks_to_copy):
            device[:, :, to] = old[:, :, source]
        np.testing.assert_array_equal(np.stack([c.numpy() for c in cache.device]), device)
        np.testing.assert_array_equal(np.stack([c.numpy() for c in cache.host]), host)


@pytest.mark.parametrize(("field", "rows"), [
    ("blocks_to_copy", [(1, BLOCKS)]), ("blocks_to_copy", [(BLOCKS, 1)]), ("blocks_to_copy", [(1, 2), (3, 2)]),
    ("blocks_to_copy", [(1, 0)]), ("blocks_to_copy", [(-1, 2)]), ("blocks_to_swap_in", [(HOST, 1)]),
    ("blocks_to_swap_in", [(0, 0)]), ("blocks_to_swap_out", [(1, HOST)]),
])
def test_refuses_blocks_that_do_not_exist_or_are_written_twice(field: str, rows: list[tuple[int, int]]) -> None:
    cache = made()
    with pytest.raises(InputError, match=field) as error:
        cache.apply(WorkerInput(**{field: np.array(rows, np.int32)}))
    assert error.value.field == field
    assert all(torch.equal(a, b) for a, b in zip(cache.device, caches(), strict=True))


class Stateful(NullRunner):
    def __init__(self, rows: int) -> None:  # nothing but its states is asked for
        self.row_states = [torch.arange(rows * n, dtype=torch.float32).view(1, rows, n) for n in (3, 2)]


def test_states_of_rows_leave_and_come_in_one_step() -> None:
    """In a stage without a paged cache, too: its blocks are those of other stages."""
    runner = Stateful(4)
    cache, before = CacheEngine([], 0, runner), [x.clone() for x in runner.row_states]
    cache.reserve_host(HOST)
    blocks = np.array([(1, 0)], np.int32)
    cache.apply(WorkerInput(blocks_to_swap_out=blocks, rows_to_swap_out=np.array([(0, 2)], np.int32)))
    cache.apply(WorkerInput(rows_to_swap_out=np.array([(3, 2)], np.int32),
                            rows_to_swap_in=np.array([(2, 3)], np.int32)))
    for now, old, host in zip(runner.row_states, before, cache.host_rows, strict=True):
        assert torch.equal(now[:, 3], old[:, 0]) and torch.equal(now[:, :3], old[:, :3])
        assert torch.equal(host[:, 2], old[:, 3]) and not host[:, [0, 1, 3]].any()
    with pytest.raises(InputError, match="rows_to_swap_in names a row that does not exist"):
        cache.apply(WorkerInput(rows_to_swap_in=np.array([(0, 4)], np.int32)))
    never = CacheEngine([], 0, runner)
    never.reserve_host(0)
    assert never.host_rows == []


def test_a_rank_that_keeps_states_alone_has_the_blocks_that_sequences_need() -> None:
    c, free = config(max_num_seqs=2), {"free": 300, "reserve": 100, "per_block": 0, "host_memory": False}
    assert count_blocks(c, row_states=True, **free) == 2 * 16 + 1
    assert count_blocks(c, **free) == 0


def test_size_follows_from_memory() -> None:
    roomy = config(max_num_seqs=2)  # a sequence of 64 tokens has 16 blocks
    def count(free: int, c: WorkerConfig = roomy, host_memory: bool = True) -> int:
        return count_blocks(c, free=free, reserve=100, per_block=10, host_memory=host_memory)

    assert count(10_000) == 2 * 16 + 1  # no more than two sequences use, and the null block
    assert count(10_000, host_memory=False) == (9_000 - 100) // 10
    assert count(300) == (270 - 100) // 10 == 17  # exactly one sequence and the null block
    with pytest.raises(CapacityError, match="memory cannot hold") as error:
        count(299)
    assert "169 bytes" in error.value.got and "170 bytes" in error.value.expected
    assert "max_model_len of at most 60" in error.value.hint and "num_blocks of at most 16" in error.value.hint
    assert count(299, config(max_model_len=60)) == 16  # the hint was good
    with pytest.raises(CapacityError, match="memory cannot hold"):
        count(0)


def test_given_size_is_checked() -> None:
    given = config(num_blocks=20)
    assert count_blocks(given, free=10_000, reserve=100, per_block=10, host_memory=True) == 20
    with pytest.raises(CapacityError, match="memory cannot hold"):
        count_blocks(given, free=300, reserve=100, per_block=10, host_memory=True)
    by_bytes = config(kv_cache_bytes=209)
    assert count_blocks(by_bytes, free=10_000, reserve=100, per_block=10, host_memory=True) == 20
    with pytest.raises(CapacityError, match="memory cannot hold"):
        count_blocks(by_bytes, free=300, reserve=100, per_block=10, host_memory=True)
    with pytest.raises(CapacityError, match="too small for one sequence"):
        count_blocks(config(kv_cache_bytes=169), free=10_000, reserve=0, per_block=10, host_memory=True)
    small = dataclasses.replace(given, engine=engine(num_blocks=16))
    with pytest.raises(CapacityError, match="too small for one sequence") as error:
        count_blocks(small, free=10_000, reserve=0, per_block=10, host_memory=True)
    assert f"max_model_len to {15 * SIZE}" in error.value.hint
