"""Outputs that follow a grammar: masks against a reference that is written out, in every way of running."""

from __future__ import annotations

import re
import sys
from typing import Any

import numpy as np
import pytest

from hal import LLM, SamplingParams
from hal.config import BUNDLED_MODEL
from hal.constrained import grammars
from hal.constrained.constraint import Constraints, masks
from hal.engine.text import TokenBytes, load_tokenizer
from hal.errors import RequestError
from hal.features.masks import mask_fields

VOCAB, EOS = 16, 2
CHOICES = ("12", "13+1", "4", "44", "444=")
PROMPTS = ["37+85=", "1+1=", "20+20=", "9+9=", "123+456=", "7+7="]
EXPRESSIONS = ["[5-9]{6}", "(3[+]4|3[+]5)=[12]{2,9}=", "1[0-9]+", "[0-9]{3}[+][0-9]{3}=", None, "9{30}"]


def params(**options: Any) -> list[SamplingParams]:
    return [SamplingParams(max_tokens=32, regex=expression, seed=i, temperature=(0.0, 1.5)[i % 2], **options)
            for i, expression in enumerate(EXPRESSIONS)]


def check(outputs: list[Any]) -> list[list[int]]:
    """Every output matches its expression as a whole. Returns the tokens."""
    for output, expression in zip(outputs, EXPRESSIONS, strict=True):
        if expression is not None:
            assert output.finish_reason == "stop" and re.fullmatch(expression, output.text), (expression, output.text)
    return [list(output.token_ids) for output in outputs]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    with LLM(device="cpu", num_blocks=64) as llm:
        free = llm.generate(PROMPTS[0], SamplingParams(max_tokens=8))[0].text
        found = check(llm.generate(PROMPTS, params()))
    assert not re.fullmatch(EXPRESSIONS[0] or "", free)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    {"async_scheduling": True}, {"steps_per_message": 4}, {"speculate": "ngram"}, {"block_size": 4, "num_blocks": 12},
    {"block_size": 4, "num_blocks": 12, "num_cpu_blocks": 16, "async_scheduling": True}, {"max_num_seqs": 2}], ids=str)
def test_grammars_hold_and_change_nothing_else(options: dict[str, Any], expected: list[list[int]]) -> None:
    with LLM(**{"device": "cpu", "num_blocks": 64, "max_model_len": 40, **options}) as llm:
        for _ in range(2):  # the second time from the prefix cache
            assert check(llm.generate(PROMPTS, params())) == expected
        stats = llm.stats()
    assert stats.preemptions or "num_blocks" not in options
    assert stats.accepted_tokens or "speculate" not in options


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"tp": 2, "wire": "request"}, {"pp": 2, "speculate": "ngram"}], ids=str)
def test_grammars_hold_in_every_layout(options: dict[str, Any], expected: list[list[int]]) -> None:
    with LLM(device="cpu", num_blocks=64, **options) as llm:
        assert check(llm.generate(PROMPTS, params())) == expected


def test_a_restart_goes_on_with_the_grammar(expected: list[list[int]]) -> None:
    with LLM(device="cpu", num_blocks=64, async_scheduling=True) as llm:
        numbers = [llm.add_request(prompt, each) for prompt, each in zip(PROMPTS, params(), strict=True)]
        done: dict[int, Any] = {}
        for step in range(100):
            done |= {output.request_id: output for output in llm.step() if output.finish_reason}
            if step == 3:
                llm.restart()
        assert not llm.unfinished
    assert check([done[number] for number in numbers]) == expected


def reference(text: str) -> set[int]:
    """The tokens that may follow a text which begins one of CHOICES."""
    names = {token: TOKENS[token].decode() for token in range(4, VOCAB)}
    found = {token for token, name in names.items() if any(choice.startswith(text + name) for choice in CHOICES)}
    return found | ({EOS} if text in CHOICES else set())


TOKENS = TokenBytes.of(TOKENIZER := load_tokenizer(str(BUNDLED_MODEL)))


