"""hal's HTTP server as OpenAI's client sees it, and as clients see it that are wrong, slow or gone."""

from __future__ import annotations

import asyncio
import json
import math
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentences

from hal import LLM, SamplingParams
from hal.config import BUNDLED_MODEL
from hal.engine.llm import LLM as Engine

sys.path.insert(0, str(Path(__file__).parent))
openai = pytest.importorskip("openai", reason="needs the extra `serve` and the package openai")
from http_server import Limits, Serving, serving  # noqa: E402 (it needs them as well)

from hal.serve import app  # noqa: E402

NULL: dict[str, Any] = {"device": "null", "max_model_len": 256, "num_blocks": 400, "max_num_seqs": 8}
USER = [{"role": "user", "content": "1"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def here() -> Iterator[Serving]:
    """The bundled model, with a template that shows what reaches it: the number of tools is the first summand."""
    with serving(device="cpu") as made:
        made.engine.llm.tokenizer.chat_template = (
            "{% if tools %}{{ tools | length }}+{% endif %}{% for m in messages %}{{ m['content'] }}{% endfor %}=")
        yield made


@pytest.fixture(scope="module")
def null() -> Iterator[Serving]:
    with serving(**NULL) as made:
        made.engine.llm.tokenizer.chat_template = None
        yield made


def until(true: Callable[[], Any]) -> None:
    for _ in range(20_000):
        if true():
            return
        time.sleep(0.005)
    raise AssertionError("it never becomes true")


def is_idle(made: Serving) -> bool:
    stats, engine = made.engine.stats(), made.engine
    return not (stats.running or stats.waiting or stats.used_blocks or engine._open or engine._streams
                or made.server.active)


def ask(made: Serving, path: str, body: Any = None, **headers: str) -> tuple[int, Any, Any]:
    """Status, headers and body of a plain request; a body that is no text is sent as JSON."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request("http://{}:{}{}".format(*made.address, path), data,
                                     {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.headers, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, json.loads(error.read() or b"null")


def test_completions(here: Serving) -> None:
    made = here.client.completions.create(model="the-model", prompt=["37+85=", "123+456="], temperature=0, n=2)
    assert [choice.text for choice in made.choices] == ["122", "122", "579", "579"]
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
    assert made.choices[0].finish_reason == "stop" and made.usage is not None
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (6 + 8, 4 * 4)
    assert here.client.models.list().data[0].id == "the-model"


def test_a_stream_is_the_same_as_a_whole_completion_and_ends_with_usage(null: Serving) -> None:
    options: dict[str, Any] = {"model": "the-model", "prompt": [[5, 6, 7], [8, 9]], "n": 2, "seed": 3, "max_tokens": 40,
                               "stop": ["42", "9"], "frequency_penalty": 0.5, "extra_body": {"top_k": 8}}
    whole = null.client.completions.create(**options)
    texts, reasons, usage = [""] * 4, [""] * 4, None
    for chunk in null.client.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        assert usage is None and bool(chunk.usage) == (not chunk.choices)
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices] and len(set(texts)) > 1
    assert reasons == [choice.finish_reason for choice in whole.choices] and usage == whole.usage
    assert {getattr(choice, "stop_reason", None) for choice in whole.choices} & {"42", "9"}


def test_echo_and_logprobs_are_those_of_the_engine(here: Serving) -> None:
    with LLM(device="cpu") as llm:
        expected, = llm.generate(["37+85="], SamplingParams(max_tokens=3, logprobs=2, prompt_logprobs=2))
        whole, = llm.generate(["37+85=122"], SamplingParams(max_tokens=0, prompt_logprobs=0))  # rounded in its own way
    assert whole.prompt_logprobs is not None and expected.logprobs is not None and expected.prompt_logprobs is not None
    made = here.client.completions.create(model="the-model", prompt="37+85=", temperature=0, max_tokens=3, echo=True,
                                          logprobs=2)
    choice = made.choices[0]
    found = choice.logprobs
    assert choice.text == "37+85=122" and found is not None and found.tokens == list("37+85=122")
    assert found.text_offset == list(range(9)) and found.token_logprobs is not None and found.top_logprobs is not None
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    known = [*expected.prompt_logprobs[1:], *expected.logprobs]
    np.testing.assert_allclose(np.array(found.token_logprobs[1:], float), [each.logprob for each in known if each])
    assert all(len(top) == 2 for top in found.top_logprobs[1:])
    score = here.client.completions.create(model="", prompt="37+85=122", max_tokens=0, echo=True, logprobs=0).choices[0]
    assert score.text == "37+85=122" and score.logprobs is not None and score.logprobs.token_logprobs is not None
    scored = np.array(score.logprobs.token_logprobs[1:], float)
    np.testing.assert_allclose(scored, [each.logprob for each in whole.prompt_logprobs if each], atol=1e-5)


def test_chat_with_tools_logprobs_and_streams(here: Serving) -> None:
    messages: Any = [{"role": "system", "content": "3"},
                     {"role": "user", "content": [{"type": "text", "text": "7+"}, {"type": "text", "text": "85"}]}]
    made = here.client.chat.completions.create(model="the-model", messages=messages, temperature=0, logprobs=True,
                                               top_logprobs=2)
    choice = made.choices[0]
    assert choice.message.content == "122" and choice.message.role == "assistant" and choice.finish_reason == "stop"
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert [token.token for token in choice.logprobs.content] == ["1", "2", "2", "<eos>"]
    assert all(len(token.top_logprobs) == 2 and math.isfinite(token.logprob) for token in choice.logprobs.content)
    chunks = list(here.client.chat.completions.create(model="the-model", messages=messages, temperature=0, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "122"
    asked: dict[str, Any] = {"model": "the-model", "messages": [{"role": "user", "content": "85"}], "temperature": 0}
    with_tools = here.client.chat.completions.create(**asked, tools=[TOOL] * 3)  # 3+85=
    assert with_tools.choices[0].message.content == "88"
    without = here.client.chat.completions.create(**asked, tools=[TOOL], tool_choice="none", max_tokens=2)
    assert without.usage is not None and without.usage.prompt_tokens == len("85=")


def test_structured_output(here: Serving) -> None:
    made = here.client.completions.create(model="", prompt="1+1=", extra_body={"choice": ["7+5", "99"]})
    assert made.choices[0].text in ("7+5", "99")
    schema = {"name": "number", "schema": {"enum": [12, 345]}}
    chat = here.client.chat.completions.create(model="", messages=[{"role": "user", "content": "1+1"}],
                                               response_format={"type": "json_schema", "json_schema": schema})
    assert chat.choices[0].message.content in ("12", "345") and chat.choices[0].finish_reason == "stop"
    for form, param in (({"type": "xml"}, "response_format"), ({"type": "json_schema", "json_schema": {
            "name": "x", "schema": {"type": "no such type"}}}, "json_schema")):
        status, _, answer = ask(here, "/v1/chat/completions", {"messages": USER, "response_format": form})
        assert status == 400 and answer["error"]["param"] == param, answer
    assert ask(here, "/v1/completions", {"prompt": "1", "regex": "("})[2]["error"]["param"] == "regex"


@pytest.mark.parametrize(("path", "body", "param", "text"), [
    ("completions", {"prompt": "1", "max_token": 3}, "max_token", "did you mean 'max_tokens'"),
    ("completions", {"prompt": "1", "temperature": -1}, "temperature", "temperature is not usable"),
    ("completions", {"prompt": "1", "top_p": "high"}, "top_p", "top_p is not usable"),
    ("completions", {"prompt": "1", "n": 0}, "n", "1 to 128"),
    ("completions", {"prompt": "1", "n": True}, "n", "integer"),
    ("completions", {"prompt": "1", "stream": "yes"}, "stream", "bool"),
    ("completions", {"prompt": "1", "best_of": 3}, "best_of", "only n"),
    ("completions", {"prompt": "1", "suffix": "2"}, "suffix", "at their end"),
    ("completions", {"prompt": "1", "logprobs": 99}, "logprobs", "larger than the vocabulary"),
    ("completions", {"prompt": "1", "logit_bias": {"99": 1}}, "logit_bias", "out of the vocabulary"),
    ("completions", {"prompt": "1", "allowed_token_ids": [99]}, "allowed_token_ids", "out of the vocabulary"),
    ("completions", {"prompt": "1", "regex": "("}, "regex", "regex is not usable"),
    ("completions", {"prompt": "1", "adapter": "other"}, "adapter", "no adapter of this name"),
    ("completions", {"prompt": "1", "stream": True, "stream_options": {"usage": True}}, "usage", "no parameter"),
    ("completions", {"prompt": "1", "prompt_logprobs": 1}, "prompt_logprobs", "no parameter"),
    ("chat/completions", {"messages": USER, "json_schema": {}, "response_format": {"type": "json_object"}},
     "response_format", "give one"),
    ("completions", {}, "prompt", "missing"), ("completions", {"prompt": []}, "prompt", "empty"),
    ("completions", {"prompt": "1" * 300}, "prompt", "longer than the context"),
    ("completions", {"prompt": [5, 99], "stream": True}, "prompt", "out of the vocabulary"),
    ("completions", {"prompt": ["1", [99]]}, "prompt", "out of the vocabulary"),
    ("completions", [], None, "not a JSON object"), ("completions", b"{", None, "not JSON"),
    ("chat/completions", {"messages": []}, "messages", "empty"),
    ("chat/completions", {"messages": ["hello"]}, "messages", "role"),
    ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "not text"),
    ("chat/completions", {"messages": USER, "top_logprobs": 1}, "top_logprobs", "logprobs"),
    ("chat/completions", {"messages": USER, "tool_choice": "required"}, "tool_choice", "with tools"),
    ("chat/completions", {"messages": USER}, "messages", "no chat template"),
    ("embeddings", {"input": "1"}, "input", "makes no embeddings"),
    ("embeddings", {}, "input", "missing"),
])
def test_what_is_wrong_is_named(null: Serving, path: str, body: Any, param: str | None, text: str) -> None:
    status, headers, answer = ask(null, f"/v1/{path}", body)
    assert status == 400 and answer["error"]["param"] == param and text in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error" and headers["x-request-id"]
    until(lambda: is_idle(null))


def test_errors_have_the_classes_of_the_client(null: Serving) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature is not usable") as caught:
        null.client.completions.create(model="the-model", prompt="1", temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as caught:
        null.client.completions.create(model="the-model", prompt="1" * 300)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError, match="has no model 'other'"):
        null.client.completions.create(model="other", prompt="1")
    assert ask(null, "/v1/nothing", {})[0] == 404 and ask(null, "/v1/completions")[0] == 405
    assert ask(null, "/v1/completions", {"prompt": "1"}, **{"Content-Type": "text/plain"})[0] == 415


def test_a_key_and_limits_guard_the_api(monkeypatch: pytest.MonkeyPatch) -> None:
    async def late(*given: Any) -> None:
        await events(*given)
        await asyncio.sleep(0.1)

    events = app._Events.__call__
    limits = Limits(requests=2, choices=3, body=1000)
    with serving(**NULL, api_key="secret", limits=limits, max_prompt_tokens=9) as made:
        assert made.client.completions.create(model="", prompt="1", max_tokens=1).choices[0].finish_reason == "length"
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=made.client.base_url, api_key="guess", max_retries=0).models.list()
        assert ask(made, "/health")[0] == 200 and ask(made, "/metrics")[0] == 200  # for those who watch it
        key = {"Authorization": "Bearer secret"}
        assert ask(made, "/v1/completions", {"prompt": "1" * 1000}, **key)[0] == 413
        error = ask(made, "/v1/completions", {"prompt": "1" * 10}, **key)[2]["error"]
        assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
        assert ask(made, "/v1/completions", {"prompt": "1", "n": 4}, **key)[2]["error"]["param"] == "prompt"
        step = slow_steps(made, 0.1)
        streams = [made.client.completions.create(model="", prompt="1", max_tokens=200, stream=True,
                                                  extra_body={"ignore_eos": True}) for _ in range(2)]
        status, headers, answer = ask(made, "/v1/completions", {"prompt": "1"}, **key)
        assert status == 429 and headers["retry-after"] and "more than 2" in answer["error"]["message"]
        made.engine.llm.step = step  # type: ignore[method-assign]
        for stream in streams:
            assert list(stream)[-1].choices[0].finish_reason == "length"
        monkeypatch.setattr(app._Events, "__call__", late)
        for _ in range(3):  # a stream that its client has read to the end counts no more
            for stream in [made.client.completions.create(model="", prompt="1", max_tokens=1, stream=True)
                           for _ in range(2)]:
                assert list(stream)


def slow_steps(made: Serving, seconds: float = 0.03) -> Any:
    step = made.engine.llm.step
    made.engine.llm.step = lambda **k: (time.sleep(seconds), step(**k))[1]  # type: ignore[method-assign]
    return step


def held_back(made: Serving) -> Any:
    """Of the next request, all tokens but the first come only while others run, so that it does not end before them in
    a test that is not scheduled for a while. Returns the step as it was."""
    step, held = made.engine.llm.step, list[Any]()

    def beside_others(**options: Any) -> Any:
        streams = [*made.engine._streams.values()]
        held[:] = held or streams[:1]
        if streams == held and held[0].told:
            time.sleep(0.001)
            return []
        return step(**options)

    made.engine.llm.step = beside_others  # type: ignore[method-assign]
    return step


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_requests(stream: bool) -> None:
    with serving(**NULL) as made:
        slow_steps(made, 0.1)
        body = json.dumps({"prompt": ["1", "2", "3"], "n": 2, "max_tokens": 200, "stream": stream, "ignore_eos": True})
        connections = [made.open("/v1/completions", body) for _ in range(3)]
        until(lambda: made.engine.stats().running == 8 and len(made.engine._open) == 18)  # none is still on its way
        if stream:
            assert b"200 OK" in connections[0].recv(100)
        for connection in connections:
            connection.close()
        until(lambda: is_idle(made))
        assert made.engine.stats().decode_tokens < 8 * 100
        assert made.server.metrics.finished["abort"] == 18


def test_a_client_that_goes_away_while_it_sends_is_no_error(null: Serving, caplog: pytest.LogCaptureFixture) -> None:
    connection = null.open("/v1/completions", '{"prompt": "1"}')
    answer = b""
    while not answer.endswith(b"}"):  # closing with bytes unread resets the connection, and the second POST is lost
        answer += connection.recv(4096)
    until(lambda: is_idle(null))  # else the first POST is taken for the second below
    with caplog.at_level("INFO"):
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
                           b"Content-Length: 500\r\n\r\n{")
        until(lambda: null.server.active)
        connection.close()
        until(lambda: is_idle(null) and any(" 499 " in message for message in caplog.messages))
    assert not any(record.exc_info for record in caplog.records)


@pytest.mark.slow
def test_a_client_that_does_not_read_slows_nobody_and_is_not_written_to(tmp_path: Path) -> None:
    """Its connection takes some kilobytes. Then its outputs are merged until it reads."""
    config = json.loads((BUNDLED_MODEL / "config.json").read_text()) | {"max_position_embeddings": 512}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with serving(str(tmp_path), **{**NULL, "max_model_len": 512}) as made:
        options = {"prompt": [5, 6], "max_tokens": 400, "stream": True, "ignore_eos": True, "logprobs": 16}
        held_back(made)
        slow = made.open("/v1/completions", json.dumps(options))
        until(lambda: made.engine._streams)
        whole = 0
        while made.engine._streams:  # others are served all the time
            made.client.completions.create(model="", prompt=[[7], [8]], max_tokens=30)
            whole += 1
        assert whole > 3  # the engine has made all tokens, and the client has not read them
        until(lambda: made.server.active == 1)  # an answer counts a moment longer than its client waits for it
        time.sleep(0.1)
        assert made.server.metrics.generation_tokens < 300 + 60 * whole
        data = b""
        while part := slow.recv(1 << 20):
            data += part
            if data.endswith(b"0\r\n\r\n"):
                break
        chunks = [json.loads(line[6:]) for line in data.split(b"\n") if line.startswith(b"data: {")]
        assert sum(len(chunk["choices"][0]["token_ids"]) for chunk in chunks) == 400  # it has no tokenizer
        sizes = [len(chunk["choices"][0]["logprobs"]["tokens"]) for chunk in chunks]
        assert sum(sizes) == 400 and sizes[-1] > 100
        slow.close()
        until(lambda: is_idle(made))


def test_a_failure_in_a_stream_is_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(**NULL, retries=0) as made:
        step = Engine.step

        def fails(llm: Engine, *, text: bool = True) -> Any:
            outputs = step(llm, text=text)
            if any(len(output.token_ids) == 20 for output in outputs):
                raise ArithmeticError("out of luck")
            return outputs

        monkeypatch.setattr(Engine, "step", fails)
        options: dict[str, Any] = {"model": "", "prompt": [5], "max_tokens": 40, "extra_body": {"ignore_eos": True}}
        with pytest.raises(openai.APIError, match="out of luck"):
            for _ in made.client.completions.create(**options, stream=True):
                pass
        with pytest.raises((openai.InternalServerError, openai.APIStatusError), match="out of luck"):
            made.client.completions.create(**options)
        monkeypatch.undo()
        assert made.client.completions.create(**options).choices[0].finish_reason == "length"
        assert ask(made, "/health")[0] == 200 and made.engine.failures == 2


def test_embeddings(tmp_path: Path) -> None:
    path, texts = sentences.save("bert-mean", tmp_path), [[5, 6, 7], [8, 9]]
    with LLM(str(path), device="cpu", dtype="float32") as llm:
        expected = llm.embed(texts)
    with serving(str(path), device="cpu", dtype="float32") as made:
        for form in ({}, {"encoding_format": "float"}):  # the client asks for base64 by itself
            found = made.client.embeddings.create(model="the-model", input=texts, **form)  # type: ignore[arg-type]
            np.testing.assert_allclose([each.embedding for each in found.data], expected, atol=1e-6)
            assert found.usage.prompt_tokens == 5
        for body, param in (({"input": [[5] * 600], "truncate": False}, "input"), ({"input": [[5]], "dimensions": 3},
                            "dimensions"), ({"input": []}, "input"), ({"input": 5}, "input"),
                            ({"input": [[5]], "encoding_format": "int8"}, "encoding_format")):
            status, _, answer = ask(made, "/v1/embeddings", body)
            assert status == 400 and answer["error"]["param"] == param, answer
            long = body["input"] == [[5] * 600]
            assert (answer["error"]["code"] == "context_length_exceeded") == long
        with pytest.raises(openai.BadRequestError, match="generates no tokens"):
            made.client.completions.create(model="", prompt="1")


def test_metrics_are_prometheus_text_and_add_up(null: Serving) -> None:
    before = read_metrics(null)
    null.client.completions.create(model="", prompt=[[5, 6], [7]], max_tokens=9, extra_body={"ignore_eos": True})
    after = read_metrics(null)
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["hal:generation_tokens_total"] == 18 and grown["hal:prompt_tokens_total"] == 3
    assert grown['hal:request_success_total{finished_reason="length"}'] == 2
    assert grown["hal:time_to_first_token_seconds_count"] == grown["hal:e2e_request_latency_seconds_count"] == 2
    assert after["hal:num_requests_running"] == 0 and after["hal:kv_cache_usage_perc"] == 0
    buckets = [value for name, value in after.items() if name.startswith("hal:inter_token_latency_seconds_bucket")]
    assert buckets == sorted(buckets) and buckets[-1] == after["hal:inter_token_latency_seconds_count"]


def read_metrics(made: Serving) -> dict[str, float]:
    lines = ask(made, "/metrics")[2].splitlines()
    sample = re.compile(r'(hal:[a-z0-9_]+(?:\{[a-z_]+="[^"]*"\})?) ([0-9.e+-]+)')
    found = [sample.fullmatch(line) for line in lines if not line.startswith("#")]
    assert found and all(found)
    return {match[1]: float(match[2]) for match in found if match}


def test_ids_health_and_the_page(null: Serving, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "hal.serve"):
        assert ask(null, "/v1/models", **{"X-Request-Id": "mine-7"})[1]["x-request-id"] == "mine-7"
        forged = ask(null, "/v1/models", **{"X-Request-Id": "two words"})[1]["x-request-id"]
        until(lambda: len(caplog.messages) == 2)
    assert re.fullmatch("[0-9a-f]{32}", forged) and caplog.messages[0].startswith("mine-7 GET /v1/models 200")
    assert json.loads(ask(null, "/health")[2]) == {"status": "ok", "error": None}
    page = ask(null, "/")[2]
    assert "<title>" in page and not re.search(r"(src|href)=.?(https?:)?//", page)  # nothing from elsewhere
