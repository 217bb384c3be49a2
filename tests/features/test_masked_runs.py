"""Masks that follow from the tokens so far, given step by step by the driver of an executor, in every layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hal.checkpoints.hf_config import read_config
from hal.config import EngineConfig
from hal.contracts.backend import select
from hal.contracts.executor import make_executor
from hal.engine.scheduler import Scheduler
from hal.engine.sequence import Sequence
from hal.errors import StateError
from hal.sampling.params import SamplingParams

PROMPTS = [[7, 11, 14], [5, 14, 5, 15], [9], [8, 8, 12, 13, 14, 15, 5, 6, 7]]


def rule(tokens: list[int], vocab: int) -> np.ndarray:
    """What may follow: the tokens of one residue class, which the sum of all tokens before chooses."""
    return np.arange(vocab) % 3 == sum(tokens) % 3


def run(params: SamplingParams, **options: Any) -> list[list[int]]:
    """All sequences but the last are restricted by the rule."""
    config = EngineConfig(**{"num_blocks": 40, "block_size": 4, "max_model_len": 64, "max_num_batched_tokens": 8,
                             **options})
    model, backend = read_config(config.model), select(config.device)
    executor = make_executor(config, model, backend)
    ahead = bool(config.async_scheduling)
    scheduler = Scheduler(config, executor.num_blocks, eos_token_ids=(), depth=config.pp, ahead=ahead)
    seqs = [Sequence(request_id=i, prompt_ids=list(prompt), params=params, seed=i, limit=len(prompt) + 12,
                     needs_tokens=i + 1 < len(PROMPTS)) for i, prompt in enumerate(PROMPTS)]
    for seq in seqs:
        scheduler.add(seq)
    in_flight: list[Any] = []
    try:
        while scheduler.unfinished or in_flight:
            step = scheduler.schedule()
            if step is not None:
                step.restrict({s.request_id: rule(s.token_ids, model.vocab_size) for s in step.sampled
                               if s.needs_tokens}, model.vocab_size)
                in_flight.append((step, executor.execute_model(step.request)))
            if step is None or len(in_flight) == max(config.pp, 1 + ahead):
                done, handle = in_flight.pop(0)
                scheduler.update(done, handle.result().token_ids.numpy())
    finally:
        executor.shutdown()
    for seq in seqs[:-1]:
        for at in range(len(seq.prompt_ids), len(seq)):
            before = seq.token_ids[:at]
            assert rule(before, model.vocab_size)[seq.token_ids[at]], f"request {seq.request_id}, token {at}"
    return [seq.output_ids for seq in seqs]


@pytest.mark.parametrize("params", [SamplingParams(max_tokens=12), SamplingParams(temperature=1.0, top_p=0.95)],
                         ids=["greedy", "drawn"])
def test_masks_hold_and_change_nothing_else(params: SamplingParams) -> None:
    expected = run(params, device="cpu", async_scheduling=False)
    assert any(not rule(PROMPTS[3] + expected[3][:i], 20)[token] for i, token in enumerate(expected[3]))
    assert run(params, device="cpu", async_scheduling=True) == expected


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"tp": 2}, {"tp": 2, "wire": "request"}, {"pp": 2}, {"tp": 2, "pp": 2}], ids=str)
def test_masks_in_every_layout(options: dict[str, Any]) -> None:
    params = SamplingParams(max_tokens=12)
    assert run(params, device="null", **options) == run(params, device="null")


def test_a_mask_for_a_request_that_is_not_sampled_is_refused() -> None:
    config = EngineConfig(device="null", num_blocks=40, block_size=4, max_model_len=64)
    scheduler = Scheduler(config, 40)
    scheduler.add(Sequence(request_id=3, prompt_ids=[5, 6], params=SamplingParams(), seed=0, limit=9))
    step = scheduler.schedule()
    assert step is not None
    with pytest.raises(StateError, match="does not sample"):
        step.restrict({4: np.ones(20, np.bool_)}, 20)