def test_masks_are_those_of_a_reference_also_behind_drafts() -> None:
    made = Constraints(VOCAB, [EOS], TOKENS)
    drafts = [TOKENIZER.convert_tokens_to_ids(char) for char in "13+1"]
    wrong = [drafts[0], drafts[0], drafts[1]]  # the second one is not allowed, so nothing behind it is accepted
    fours = TOKENIZER.convert_tokens_to_ids("4")
    output: list[int] = []
    constraint = made.of(SamplingParams(choice=CHOICES))
    assert constraint is not None
    for _ in range(3):
        begun = "".join(TOKENS[token].decode() for token in output)
        for given, valid in ((drafts, 4), (wrong, 1), ([], 0)) if not output else (([], 0), ([fours], 1)):
            if len(output) == 2 and given:
                continue
            [found] = masks([(constraint, output, given)], VOCAB)
            assert found.shape == (1 + len(given), 1)
            for place in range(valid + 1):
                text = begun + "".join(TOKENS[token].decode() for token in given[:place])
                assert {i for i in range(VOCAB) if found[place, 0] >> i & 1} == reference(text), (text, place)
        output.append(fours)
    packed = mask_fields({3: found}, VOCAB)
    assert packed["mask_rows"].tolist() == [3] and packed["token_masks"].dtype == np.int32


@pytest.mark.parametrize(("wrong", "said"), [
    ({"regex": "[0-9"}, "regex is not usable"), ({"json_schema": '{"type": "nothing"}'}, "json_schema is not usable"),
    ({"json_schema": "{"}, "json_schema is not usable"), ({"json_schema": {"unevaluatedItems": 3}}, "json_schema"),
    ({"grammar": "begin: /a/"}, "grammar is not usable"), ({"regex": "[a-z]+"}, "no token of the vocabulary"),
    ({"choice": ["1", "2"], "regex": "1"}, "one grammar"), ({"regex": "1", "ignore_eos": True}, "ignore_eos"),
    ({"json_schema": {1: {2}}}, "JSON can hold"), ({"grammar": ""}, "not empty"), ({"choice": [""]}, "choice")],
    ids=str)
def test_a_grammar_that_cannot_be_used_is_refused_alone(wrong: dict[str, Any], said: str, shared: LLM) -> None:
    number = shared.add_request(PROMPTS[0], SamplingParams(max_tokens=2, regex="[0-9]{9}"))
    with pytest.raises(RequestError, match=re.escape(said)):
        try:
            shared.add_request(PROMPTS[1], SamplingParams(**wrong))
        except RequestError as error:
            raise RequestError(str(error)) from None
    done = [output for _ in range(9) for output in shared.step() if output.finish_reason]
    assert [(output.request_id, output.finish_reason) for output in done] == [(number, "length")]


@pytest.fixture(scope="module")
def shared() -> Any:
    with LLM(device="cpu", num_blocks=64) as llm:
        yield llm


@pytest.mark.parametrize("ahead", [False, True])
def test_a_grammar_that_no_token_goes_on_with_ends_its_request_alone(ahead: bool) -> None:
    with LLM(device="cpu", num_blocks=64, async_scheduling=ahead) as llm:
        stuck, other = llm.generate(PROMPTS[:2], [SamplingParams(regex="1[ab]"), SamplingParams(regex="[0-9]{5}")])
        assert stuck.finish_reason == "error" and isinstance(stuck.error, RequestError) and stuck.text == "1"
        assert other.finish_reason == "stop" and len(other.text) == 5
        assert llm.generate(PROMPTS[1], SamplingParams(regex="[0-9]{5}"))[0].text == other.text


def test_without_llguidance_the_request_is_refused(shared: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    grammars.llguidance.cache_clear()
    with pytest.raises(RequestError, match="llguidance") as caught:
        shared.add_request("1+1=", SamplingParams(regex="1234"))
    assert "hal-runtime[constrained]" in str(caught.value)
    monkeypatch.undo()
    grammars.llguidance.cache_clear()
