"""Requests that come, end and are aborted at any time: rows and blocks come back, and nobody's tokens change."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served import serving
from vllm import SamplingParams

PROMPTS = [[5, 6, 7], [9] * 20, [11, 4, 8, 5, 13, 6], [7, 8] * 11]


def idle(llm: Any) -> None:
    """No row and no block is taken."""
    core = llm.llm_engine.engine_core.engine_core
    translator, pool = core.model_executor._translator, core.scheduler.kv_cache_manager.block_pool
    core.scheduler.reset_prefix_cache()
    llm.generate([[5]], SamplingParams(max_tokens=1), use_tqdm=False)  # it carries what the last step finished
    assert len(translator.requests) <= 1 and len(translator._free) + len(translator.requests) == 8
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    """10 blocks: sequences preempt each other."""
    with serving("null", num_gpu_blocks_override=10, max_num_batched_tokens=24) as llm:
        yield llm


ACTIONS = st.lists(st.one_of(st.tuples(st.just("add"), st.integers(0, 3), st.integers(1, 40)),
                             st.tuples(st.just("abort"), st.integers(0, 30), st.just(0)),
                             st.tuples(st.just("step"), st.integers(1, 6), st.just(0))), min_size=60, max_size=60)


def test_rows_and_blocks_come_back(engine: Any) -> None:
    """17 examples of 60 actions are 1,000 random steps; HAL_STRICT=1 checks every input."""
    numbers, alone = iter(range(1 << 30)), dict[tuple[int, int], list[int]]()

    @settings(max_examples=17, deadline=None, database=None)
    @given(actions=ACTIONS)
    def run(actions: list[tuple[str, int, int]]) -> None:
        core, asked, done = engine.llm_engine, dict[str, tuple[int, int]](), dict[str, list[int]]()

        def step() -> None:
            done.update((o.request_id, list(o.outputs[0].token_ids)) for o in core.step() if o.finished)

        aborted = set()
        for action, first, second in actions:
            if action == "add":
                name = f"r{next(numbers)}"
                asked[name] = first, second
                core.add_request(name, {"prompt_token_ids": PROMPTS[first]}, SamplingParams(
                    temperature=0.0, max_tokens=second, ignore_eos=True))
            elif action == "abort" and first < len(asked):
                aborted.add(list(asked)[first])
                core.abort_request([list(asked)[first]])
            for _ in range(first if action == "step" else 0):
                if core.has_unfinished_requests():
                    step()
        while core.has_unfinished_requests():
            step()
        for name in asked.keys() - aborted:
            assert len(done[name]) == asked[name][1]
            alone.setdefault(asked[name], done[name])
            assert done[name] == alone[asked[name]]  # whatever ran beside it
        idle(engine)

    run()


def test_a_rank_that_dies_while_idle_fires_the_callback() -> None:
    with serving("null", tensor_parallel_size=2) as llm:
        executor, told = llm.llm_engine.engine_core.engine_core.model_executor, threading.Event()
        executor.register_failure_callback(told.set)
        executor.check_health()
        os.kill(executor._hal._ranks.processes[0].process.pid, signal.SIGKILL)
        assert told.wait(5)
        with pytest.raises(Exception, match="rank 1 died between steps: killed by signal 9"):
            executor.check_health()
