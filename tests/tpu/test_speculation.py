"""Steps with drafts run in the plan's buckets of mixed steps, and give the tokens of plain decoding."""

from __future__ import annotations

import pytest
from proposing import Oracle

from hal.engine.llm import LLM
from hal.sampling.params import SamplingParams

pytestmark = pytest.mark.usefixtures("xla")
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7, 9]]


@pytest.mark.slow
def test_drafts_give_the_tokens_of_plain_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAL_COMPILE_BUDGET", "0")
    options = {"device": "tpu", "dtype": "float32", "block_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 16,
               "max_model_len": 32}
    params = [SamplingParams(max_tokens=16, ignore_eos=True, **more) for more in (
        {}, {"temperature": 0.8, "seed": 3}, {"logprobs": 1, "repetition_penalty": 1.2})]
    with LLM(**options) as llm:
        plain = [(o.token_ids, [entry.token_id for entry in o.logprobs or ()]) for o in llm.generate(PROMPTS, params)]
    Oracle.known = {tuple(prompt): tokens for prompt, (tokens, _) in zip(PROMPTS, plain, strict=True)}
    with LLM(**options, speculate="proposing:Oracle", speculative_tokens=3) as llm:
        found = llm.generate(PROMPTS, params)
        assert [(o.token_ids, [entry.token_id for entry in o.logprobs or ()]) for o in found] == plain
        assert 0 < llm.stats().accepted_tokens < llm.stats().drafted_tokens
