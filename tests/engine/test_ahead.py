"""Asynchronous scheduling: steps are issued before the tokens of the ones before them are known."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hal.config import EngineConfig
from hal.contracts import backend as backends
from hal.contracts.executor import make_executor
from hal.engine.scheduled_step import ScheduledStep
from hal.engine.scheduler import Scheduler
from hal.engine.sequence import Sequence
from hal.features.pending import PENDING_TOKEN
from hal.model_config import ModelConfig
from hal.sampling.params import SamplingParams

MODEL = ModelConfig(family="llama", architecture="Null", vocab_size=97, hidden_size=8, num_layers=2, num_heads=2,
                    num_kv_heads=2, head_dim=4, intermediate_size=8, max_position=64, dtype="float32")
PARAMS = (SamplingParams(max_tokens=12), SamplingParams(max_tokens=9, temperature=0.7),
          SamplingParams(max_tokens=10, temperature=0.5, repetition_penalty=1.3), SamplingParams(max_tokens=1))


def run(seqs: list[Sequence], config: EngineConfig, num_blocks: int, aborts: dict[int, int]) -> tuple[int, Scheduler]:
    """Runs all to the end, `aborts` (step: request) on the way; returns how many tokens were pending."""
    executor = make_executor(config, MODEL, backends.load("hal.testing.null:backend"))
    ahead = bool(config.async_scheduling)
    scheduler = Scheduler(config, num_blocks, config.num_cpu_blocks, eos_token_ids=(3,), ahead=ahead)
    for seq in seqs:
        scheduler.add(seq)
    pending: deque[tuple[ScheduledStep, np.ndarray]] = deque()
    steps = on_device = 0
    while scheduler.unfinished or pending:
        step = scheduler.schedule()
        assert (step is not None or pending) and steps < 2000
        if step is not None:
            on_device += int((step.request.append_tokens == PENDING_TOKEN).sum())
            pending.append((step, executor.execute_model(step.request).result().token_ids.numpy().copy()))
            steps += 1
            if steps in aborts:
                scheduler.finish(seqs[aborts[steps] % len(seqs)], "abort")
        if pending and (step is None or len(pending) > ahead):
            scheduler.update(*pending.popleft())
    executor.shutdown()
    return on_device, scheduler


def requests(lens: list[int], kinds: list[int]) -> list[Sequence]:
    rng = np.random.default_rng(len(lens))
    return [Sequence(request_id=i, prompt_ids=rng.integers(4, 97, n).tolist(), params=PARAMS[k], seed=i,
                     limit=min(n + PARAMS[k].max_tokens, 64)) for i, (n, k) in enumerate(zip(lens, kinds, strict=True))]


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 3)), min_size=1, max_size=7), st.integers(17, 40),
       st.sampled_from((0, 20)), st.sampled_from((3, 16, 64)), st.dictionaries(st.integers(1, 9), st.integers(0, 6)))
def test_tokens_are_those_of_scheduling_step_by_step(
        drawn: list[tuple[int, int]], num_blocks: int, host: int, budget: int, aborts: dict[int, int]) -> None:
    lens, kinds = [n for n, _ in drawn], [k for _, k in drawn]
    config = {"block_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": budget, "num_blocks": num_blocks,
              "num_cpu_blocks": host, "max_model_len": 64, "device": "hal.testing.null:backend"}
    known, ahead = requests(lens, kinds), requests(lens, kinds)
    run(known, EngineConfig(**config), num_blocks, {})
    _, scheduler = run(ahead, EngineConfig(**config, async_scheduling=True), num_blocks, aborts)
    for a, b in zip(known, ahead, strict=True):
        if b.finish_reason == "abort":
            assert b.token_ids == a.token_ids[:len(b.token_ids)]
        else:
            assert (b.token_ids, b.finish_reason) == (a.token_ids, a.finish_reason)
    assert scheduler.blocks.num_free == num_blocks - 1 and not any(scheduler.blocks.refs)
    assert scheduler.blocks.num_free_host == host and len(scheduler._free_rows) == 4


def test_a_decode_does_not_wait_for_its_token() -> None:
    seqs = requests([5], [0])
    on_device, scheduler = run(seqs, EngineConfig(block_size=4, max_num_seqs=2, async_scheduling=True, max_model_len=64,
                                                num_blocks=20), 20, {})
    assert on_device >= len(seqs[0].token_ids) - 5 - 1 and scheduler.step <= len(seqs[0].token_ids) - 5 + 1


@pytest.mark.parametrize("kind", [2])
def test_penalties_wait_for_it(kind: int) -> None:
    assert run(requests([5, 6], [kind, kind]), EngineConfig(block_size=4, async_scheduling=True, max_model_len=64,
                                                            num_blocks=20), 20, {})[0] == 0
