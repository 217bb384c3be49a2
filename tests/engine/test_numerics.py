"""A model that computes NaN for some of its requests: those end with an error, the others do not notice."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import VOCAB
from safetensors.torch import load_file, save_file

from hal.engine.blocks import extend_hashes
from hal.engine.llm import LLM
from hal.engine.request_output import RequestOutput
from hal.errors import NumericsError
from hal.sampling.params import SamplingParams

Checkpoint = Callable[[str], Path]
GREEDY = SamplingParams(max_tokens=12, logprobs=1)
PROMPTS = [[(7 * i + 3 * k) % 150 + 1 for k in range(length)] for i, length in enumerate((5, 21, 13, 9, 30))]
ENGINE = {"device": "cpu", "block_size": 4, "num_blocks": 60, "max_num_seqs": 4, "max_model_len": 64}


def damaged(source: Path, into: Path, token: int) -> Path:
    """A copy of a checkpoint in which one token's embedding is NaN."""
    shutil.copytree(source, into)
    weights = load_file(into / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = math.nan
    save_file(weights, into / "model.safetensors", {"format": "pt"})
    return into


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.token_ids for output in outputs]


@pytest.fixture
def clean(checkpoint: Checkpoint) -> list[list[int]]:
    """Each prompt's tokens from the sound checkpoint, one prompt at a time."""
    with LLM(str(checkpoint("qwen3")), **ENGINE) as llm:
        return [llm.generate(prompt, GREEDY)[0].token_ids for prompt in PROMPTS]


def told_apart(clean: list[list[int]]) -> tuple[int, int]:
    """An output token that only one of the prompts ever comes to, after some others: the prompt, and the place."""
    for i, own in enumerate(clean):
        others = {t for j, other in enumerate(clean) if j != i for t in other}
        for place in range(4, 10):
            if own[place] not in {*own[:place], *others, *(t for p in PROMPTS for t in p)}:
                return i, place
    raise AssertionError("no prompt has a token of its own")


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    {}, {"prefix_caching": False, "max_num_batched_tokens": 8}, {"async_scheduling": True}, {"tp": 2}, {"pp": 2},
    {"tp": 2, "wire": "request", "async_scheduling": True}, {"num_blocks": 20, "num_cpu_blocks": 10}], ids=str)
def test_a_request_ends_alone(options: dict[str, Any], checkpoint: Checkpoint, clean: list[list[int]],
                              tmp_path: Path) -> None:
    """One in its prompt, one after some tokens. Afterwards the others' blocks hold what these left behind."""
    i, place = told_apart(clean)
    model = damaged(checkpoint("qwen3"), tmp_path / "damaged", clean[i][place])
    prompts = [*PROMPTS, [3, clean[i][place], 5, *range(30, 40)]]
    with LLM(str(model), **{**ENGINE, **options}) as llm:
        for _ in range(2):
            *outputs, last = llm.generate(prompts, GREEDY)
            assert tokens(outputs[:i] + outputs[i + 1:]) == clean[:i] + clean[i + 1:]
            assert all(o.error is None and o.finish_reason == "length" for o in outputs[:i] + outputs[i + 1:])
            for output, length in ((outputs[i], place + 1), (last, 0)):
                assert output.finish_reason == "error" and isinstance(output.error, NumericsError)
                assert (output.error.request_id, output.error.position) == (output.request_id, length)
                assert output.logprobs is not None and len(output.token_ids) == len(output.logprobs) == length
            assert outputs[i].token_ids == clean[i][:place + 1]
        assert not llm.unfinished and not any(llm.scheduler.blocks.refs)


@pytest.mark.parametrize("params", [
    {"temperature": 1.0, "seed": 3}, {"temperature": 0.7, "top_k": 5}, {"temperature": 1.0, "top_p": 0.9, "min_p": 0.1},
    {"repetition_penalty": 1.3}, {"prompt_logprobs": 2, "logprobs": 3}], ids=str)
