"""Each sampling parameter under vLLM, against hal's own engine and a plain computation on transformers' scores."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from served import bundled, reference, tokens_of
from vllm import SamplingParams

import hal

PROMPT = "3"  # a text that the model may continue in many ways


@pytest.fixture(scope="module")
def own() -> Iterator[Any]:
    with hal.LLM(bundled(), device="cpu", dtype="float32", max_model_len=96, max_num_seqs=8, num_blocks=64) as llm:
        yield llm


def under_vllm(llm: Any, **params: Any) -> list[list[int]]:
    """The tokens of each of the `n` outputs, the prompt's own first."""
    output, = llm.generate([PROMPT], SamplingParams(**params), use_tqdm=False)
    return [list(each.token_ids) for each in output.outputs]


DRAWN = [{"top_k": 1}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_k": 9, "top_p": 0.8, "min_p": 0.02},
         {"temperature": 0.7}, {"temperature": 1e-6}, {"repetition_penalty": 1.5}, {"presence_penalty": 1.0},
         {"frequency_penalty": 0.8}, {"frequency_penalty": -0.5, "repetition_penalty": 0.8},
         {"logit_bias": {4: 2.0, 9: -3.0}}]


@pytest.mark.parametrize("asked", DRAWN, ids=str)
def test_a_seeded_request_has_the_tokens_of_hals_engine(cpu: Any, own: Any, asked: dict[str, Any]) -> None:
    params = {"temperature": 2.0, "seed": 11, "max_tokens": 24, "ignore_eos": True, **asked}
    greedy = params["temperature"] < 1e-5  # as vLLM sees it
    expected, = own.generate([PROMPT], hal.SamplingParams(**params | ({"temperature": 0.0} if greedy else {})))
    assert under_vllm(cpu, **params) == [list(expected.token_ids)]


def kept(scores: np.ndarray, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> set[int]:
    """The tokens that may be drawn, by the definitions of the three parameters."""
    order = np.argsort(-scores, kind="stable")
    if top_k:
        order = order[:top_k]
    chances = np.exp(scores[order] - scores[order[0]])
    enough = min_p <= chances
    chances /= chances.sum()
    before = np.cumsum(chances) - chances
    return set(order[enough & (before < top_p)].tolist())


@pytest.mark.parametrize("asked", DRAWN[:5], ids=str)
def test_drawn_tokens_are_among_those_that_may_be_drawn(cpu: Any, asked: dict[str, Any]) -> None:
    new, = under_vllm(cpu, temperature=2.0, seed=3, max_tokens=40, ignore_eos=True, **asked)
    prompt = cpu.get_tokenizer()(PROMPT)["input_ids"]
    scores, chosen = reference(prompt + new), set[int]()
    for i, token in enumerate(new):
        may = kept(scores[len(prompt) + i - 1] / 2.0, **asked)
        assert token in may
        chosen |= may - {int(scores[len(prompt) + i - 1].argmax())}
    assert asked == {"top_k": 1} or chosen  # there was a choice


@pytest.mark.parametrize("asked", DRAWN[7:11], ids=str)
def test_penalties_match_their_definition(cpu: Any, asked: dict[str, Any]) -> None:
    prompt = cpu.get_tokenizer()(PROMPT)["input_ids"]
    output: list[int] = []
    for _ in range(12):
        scores = reference(prompt + output, logprobs=False)[-1].copy()
        counts = np.bincount(output, minlength=len(scores))
        seen = (counts + np.bincount(prompt, minlength=len(scores))) > 0
        times = asked.get("repetition_penalty", 1.0)
        scores[seen] = np.where(scores[seen] > 0, scores[seen] / times, scores[seen] * times)
        scores -= asked.get("frequency_penalty", 0.0) * counts + asked.get("presence_penalty", 0.0) * (counts > 0)
        output.append(int(scores.argmax()))
    assert under_vllm(cpu, temperature=0.0, max_tokens=12, ignore_eos=True, **asked) == [output]


def test_n_outputs_have_seeds_of_their_own(cpu: Any, own: Any) -> None:
    """vLLM counts the seed up."""
    params = {"temperature": 2.0, "max_tokens": 12, "ignore_eos": True}
    expected = own.generate([PROMPT] * 3, [hal.SamplingParams(**params, seed=7 + i) for i in range(3)])
    found = under_vllm(cpu, n=3, seed=7, **params)
    assert found == [list(each.token_ids) for each in expected] and len({tuple(each) for each in found}) == 3
    unseeded = under_vllm(cpu, n=4, **params)
    assert len({tuple(each) for each in unseeded}) == 4


def test_stop_conditions(cpu: Any) -> None:
    """Greedy, the model answers 122 and ends; with ignore_eos it goes on."""
    end = 2
    free = tokens_of(cpu.generate("37+85=", SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True),
                                  use_tqdm=False))[0]
    assert len(free) == 20 and free[:4] == [5, 6, 6, end]
    cases: list[tuple[dict[str, Any], list[int], str, str, Any]] = [
        ({}, free[:4], "122", "stop", None),
        ({"max_tokens": 1}, free[:1], "1", "length", None),
        ({"max_tokens": 2}, free[:2], "12", "length", None),
        ({"stop_token_ids": [6]}, free[:2], "1", "stop", 6),
        ({"stop_token_ids": [6], "min_tokens": 3}, [], "", "", None),
        ({"stop": ["22"]}, free[:3], "1", "stop", "22"),
        ({"stop": ["2"], "include_stop_str_in_output": True}, free[:2], "12", "stop", "2")]
    for asked, tokens, text, reason, stop in cases:
        output = cpu.generate("37+85=", SamplingParams(**{"temperature": 0.0, "max_tokens": 20, **asked}),
                              use_tqdm=False)[0].outputs[0]
        if "min_tokens" in asked:
            assert len(output.token_ids) >= 3 and not {6, end} & set(output.token_ids[:3])
            continue
        assert (list(output.token_ids), output.text) == (tokens, text), asked
        assert (output.finish_reason, output.stop_reason) == (reason, stop), asked


def test_all_logprobs_of_the_vocabulary(cpu: Any) -> None:
    output = cpu.generate(PROMPT, SamplingParams(temperature=0.0, max_tokens=1, logprobs=15), use_tqdm=False)[0]
    prompt, found = list(output.prompt_token_ids), output.outputs[0].logprobs[0]
    expected = reference(prompt)[-1]
    assert len(found) >= 15
    assert all(abs(each.logprob - expected[i]) < 1e-4 for i, each in found.items())
    assert sorted(each.rank for each in found.values()) == list(range(1, len(found) + 1))


def test_requests_with_all_parameters_run_beside_free_ones(cpu: Any) -> None:
    """The parameters of one request change nothing for another one in the same step."""
    free = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    alone = tokens_of(cpu.generate([PROMPT], free, use_tqdm=False))[0]
    others = [SamplingParams(temperature=2.0, seed=i, max_tokens=12, ignore_eos=True, **asked)
              for i, asked in enumerate([*DRAWN[:5], {"bad_words": ["12"]}, {"prompt_logprobs": 2, "logprobs": 1}])]
    mixed = tokens_of(cpu.generate([PROMPT] * 8, [free, *others], use_tqdm=False))
    assert mixed[0] == alone
    assert mixed[1:] == [tokens_of(cpu.generate([PROMPT], each, use_tqdm=False))[0] for each in others]
