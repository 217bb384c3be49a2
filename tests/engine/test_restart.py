"""Ranks are killed at random while requests run; after restarts every request has the tokens of an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
from typing import Any

import pytest

from hal.engine.llm import LLM
from hal.errors import WorkerError
from hal.sampling.params import SamplingParams


def run(kills: int, requests: int, **layout: Any) -> tuple[dict[int, list[int]], int]:
    """Tokens by request, and how many restarts it took."""
    prompts, killer = random.Random(0), random.Random(1)
    done: dict[int, list[int]] = {}
    restarts = 0
    with LLM(device="hal.testing.null:backend", max_num_seqs=16, block_size=4, num_blocks=200, max_model_len=64,
             **layout) as llm:
        for i in range(requests):
            llm.add_request([prompts.randrange(1, 12) for _ in range(prompts.randrange(1, 20))],
                            SamplingParams(max_tokens=prompts.randrange(5, 40), temperature=0.8 * (i % 2), seed=i,
                                           ignore_eos=True))
        while llm.unfinished:
            try:
                if restarts < kills and killer.random() < 0.05:
                    os.kill(killer.choice(llm.executor._ranks.processes).process.pid, signal.SIGKILL)
                done |= {o.request_id: list(o.token_ids) for o in llm.step() if o.finish_reason is not None}
            except WorkerError:
                restarts += 1
                llm.restart()
    return done, restarts


@pytest.mark.slow
@pytest.mark.parametrize(("requests", "kills", "layout"), [(40, 3, {"pp": 2}), (200, 8, {"tp": 2}),
                                                           (40, 3, {"tp": 2, "pp": 2})], ids=str)
def test_requests_survive_killed_ranks(requests: int, kills: int, layout: dict[str, int]) -> None:
    tokens, restarts = run(kills, requests, **layout)
    assert restarts == kills and len(tokens) == requests and tokens == run(0, requests)[0]
