"""Several decode steps for one message are one program of XLA: the tokens of one step, and nothing compiled later."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import parity
import pytest

from hal.engine.llm import LLM
from hal.sampling.params import SamplingParams

pytestmark = [pytest.mark.torch_release, pytest.mark.usefixtures("xla")]
Checkpoint = Callable[[str], Path]
TPU = "runners.tpu:backend"
SMALL: dict[str, Any] = {"dtype": "float32", "block_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 64,
                         "max_model_len": 128, "num_blocks": 200}
# Lengths that no message of three steps fits, and an end by a token.
MIXED = [SamplingParams(max_tokens=count, **options) for count, options in (
    (23, {"temperature": 1.0, "seed": 3}), (19, {"temperature": 1.0, "top_p": 0.9, "seed": 4, "logprobs": 2}),
    (24, {"temperature": 0.8, "top_k": 40, "repetition_penalty": 1.2, "frequency_penalty": 0.3, "seed": 5}),
    (20, {"presence_penalty": 1.5, "logprobs": 30, "prompt_logprobs": 2, "stop_token_ids": tuple(range(40))}))]


@pytest.mark.slow
def test_several_steps_give_the_tokens_of_one_and_compile_nothing_after_the_warm_up(
        checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    from runners.tpu import lowering

    monkeypatch.setattr("runners.tpu.runner.monotonic", lambda: 0.0)  # the warm-up has all the time it needs
    path = checkpoint("qwen3")
    with LLM(str(path), device="cpu", **SMALL) as llm:
        expected = [(o.token_ids, o.finish_reason) for o in llm.generate(parity.PROMPTS, MIXED)]
        expected += [(o.token_ids, o.finish_reason) for p in MIXED[:3] for o in llm.generate(parity.PROMPTS[:1], p)]
    with LLM(str(path), device=TPU, steps_per_message=3, **SMALL) as llm:
        before = lowering.compiles()
        parity.assert_parity(path, llm.generate(parity.PROMPTS, SamplingParams(max_tokens=64, logprobs=5)))
        steps = llm.stats().steps
        found = [(o.token_ids, o.finish_reason) for o in llm.generate(parity.PROMPTS, MIXED)]
        found += [(o.token_ids, o.finish_reason) for p in MIXED[:3] for o in llm.generate(parity.PROMPTS[:1], p)]
        assert found == expected
        # The first step or two are of prompts; 63 further tokens take 21 messages.
        assert steps <= 2 + 21 + 1 and lowering.compiles() == before


_SCRIPT = """
import json, sys
from hal.engine.llm import LLM
from hal.sampling.params import SamplingParams
path, prompts, options = json.loads(sys.argv[1])
with LLM(path, device="runners.tpu:backend", tp=2, steps_per_message=3, **options) as llm:
    print(json.dumps([[o.token_ids for o in llm.generate(prompts, p)] for p in
                      (SamplingParams(max_tokens=64), SamplingParams(max_tokens=16, temperature=1.0, seed=7))]))
"""


@pytest.mark.slow
def test_shares_of_one_process_take_several_steps(checkpoint: Checkpoint) -> None:
    path = checkpoint("llama3-gqa")
    done = subprocess.run([sys.executable, "-c", _SCRIPT, json.dumps([str(path), parity.PROMPTS, SMALL])],
                          env=os.environ | {"CPU_NUM_DEVICES": "2", "HAL_STRICT": "1", "HAL_COMPILE_BUDGET": "0"},
                          capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    with LLM(str(path), device="cpu", **SMALL) as llm:
        drawn = [o.token_ids for o in llm.generate(parity.PROMPTS, SamplingParams(max_tokens=16, temperature=1.0,
                                                                                  seed=7))]
    assert json.loads(done.stdout.splitlines()[-1]) == [[tokens for tokens, _ in parity.oracle(path)], drawn]


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    {"steps_per_message": 4}, {"speculate": "proposing:Oracle", "speculative_tokens": 4},
    {"speculate": "proposing:Oracle", "speculative_tokens": 4, "pp": 2}], ids=["steps", "drafts", "pp2, drafts"])
def test_the_bundled_model_adds_with_several_tokens_a_message(options: dict[str, Any]) -> None:
    assert parity.additions(TPU, 100, max_num_seqs=16, **options) == parity.additions("cpu", 100)
