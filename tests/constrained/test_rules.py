"""Parameters that forbid tokens, against a rule that is written out: the same model asked for one token at a time, with
a logit bias on what the rule forbids."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hal import LLM, SamplingParams
from hal.constrained.rules import TokenRules, to_words
from hal.errors import RequestError

EOS = 2
PROMPTS = ["37+85=", "999+1="]
# The tokens of the bundled model are characters: "0" to "9" are 4 to 13.
CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"min_tokens": 6}, {"stops": [EOS], "min_tokens": 6}),
    ({"min_tokens": 4, "stop_token_ids": [6, 5]}, {"stops": [EOS, 5, 6], "min_tokens": 4}),
    ({"allowed_token_ids": [4, 5, 9, EOS]}, {"allowed": [4, 5, 9, EOS]}),
    ({"bad_words": ["22", "00", "12+"]}, {"words": [[6, 6], [4, 4], [5, 6, 14]]}),
    ({"bad_words": ["1", "33"], "min_tokens": 5, "ignore_eos": True}, {"words": [[5], [7, 7]]})]


def forbidden(output: list[int], allowed: Any = None, words: Any = (), stops: Any = (), min_tokens: int = 0,
              vocab: int = 16) -> set[int]:
    return {token for token in range(vocab)
            if (allowed is not None and token not in allowed) or (token in stops and len(output) < min_tokens)
            or any([*output, token][-len(word):] == word for word in words)}


def test_masks_are_those_of_the_rule() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        vocab = int(rng.integers(3, 70))
        rule: dict[str, Any] = {
            "words": [rng.integers(0, 3, rng.integers(1, 4)).tolist() for _ in range(rng.integers(0, 4))],
            "stops": rng.integers(0, 3, 2).tolist(), "min_tokens": int(rng.integers(0, 5)),
            "allowed": rng.integers(0, vocab, 5).tolist() if rng.random() < 0.5 else None}
        output = rng.integers(0, 3, rng.integers(0, 6)).tolist()
        mask = TokenRules(vocab, **rule).mask(len(output), output)
        free = np.array([token not in forbidden(output, **rule, vocab=vocab) for token in range(vocab)])
        assert (to_words(free) == (to_words(np.ones(vocab, np.bool_)) if mask is None else mask)).all()


@pytest.fixture(scope="module")
def reference() -> Any:
    """The outputs of CASES, one token a call."""
    found = []
    with LLM(device="cpu", num_blocks=64) as llm:
        for number, (asked, rule) in enumerate(CASES):
            for i, prompt in enumerate(PROMPTS):
                ids, output = llm.check(prompt), list[int]()
                ends = {*asked.get("stop_token_ids", ()), *(() if asked.get("ignore_eos") else (EOS,))}
                while len(output) < 12 and not ends.intersection(output[-1:]):
                    bias = dict.fromkeys(forbidden(output, **rule), -1e9)
                    output += llm.generate([*ids, *output], SamplingParams(
                        max_tokens=1, logit_bias=bias, temperature=float(i), seed=number))[0].token_ids
                found.append(output)
    return found


@pytest.mark.parametrize("options", [{}, {"async_scheduling": True}, {"speculate": "ngram"}, {"steps_per_message": 4}],
                         ids=str)
def test_outputs_are_those_of_the_rule(options: dict[str, Any], reference: list[list[int]]) -> None:
    prompts = PROMPTS * len(CASES)
    params = [SamplingParams(max_tokens=12, temperature=float(i), seed=number, **asked)
              for number, (asked, _) in enumerate(CASES) for i in range(len(PROMPTS))]
    with LLM(device="cpu", num_blocks=128, **options) as llm:
        free = llm.generate(prompts, SamplingParams(max_tokens=12))
        outputs = llm.generate(prompts, params)
    assert [output.token_ids for output in outputs] == reference
    assert sum(of_rule.token_ids != of_none.token_ids for of_rule, of_none in zip(outputs, free, strict=True)) > 6


def test_a_grammar_comes_before_min_tokens_and_goes_with_the_others() -> None:
    with LLM(device="cpu", num_blocks=64) as llm:
        long, short, both = llm.generate("37+85=", SamplingParams(regex="[0-9]+", min_tokens=5)) + llm.generate(
            "37+85=", SamplingParams(regex="[0-9]{2}", min_tokens=5)) + llm.generate("37+85=", SamplingParams(
                regex="[0-9]{6}", bad_words=["22", "11"], allowed_token_ids=[5, 6, EOS]))
    assert len(long.text) >= 5 and long.text.isdigit() and len(short.text) == 2
    assert both.text in ("121212", "212121")


@pytest.mark.parametrize(("wrong", "said"), [
    ({"allowed_token_ids": []}, "allowed_token_ids is empty"), ({"allowed_token_ids": [16]}, "allowed_token_ids"),
    ({"logit_bias": {16: 1.0}}, "logit_bias has a token"), ({"min_tokens": 9, "max_tokens": 8}, "min_tokens is above"),
    ({"min_tokens": -1}, "min_tokens"), ({"bad_words": [3]}, "bad_words"), ({"n": 0}, "n is not usable"),
    ({"max_tokens": -1}, "max_tokens"), ({"skip_special_tokens": 1}, "skip_special_tokens")], ids=str)
def test_bad_values_are_refused_by_name(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError) as caught, LLM(device="null", num_blocks=40) as llm:
        llm.generate("1+1=", SamplingParams(**wrong))
    assert caught.value.what.startswith(said)
