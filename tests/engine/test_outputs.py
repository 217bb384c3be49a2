"""What an output shows and says: several of a prompt, special tokens, what stopped it, and prompts that are scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hal import LLM, SamplingParams
from hal.cli import main
from hal.engine.sequence import derive_seed
from hal.errors import RequestError

PROMPT, EOS = "37+85=", 2  # the bundled model answers "122"


@pytest.fixture(scope="module")
def llm() -> Any:
    with LLM(device="cpu", num_blocks=64) as llm:
        yield llm


def test_n_outputs_are_those_of_requests_with_seeds_of_their_own(llm: LLM) -> None:
    common = {"temperature": 40.0, "max_tokens": 5, "ignore_eos": True}
    outputs = llm.generate(["1+1=", "2+2="], SamplingParams(n=3, seed=7, **common))
    assert [output.index for output in outputs] == [0, 0, 0, 1, 1, 1]
    for i, output in enumerate(outputs):
        seed = (7, derive_seed(7, 1), derive_seed(7, 2))[i % 3]
        [alone] = llm.generate(("1+1=", "2+2=")[i // 3], SamplingParams(seed=seed, **common))
        assert alone.token_ids == output.token_ids
    assert len({tuple(output.token_ids) for output in outputs}) == 3
    assert len({tuple(o.token_ids) for o in llm.generate("1+1=", SamplingParams(n=4, **common))}) == 4  # without a seed
    for call in (llm.add_request, llm.stream, llm.prepare):
        with pytest.raises(RequestError, match="one output"):
            call("1+1=", SamplingParams(n=2))


@pytest.mark.parametrize(("given", "text", "reason"), [
    ({}, "122", None), ({"stop": ["2", "22"]}, "1", "2"), ({"stop": "22"}, "1", "22"),
    ({"stop": "22", "include_stop_str_in_output": True}, "122", "22"),
    ({"stop_token_ids": [6]}, "1", 6), ({"stop_token_ids": [6], "include_stop_str_in_output": True}, "12", 6),
    ({"stop": "<eos>", "ignore_eos": True}, "122", "<eos>"),
    ({"stop": "<eos>", "ignore_eos": True, "skip_special_tokens": False}, "122", "<eos>"),
    ({"stop": "2<e", "ignore_eos": True, "skip_special_tokens": False}, "12", "2<e"),
    ({"include_stop_str_in_output": True}, "122", None),
    ({"include_stop_str_in_output": True, "skip_special_tokens": False}, "122<eos>", None),
    ({"skip_special_tokens": False}, "122", None)], ids=str)
def test_what_stopped_an_output_is_said_and_shown_if_asked_for(given: dict[str, Any], text: str, reason: Any,
                                                              llm: LLM) -> None:
    params = SamplingParams(**given)
    [output] = llm.generate(PROMPT, params)
    assert (output.text, output.finish_reason, output.stop_reason) == (text, "stop", reason)
    *_, last = llm.stream(PROMPT, params)
    assert (last.text, last.stop_reason) == (text, reason)


def test_special_tokens_are_shown_by_the_tokenizers_names(llm: LLM) -> None:
    params = SamplingParams(ignore_eos=True, max_tokens=12, temperature=3.0, skip_special_tokens=False)
    for output in llm.generate([PROMPT] * 8, params):
        plain = "".join(llm.tokenizer.convert_ids_to_tokens(output.token_ids))
        assert output.text == plain and output.stop_reason is None


@pytest.mark.parametrize("options", [{}, {"async_scheduling": True}, {"speculate": "ngram"}, {"steps_per_message": 4},
                                     {"max_num_batched_tokens": 4}], ids=str)
def test_no_new_tokens_score_the_prompt(options: dict[str, Any], llm: LLM) -> None:
    [expected] = llm.generate(PROMPT, SamplingParams(max_tokens=1, prompt_logprobs=2))
    with LLM(device="cpu", num_blocks=64, **options) as other:
        params = SamplingParams(max_tokens=0, prompt_logprobs=2, logprobs=1, stop=["1"])
        score, free = other.generate([PROMPT] * 2, [params, SamplingParams()])
        [only] = other.stream(PROMPT, params)
    for output in (score, only):
        assert (output.token_ids, output.text, output.logprobs, output.finish_reason) == ([], "", [], "length")
        assert [round(entry.logprob, 3) if entry else None for entry in output.prompt_logprobs or ()] == [
            round(entry.logprob, 3) if entry else None for entry in expected.prompt_logprobs or ()]
    assert free.text == "122"


def test_a_score_that_a_restart_interrupts_is_complete(llm: LLM) -> None:
    with LLM(device="cpu", num_blocks=64, max_num_batched_tokens=2) as other:
        number = other.add_request(PROMPT, SamplingParams(max_tokens=0, prompt_logprobs=0))
        other.step()
        other.restart()
        done = [output for _ in range(9) for output in other.step() if output.finish_reason]
    assert [output.request_id for output in done] == [number] and done[0].token_ids == []
    assert len(done[0].prompt_logprobs or ()) == 6 and None not in (done[0].prompt_logprobs or [None])[1:]


def test_the_command_line_has_these_parameters(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    requests = tmp_path / "requests"
    requests.write_text('{"prompt": "1+1=", "id": "two", "n": 2}\n{"prompt": "1+2=", "json_schema": {"const": 7}}\n'
                        '{"prompt": "1+2=", "regex": "("}\n')
    status = main(["generate", "--device", "cpu", "--num-blocks", "64", "--json", "--ordered", "--input", str(requests),
                   "--stop-token-ids", "6"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert status == 1 and [(line["index"], line.get("id")) for line in lines] == [(0, "two"), (1, "two"), (2, None),
                                                                                  (3, None)]
    assert (lines[0]["text"], lines[0]["stop_reason"], lines[2]["text"]) == ("", 6, "7")
    assert "regex is not usable" in lines[3]["error"]
    assert main(["generate", "--device", "cpu", "--num-blocks", "64", "--n", "2", "--choice", "7", "1+1="]) == 0
    assert capsys.readouterr().out == "> 1+1=\n7\n> 1+1=\n7\n"
