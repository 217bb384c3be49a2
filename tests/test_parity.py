"""Through the whole stack on the CPU, against transformers: every checkpoint, every way to come by a KV cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import parity
import pytest
import torch
from proposing import Oracle

Checkpoint = Callable[[str], Path]


@pytest.mark.parametrize("mode", parity.MODES)
@pytest.mark.parametrize("name", [name if i == 0 else pytest.param(name, marks=pytest.mark.slow)
                                  for i, name in enumerate(checkpoints.NAMES)])
def test_tokens_and_logprobs(checkpoint: Checkpoint, name: str, mode: str) -> None:
    outputs, llm = parity.run(checkpoint(name), "cpu", **parity.MODES[mode])
    parity.assert_parity(checkpoint(name), outputs)
    assert (llm.stats().preemptions > 0) == ("num_blocks" in parity.MODES[mode])


@pytest.mark.slow
@pytest.mark.parametrize("name", checkpoints.NAMES)
def test_a_cached_prefix_changes_nothing(checkpoint: Checkpoint, name: str) -> None:
    outputs, llm = parity.run(checkpoint(name), "cpu", passes=2)
    parity.assert_parity(checkpoint(name), outputs)
    assert llm.stats().cached_tokens > 60


@pytest.mark.slow
@pytest.mark.parametrize("name", checkpoints.NAMES)
def test_bfloat16(checkpoint: Checkpoint, name: str) -> None:
    outputs, _ = parity.run(checkpoint(name), "cpu", dtype="bfloat16")
    parity.assert_close_choices(checkpoint(name), outputs, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "names"), [
    ({"tp": 2}, checkpoints.NAMES), ({"pp": 2}, ("llama3-gqa", "mistral-window", "gpt2")),
    ({"tp": 2, "pp": 2, "wire": "request"}, ("qwen3", "gpt2"))], ids=["tp2", "pp2", "tp2pp2"])
def test_in_processes(checkpoint: Checkpoint, layout: dict[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        outputs, _ = parity.run(checkpoint(name), "cpu", **layout)
        parity.assert_parity(checkpoint(name), outputs)


STEPS: dict[str, Any] = {"steps_per_message": 5}
ORACLE: dict[str, Any] = {"speculate": "proposing:Oracle", "speculative_tokens": 4}


@pytest.mark.slow
@pytest.mark.parametrize(("options", "runs"), [
    (STEPS, [("llama3-gqa", "chunked"), ("gpt2", "recompute"), ("mistral-window", "swap")]),
    (ORACLE, [("llama3-gqa", "chunked"), ("gpt2", "recompute"), ("mistral-window", "swap")]),
    ({"speculate": "draft"}, [("llama3-gqa", "chunked"), ("qwen3", "recompute")]),
    ({"tp": 2, **STEPS}, [("llama3-gqa", "whole")]), ({"tp": 2, **ORACLE}, [("llama3-gqa", "whole")]),
    ({"pp": 2, **ORACLE}, [("gpt2", "whole")])], ids=[
    "steps", "drafts", "a draft model", "tp2, steps", "tp2, drafts", "pp2, drafts"])
def test_several_tokens_a_message(checkpoint: Checkpoint, options: dict[str, Any], runs: list[tuple[str, str]]) -> None:
    for name, mode in runs:
        path = checkpoint(name)
        Oracle.known = {tuple(prompt): tokens for prompt, (tokens, _) in zip(parity.PROMPTS, parity.oracle(path),
                                                                             strict=True)}
        draft = {"draft_model": str(path)} if options.get("speculate") == "draft" else {}
        outputs, llm = parity.run(path, "cpu", **parity.MODES[mode], **options, **draft)
        parity.assert_parity(path, outputs)
        stats = llm.stats()
        if "speculate" in options:
            assert stats.accepted_tokens > 100 and (stats.accepted_tokens < stats.drafted_tokens or draft)
        elif mode == "whole":
            assert stats.steps < 20


@pytest.mark.slow
@pytest.mark.parametrize("options", [STEPS, ORACLE, {"tp": 2, **STEPS}, {"tp": 2, **ORACLE}, {"pp": 2, **ORACLE}], ids=[
    "steps", "drafts", "tp2, steps", "tp2, drafts", "pp2, drafts"])
def test_the_bundled_model_adds_with_several_tokens_a_message(options: dict[str, Any]) -> None:
    """With drafts that are the model's own tokens, of which a third is made wrong."""
    assert parity.additions("cpu", 300, **options) == parity.additions("cpu", 300)