def test_every_kind_of_sampling_ends(params: dict[str, Any], checkpoint: Checkpoint, tmp_path: Path) -> None:
    with LLM(str(damaged(checkpoint("qwen3"), tmp_path / "damaged", 9)), **ENGINE) as llm:
        bad, good = llm.generate([[5, 9, 7], [5, 6, 7]], SamplingParams(max_tokens=5, **params))
        assert (bad.token_ids, bad.finish_reason, bad.text) == ([], "error", "") and good.error is None
        assert "request 0" in str(bad.error) and "float32" in str(bad.error)


def test_a_stream_ends_with_the_error(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with LLM(str(damaged(checkpoint("qwen3"), tmp_path / "damaged", 9)), **ENGINE) as llm:
        seen = [(output.finish_reason, output.error) for output in llm.stream([5, 9, 7], GREEDY)]
        assert len(seen) == 1 and seen[0][0] == "error" and isinstance(seen[0][1], NumericsError)


@pytest.mark.parametrize("shape", ["qwen3", "mistral-window", "llama2-mha"])
def test_padding_may_be_nan(shape: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Warm-up and padding look up token 0, and write the null block, which shorter sequences read behind their own."""
    with LLM(str(checkpoint(shape)), **ENGINE) as llm:
        expected = tokens(llm.generate(PROMPTS, GREEDY))
    assert all(0 not in output for output in expected)
    with LLM(str(damaged(checkpoint(shape), tmp_path / "damaged", 0)), **ENGINE) as llm:
        assert tokens(llm.generate(PROMPTS, GREEDY)) == expected


def poison(llm: LLM, block: int | slice) -> None:
    for cache in llm.executor._worker.cache.device:  # type: ignore[attr-defined]
        cache[:, block] = math.nan


@pytest.mark.parametrize(("length", "column"), [(18, 0), (18, 3), (20, 0), (20, 4)])
def test_a_poisoned_block_is_handed_out_once(length: int, column: int, checkpoint: Checkpoint) -> None:
    """Something wrote NaN into a cached block. Who finds it there ends; who comes next computes the prefix anew. A
    prompt of 20 tokens is cached whole, and has its last block as a copy."""
    prompt, hashes = list(range(11, 11 + length)), list[bytes]()
    longer = [*prompt, 77, 78, 79, 80, 81]
    with LLM(str(checkpoint("qwen3")), **ENGINE) as llm:
        expected = llm.generate(longer, GREEDY)[0].token_ids
        extend_hashes(hashes, lambda start, end: prompt[start:end], 4, column + 1)
        poison(llm, llm.scheduler.blocks.match(hashes)[column])
        assert llm.generate(prompt, GREEDY)[0].finish_reason == "error"
        for _ in range(2):
            assert llm.generate(longer, GREEDY)[0].token_ids == expected


def test_blocks_that_held_nan_are_used_again(checkpoint: Checkpoint) -> None:
    """Whatever freed blocks hold: here all of them NaN, as a request leaves it that was aborted before it was seen."""
    with LLM(str(checkpoint("qwen3")), **ENGINE, prefix_caching=False) as llm:
        expected = tokens(llm.generate(PROMPTS, GREEDY))
        poison(llm, slice(1, None))
        assert tokens(llm.generate(PROMPTS, GREEDY)) == expected


def test_infinite_and_masked_logits(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A head that overflows fp32 for every token gives an error; one whose rows are all but one -inf gives that one."""
    from hal.sampling.sampler import Sampler

    shutil.copytree(checkpoint("qwen3"), tmp_path / "large")
    weights = load_file(tmp_path / "large" / "model.safetensors")
    weights["lm_head.weight"] *= 1e38 / weights["lm_head.weight"].abs().max()
    save_file(weights, tmp_path / "large" / "model.safetensors", {"format": "pt"})
    with LLM(str(tmp_path / "large"), **ENGINE) as llm:
        assert llm.generate([5, 6, 7], GREEDY)[0].finish_reason == "error"
    logits = torch.full((1, VOCAB), -torch.inf)
    logits[0, 44] = -3e38
    assert Sampler().greedy(logits).tolist() == [44]
