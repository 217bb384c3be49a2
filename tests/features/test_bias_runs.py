"""A logit bias through an engine: it decides tokens, alone and beside others, after a preemption, with tp=2."""

from __future__ import annotations

from typing import Any

import pytest

from hal import LLM, SamplingParams

OPTIONS: dict[str, Any] = {"device": "null", "max_model_len": 64, "num_blocks": 64, "block_size": 4}


def tokens(params: list[SamplingParams], **options: Any) -> list[list[int]]:
    with LLM(**{**OPTIONS, **options}) as llm:
        return [o.token_ids for o in llm.generate([[5, 6, 7]] * len(params), params)]


PARAMS = [SamplingParams(max_tokens=8, ignore_eos=True), SamplingParams(max_tokens=8, logit_bias={9: 1e6}),
          SamplingParams(max_tokens=8, ignore_eos=True, logit_bias={10: -1e6, 0: -1e6}),
          SamplingParams(max_tokens=8, ignore_eos=True, temperature=1.0, seed=3, logit_bias={4: 1e6})]


@pytest.mark.parametrize("options", [{}, {"async_scheduling": True}, {"num_blocks": 17, "max_num_seqs": 3},
                                     {"num_blocks": 17, "num_cpu_blocks": 8}], ids=str)
def test_a_bias_decides(options: dict[str, Any]) -> None:
    plain, always, never, drawn = tokens(PARAMS, **options)
    assert always == [9] * 8 and drawn == [4] * 8
    assert {10, 0} & {*plain} and not {10, 0} & {*never}
    assert tokens(PARAMS[:1])[0] == plain and tokens(PARAMS[2:3])[0] == never


@pytest.mark.slow
def test_a_bias_reaches_all_ranks() -> None:
    assert tokens(PARAMS, tp=2, wire="request") == tokens(PARAMS)
