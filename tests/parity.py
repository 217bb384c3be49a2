"""Whole-stack parity with transformers, for the tests of any device: what is compared, and in which modes."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import checkpoints
import torch
from proposing import Oracle

from hal.config import BUNDLED_MODEL
from hal.engine.llm import LLM
from hal.engine.request_output import RequestOutput
from hal.sampling.params import SamplingParams

TOKENS, TOP = 64, 5
PROMPTS = checkpoints.prompts()  # 40, 27, 14 and 1 tokens
# Every way for a sequence to come by its KV cache, as options of the engine.
MODES: dict[str, dict[str, Any]] = {
    "whole": {},
    "chunked": {"max_num_batched_tokens": 13},
    "recompute": {"num_blocks": 45, "max_model_len": 128},
    "swap": {"num_blocks": 45, "max_model_len": 128, "num_cpu_blocks": 64},
}


@cache
def oracle(path: Path, dtype: torch.dtype = torch.float32) -> list[tuple[list[int], torch.Tensor]]:
    """Of each prompt: transformers' greedy tokens, and its logprobs [TOKENS, vocab] where it chose them."""
    model, found = checkpoints.load(path, dtype), []
    for prompt in PROMPTS:
        tokens, _ = checkpoints.greedy(model, prompt, TOKENS)
        found.append((tokens, checkpoints.logprobs(model, prompt + tokens)[len(prompt) - 1:-1]))
    return found


def run(path: Path, device: str, passes: int = 1, **options: Any) -> tuple[list[RequestOutput], LLM]:
    """Greedy outputs of the last pass over PROMPTS, and the engine (shut down) for its statistics."""
    params = SamplingParams(max_tokens=TOKENS, logprobs=TOP)
    with LLM(str(path), device=device, **{"dtype": "float32", "block_size": 4, **options}) as llm:
        for _ in range(passes):
            outputs = llm.generate(PROMPTS, params)
    return outputs, llm


def assert_parity(path: Path, outputs: list[RequestOutput], atol: float = 1e-4) -> None:
    """fp32: the same tokens, and logprobs within `atol`."""
    for output, (tokens, logprobs) in zip(outputs, oracle(path), strict=True):
        assert output.token_ids == tokens
        assert output.logprobs is not None
        ours = torch.tensor([entry.logprob for entry in output.logprobs])
        theirs = logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def assert_close_choices(path: Path, outputs: list[RequestOutput], dtype: torch.dtype) -> None:
    """Low precision, the rule of vLLM's tests: where the two first part, each one's token is among the other's best."""
    for output, (tokens, logprobs) in zip(outputs, oracle(path, dtype), strict=True):
        assert output.logprobs is not None and len(output.token_ids) == TOKENS
        for ours, theirs, entry, row in zip(output.token_ids, tokens, output.logprobs, logprobs, strict=True):
            if ours != theirs:
                best = row.topk(TOP).indices.tolist()
                assert ours in best and theirs in [token for token, _ in entry.top], (ours, best, theirs, entry.top)
                break


@cache
def additions(device: str, count: int, **options: Any) -> list[list[int]]:
    """The bundled model's greedy tokens, at least 99% of the answers right. Where `options` speculate, the drafts are
    the tokens of plain decoding, a known share of them made wrong, and some of both kinds are verified."""
    problems = [json.loads(line) for line in (BUNDLED_MODEL / "heldout.jsonl").read_text().splitlines()][:count]
    if "speculate" in options:
        plain, known = additions("cpu", count), dict[tuple[int, ...], list[int]]()
    with LLM(device=device, **{"dtype": "float32", "max_num_seqs": 64, "max_num_batched_tokens": 256, **options},
             max_model_len=32, num_blocks=400) as llm:
        if "speculate" in options:
            for problem, tokens in zip(problems, plain, strict=True):
                known[tuple(llm.check(problem["prompt"]))] = tokens
            Oracle.known = known
        outputs = llm.generate([p["prompt"] for p in problems], SamplingParams(max_tokens=8))
        stats = llm.stats()
    assert sum(o.text.strip() == p["answer"] for o, p in zip(outputs, problems, strict=True)) >= 0.99 * count
    assert "speculate" not in options or 0.2 < stats.accepted_tokens / stats.drafted_tokens < 0.9
    return [o.token_ids for o in outputs]
