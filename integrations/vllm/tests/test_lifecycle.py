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
from vllm.v1.core.kv_cache_utils import KVCacheBlockCopy

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
        assert told.wait(60)
        with pytest.raises(Exception, match="rank 1 died between steps: killed by signal 9"):
            executor.check_health()


def test_a_request_is_aborted_while_its_token_is_on_the_device() -> None:
    """Under asynchronous scheduling the row of the aborted request has a new owner before the token arrives."""
    def run(llm: Any, aborted: str | None) -> dict[str, list[int]]:
        core, done, steps = llm.llm_engine, dict[str, list[int]](), 0
        for name, prompt in zip("abcdefghij", PROMPTS * 3, strict=False):
            core.add_request(name, {"prompt_token_ids": prompt}, SamplingParams(temperature=0.0, max_tokens=12,
                                                                                ignore_eos=True))
        while core.has_unfinished_requests():
            done.update((o.request_id, list(o.outputs[0].token_ids)) for o in core.step() if o.finished)
            if (steps := steps + 1) == 4 and aborted:
                core.abort_request([aborted])
        return done

    with serving("fake", async_scheduling=True) as llm:
        undisturbed = run(llm, None)
        assert run(llm, "b") == {name: tokens for name, tokens in undisturbed.items() if name != "b"}
        idle(llm)


@pytest.mark.parametrize(("device", "dialect"), [("null", "V1"), ("fake", "V2")])
def test_a_streaming_session_goes_on_from_what_it_was_told(device: str, dialect: str) -> None:
    """vLLM sends the id of a live request again with the next part of its input. It keeps the tokens that are computed.
    """
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    with serving(device, dialect) as llm:
        engine, client = llm.llm_engine, llm.llm_engine.engine_core

        def told(part: list[int], resumable: bool = True) -> list[int]:
            client.add_request(engine.input_processor.process_inputs(
                "session", {"prompt_token_ids": part}, params.clone(), ("generate",), resumable=resumable))
            got: list[int] = []
            while len(got) < (params.max_tokens or 0) and resumable:
                got += [token for output in client.get_output().outputs for token in output.new_token_ids]
            return got

        said: list[int] = []
        for part in ([5, 6, 7], [9] * 20, [11, 4]):
            said += part
            answer = told(part)
            alone = llm.generate({"prompt_token_ids": said}, params, use_tqdm=False)[0].outputs[0]
            assert answer == list(alone.token_ids)
            said += answer[:-1]  # the last token has not been computed
        told([1], resumable=False)  # vLLM ends a session so; the token is not read
        idle(llm)


@pytest.mark.parametrize("copied", [True, False])
def test_blocks_are_copied_where_the_scheduler_says_so(engine: Any, monkeypatch: pytest.MonkeyPatch,
                                                       copied: bool) -> None:
    """The second of two equal prompts gets a copy of the first's cached block; the null backend reads it."""
    core = engine.llm_engine.engine_core.engine_core
    schedule, pool = core.scheduler.schedule, core.scheduler.kv_cache_manager.block_pool

    def copying(*args: Any, **kwargs: Any) -> Any:
        step = schedule(*args, **kwargs)
        for new in step.scheduled_new_reqs:
            if new.num_computed_tokens:
                (cached, *rest), = new.block_ids
                spare = pool.get_new_blocks(1)[0]
                spares.append(spare)
                new.block_ids = ([spare.block_id, *rest],)
                step.kv_cache_block_copies = [KVCacheBlockCopy(cached, spare.block_id)] if copied else None
        return step

    spares: list[Any] = []
    monkeypatch.setattr(core.scheduler, "schedule", copying)
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    prompt = [5, 7, 11, 4, 9] * 4 if copied else [4, 4, 6, 13, 8] * 4
    first, second = (engine.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids for _ in range(2))
    assert len(spares) == 1
    assert (first == second) is copied
    pool.free_blocks(spares)
    idle(engine)
