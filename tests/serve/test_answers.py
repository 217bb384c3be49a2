"""Events of a stream, and the errors of the engine in OpenAI's form."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("starlette", reason="needs the extra `serve`")
from hal.engine.request_output import RequestOutput
from hal.errors import HalError, LengthError, RequestError
from hal.sampling.params import SamplingParams
from hal.serve.answers import Answer
from hal.serve.async_llm import _again
from hal.serve.protocol import Call, as_api_error

# Every character, half surrogate pairs included: a text of bytes that are not UTF-8 may hold them.
TEXTS = st.text(st.characters(exclude_categories=()), max_size=8)


@given(parts=st.lists(st.tuples(TEXTS, st.integers(0, 2)), min_size=1), chat=st.booleans(), index=st.integers(0, 3),
       top=st.sampled_from([None, 0]), tokenizer=st.booleans())
def test_every_event_parses_to_the_chunk_that_it_stands_for(parts: list[tuple[str, int]], chat: bool, index: int,
                                                            top: int | None, tokenizer: bool) -> None:
    llm: Any = SimpleNamespace(tokenizer=object() if tokenizer else None)
    call = Call("model", [], [], stream=True, top=top)
    written, plain = (Answer(llm, call, index, chat) for _ in range(2))
    output = RequestOutput(0, 0, "1", [1], logprobs=None if top is None else [])
    for number, (text, tokens) in enumerate(parts):
        output.text += text
        output.token_ids.extend([7] * tokens)
        output.finish_reason = "length" if number == len(parts) - 1 else None
        event, chunk = written.json(output), plain.chunk(output)
        assert (None if event is None else json.loads(event)) == chunk
        assert event is None or (event.isascii() and "\n" not in event)  # a line break would end the event


@pytest.mark.parametrize(("error", "param", "code"), [
    (LengthError("this is too much"), "prompt", "context_length_exceeded"),
    (RequestError("the prompt is longer than max_tokens"), "prompt", None),
    (RequestError("this is not usable", param="top_k"), "top_k", None)])
def test_the_kind_of_an_error_and_not_its_text_says_what_a_client_gets(error: HalError, param: str,
                                                                       code: str | None) -> None:
    for each in (error, _again(error)):
        made = as_api_error(each)
        assert (made.status, made.param, made.code) == (400, param, code)


@pytest.mark.parametrize(("options", "param"), [
    ({"temperature": -1}, "temperature"), ({"stop": [""]}, "stop"), ({"stop": "1" * 5000}, "stop"),
    ({"logit_bias": {"x": 1}}, "logit_bias"), ({"logit_bias": {1: "x"}}, "logit_bias"),
    ({"logit_bias": 3}, "logit_bias"),
    ({"bad_words": ["1"] * 5000}, "bad_words"), ({"regex": "1" * (1 << 20)}, "regex"),
    ({"allowed_token_ids": []}, "allowed_token_ids"), ({"min_tokens": 9, "max_tokens": 3}, "min_tokens"),
    ({"regex": "1", "ignore_eos": True}, "ignore_eos"), ({"regex": "1", "choice": ["1"]}, None)])
def test_a_refused_parameter_is_named_by_the_error(options: dict[str, Any], param: str | None) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**options)
    assert caught.value.param == param if param else caught.value.param in options
