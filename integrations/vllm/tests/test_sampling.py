"""Sampling parameters, logprobs and constraints under vLLM, against references."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from served import reference, serving, tokens_of
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

PROMPTS = ["37+85=", "12+34=46;56+78=134;90+12=102;34+5", "999+1=", "1+1=2;2+2=4;3+"]
VOCAB = 16


def check_logprobs(found: dict[int, Any], expected: np.ndarray, error: np.ndarray, token: int, most: int) -> None:
    """The given token and the most likely ones are there, with their values and ranks. `error` is the rounding error of
    transformers in the same dtype, which reaches 1e-4 where the model was not trained on such a text; another order of
    the same sums may be twice as far from the exact values there."""
    assert {token, *np.argsort(-expected)[:most].tolist()} == set(found)
    for i, each in found.items():
        assert abs(each.logprob - expected[i]) <= 1e-4 + 2 * error[i]
        assert each.rank == int((expected > expected[i]).sum()) + 1


@pytest.mark.parametrize("budget", [96, 16])
@pytest.mark.parametrize("most", [0, 3])
def test_logprobs_are_those_of_transformers(budget: int, most: int) -> None:
    """A budget of 16 cuts prompts into chunks, one of which ends just before the last token of the prompt."""
    prompts = [*PROMPTS, "5" * 17]
    with serving(max_num_batched_tokens=budget) as llm:
        outputs = llm.generate(prompts, SamplingParams(
            max_tokens=6, logprobs=most, prompt_logprobs=most, temperature=0.8, seed=5, ignore_eos=True),
                               use_tqdm=False)
    for output in outputs:
        prompt, new = list(output.prompt_token_ids), list(output.outputs[0].token_ids)
        expected = reference(prompt + new, torch.float64)
        error = np.abs(expected - reference(prompt + new))
        assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(prompt)
        for i in range(1, len(prompt)):
            check_logprobs(output.prompt_logprobs[i], expected[i - 1], error[i - 1], prompt[i], most)
        for i, token in enumerate(new):
            at = len(prompt) + i - 1
            check_logprobs(output.outputs[0].logprobs[i], expected[at], error[at], token, most)


def greedy(tokens: list[int], count: int, change: Any) -> list[int]:
    """Greedy tokens of the reference, whose scores `change(scores, output)` may change."""
    output: list[int] = []
    for _ in range(count):
        scores = reference(tokens + output)[-1].copy()
        change(scores, output)
        output.append(int(scores.argmax()))
    return output


def forbid(*tokens: int) -> Any:
    def change(scores: np.ndarray, output: list[int]) -> None:
        scores[list(tokens)] = -np.inf
    return change


def add(bias: dict[int, float]) -> Any:
    def change(scores: np.ndarray, output: list[int]) -> None:
        for token, value in bias.items():
            scores[token] += value
    return change


def no_word(word: list[int]) -> Any:
    def change(scores: np.ndarray, output: list[int]) -> None:
        if output[-len(word) + 1:] == word[:-1]:
            scores[word[-1]] = -np.inf
    return change


def until(count: int, *tokens: int) -> Any:
    def change(scores: np.ndarray, output: list[int]) -> None:
        if len(output) < count:
            scores[list(tokens)] = -np.inf
    return change


CASES = [
    ({"allowed_token_ids": [4, 5, 6, 2]}, forbid(*(t for t in range(VOCAB) if t not in (4, 5, 6, 2)))),
    ({"logit_bias": {9: 30.0, 2: -100.0}}, add({9: 30.0, 2: -100.0})),
    ({"logit_bias": {9: 3.5}, "allowed_token_ids": [9, 10, 11]}, lambda s, o: (
        add({9: 3.5})(s, o), forbid(*(t for t in range(VOCAB) if t not in (9, 10, 11)))(s, o))),
    ({"min_tokens": 6, "ignore_eos": False}, until(6, 2)),
    ({"min_tokens": 5, "stop_token_ids": [4], "ignore_eos": False}, until(5, 2, 4)),
    ({"bad_words": ["1"]}, forbid(5)),
    ({"bad_words": ["12", "22"]}, lambda s, o: (no_word([5, 6])(s, o), no_word([6, 6])(s, o)))]


@pytest.mark.parametrize("device", ["cpu", "fake"])
def test_constraints_match_a_reference(device: str) -> None:
    """On the fake device, which runs behind the host, steps are scheduled ahead of their tokens."""
    with serving(device) as llm:
        params = [SamplingParams(**{"temperature": 0.0, "max_tokens": 9, "ignore_eos": True, **asked})
                  for asked, _ in CASES]
        outputs = llm.generate(["37+85="] * len(CASES), params, use_tqdm=False)
        for output, asked, (_, change) in zip(outputs, params, CASES, strict=True):
            new = list(output.outputs[0].token_ids)
            expected = greedy(list(output.prompt_token_ids), 9, change)
            ends = {2, *asked.stop_token_ids} if not asked.ignore_eos else set()
            stop = next((i for i, t in enumerate(expected) if t in ends and i >= asked.min_tokens), 8)
            assert new == expected[:stop + 1], asked


def test_penalties_are_the_same_when_steps_are_scheduled_ahead() -> None:
    params = [SamplingParams(temperature=t, seed=3, max_tokens=20, ignore_eos=True, **p) for t in (0.0, 1.0) for p in (
        {"repetition_penalty": 1.3}, {"presence_penalty": 0.7, "frequency_penalty": 0.4}, {})]
    found = []
    for ahead in (False, True):
        with serving("fake", async_scheduling=ahead) as llm:
            found.append(tokens_of(llm.generate(["37+85="] * len(params), params, use_tqdm=False)))
    assert found[0] == found[1]
    repetition, output, free = found[0][:3]
    assert repetition != free and output != free


@pytest.mark.parametrize("asked", [
    {"logprob_token_ids": [1]}, {"extra_args": {"x": 1}}, {"thinking_token_budget": 0},
    {"trace_decode_token_ids": [5, 5]}, {"watermarking": True}, {"routed_experts_prompt_start": 1},
    {"prompt_logprob_token_ids": np.array([[1]])}], ids=str)
def test_unsupported_parameters_are_refused_by_name(cpu: Any, asked: dict[str, Any]) -> None:
    name, = asked
    with pytest.raises(VLLMValidationError, match=name):
        cpu.generate("1+1=", SamplingParams(**asked), use_tqdm=False)
    free = SamplingParams(temperature=0.0, watermarking=False, extra_args={})
    assert tokens_of(cpu.generate("37+85=", free, use_tqdm=False)) == [[5, 6, 6, 2]]


class LaterParams(SamplingParams):
    """SamplingParams of a later vLLM."""

    top_z: float = 0.5
    stop_at: int = 0  # derived from another parameter
    _memory: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.stop_at = self.stop_at or (self.max_tokens or 0) + 1
        self._memory = self.max_tokens or 0


def test_a_new_parameter_of_a_later_vllm_is_refused_by_name(cpu: Any) -> None:
    cpu.generate("1+1=", LaterParams(max_tokens=3), use_tqdm=False)
    for asked in ({"top_z": 0.0}, {"stop_at": 3}):
        name, = asked
        with pytest.raises(VLLMValidationError, match=f"'{name}' is not known"):
            cpu.generate("1+1=", LaterParams(max_tokens=3, **asked), use_tqdm=False)


@pytest.mark.parametrize("bad_words", [None, ["5"]])
def test_a_grammar_that_is_complete_ends_a_request_before_min_tokens(cpu: Any, bad_words: list[str] | None) -> None:
    params = SamplingParams(temperature=0.0, min_tokens=9, max_tokens=12, bad_words=bad_words,
                            structured_outputs=StructuredOutputsParams(choice=["77"]))
    output = cpu.generate("37+85=", params, use_tqdm=False)[0].outputs[0]
    assert (output.text, output.finish_reason, len(output.token_ids)) == ("77", "stop", 3)
