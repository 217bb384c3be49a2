"""Through the whole stack on the CPU, against transformers: every checkpoint, every way to come by a KV cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import parity
import pytest
import torch

Checkpoint = Callable[[str], Path]


@pytest.mark.parametrize("mode", parity.MODES)
@pytest.mark.parametrize("name", checkpoints.NAMES)
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
