"""XLA for real, on its CPU client: through the whole stack, against transformers and the CPU runner."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import families
import parity
import pytest
import torch

from hal.config import BUNDLED_MODEL
from hal.engine.llm import LLM
from hal.errors import BackendError, WorkerError
from hal.sampling.params import SamplingParams

pytestmark = [pytest.mark.torch_release, pytest.mark.usefixtures("xla")]
Checkpoint = Callable[[str], Path]
TPU = "runners.tpu:backend"
SMALL: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 128, "num_blocks": 200}
SOME = (("llama3-gqa", "whole"), ("mistral-window", "chunked"), ("qwen3", "recompute"), ("gpt2", "swap"))
MIXED = [SamplingParams(max_tokens=24, **options) for options in (
    {"temperature": 1.0, "seed": 3}, {"temperature": 1.0, "top_p": 0.9, "seed": 4, "logprobs": 2},
    {"temperature": 0.8, "top_k": 40, "min_p": 0.01, "repetition_penalty": 1.2, "frequency_penalty": 0.3, "seed": 5},
    {"presence_penalty": 1.5, "logprobs": 30, "prompt_logprobs": 2})]


def same_as_transformers(path: Path, mode: str, **layout: Any) -> None:
    outputs, llm = parity.run(path, TPU, **{**SMALL, **parity.MODES[mode], **layout})
    parity.assert_parity(path, outputs)
    assert (llm.stats().preemptions > 0) == (mode in ("recompute", "swap"))


@pytest.mark.parametrize(("name", "mode"), SOME)
def test_tokens_and_logprobs(checkpoint: Checkpoint, name: str, mode: str) -> None:
    same_as_transformers(checkpoint(name), mode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", parity.MODES)
@pytest.mark.parametrize("name", checkpoints.NAMES)
def test_every_checkpoint_in_every_mode(checkpoint: Checkpoint, name: str, mode: str) -> None:
    if (name, mode) not in SOME:
        same_as_transformers(checkpoint(name), mode)


def test_a_cached_prefix_changes_nothing(checkpoint: Checkpoint) -> None:
    path = checkpoint("llama3-gqa")
    outputs, llm = parity.run(path, TPU, passes=2, **SMALL)
    parity.assert_parity(path, outputs)
    assert llm.stats().cached_tokens > 60


@pytest.mark.parametrize("name", ["qwen2-tied", pytest.param("llama2-mha", marks=pytest.mark.slow),
                                  pytest.param("mistral-window", marks=pytest.mark.slow)])
def test_bfloat16(checkpoint: Checkpoint, name: str) -> None:
    outputs, _ = parity.run(checkpoint(name), TPU, dtype="bfloat16", **SMALL)
    parity.assert_close_choices(checkpoint(name), outputs, torch.bfloat16)


def test_sampling_is_the_cpu_runners(checkpoint: Checkpoint) -> None:
    """All ways of sampling in one batch, and each alone, so that every sampler program runs."""
    results = []
    for device in ("cpu", TPU):
        with LLM(str(checkpoint("qwen3")), device=device, dtype="float32", block_size=4, **SMALL) as llm:
            outputs = llm.generate(parity.PROMPTS, MIXED)
            for prompt, params in zip(parity.PROMPTS, MIXED, strict=True):
                outputs += llm.generate([prompt], params)
            results.append(outputs)
    for ours, theirs in zip(*reversed(results), strict=True):
        assert ours.token_ids == theirs.token_ids
        for name in ("logprobs", "prompt_logprobs"):
            got, expected = getattr(ours, name), getattr(theirs, name)
            assert (got is None) == (expected is None)
            for a, b in zip(got or (), expected or (), strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    assert [t for t, _ in a.top] == [t for t, _ in b.top] and a.token_id == b.token_id
                    assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
                    assert [v for _, v in a.top] == pytest.approx([v for _, v in b.top], abs=1e-4)


def test_stages_in_processes(checkpoint: Checkpoint) -> None:
    same_as_transformers(checkpoint("gpt2"), "chunked", pp=2)


def test_the_bundled_model_adds() -> None:
    problems = [json.loads(line) for line in (BUNDLED_MODEL / "heldout.jsonl").read_text().splitlines()][:1000]
    with LLM(device=TPU, max_num_seqs=64, max_num_batched_tokens=256, max_model_len=32, num_blocks=400) as llm:
        outputs = llm.generate([p["prompt"] for p in problems], SamplingParams(max_tokens=8))
    right = sum(o.text.strip() == p["answer"] for o, p in zip(outputs, problems, strict=True))
    assert len(problems) == 1000 and right >= 990, right


def test_what_is_not_there_is_refused(checkpoint: Checkpoint) -> None:
    path = str(checkpoint("gpt2"))
    with pytest.raises((BackendError, WorkerError), match="pending tokens"):
        LLM(path, device=TPU, async_scheduling=True, **SMALL)
    with pytest.raises((BackendError, WorkerError), match="CPU_NUM_DEVICES=2"):
        LLM(path, device=TPU, tp=2, **SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["glm4", "gpt-oss", "gemma2", "deepseek-v3", "qwen3-next"])
def test_native_families(name: str, tmp_path: Path) -> None:
    """An order of a head's entries of their own, experts of static shapes, softcap, sinks and latents."""
    path = families.save(name, tmp_path / name)
    with families.run(path, TPU, **{**SMALL, "max_num_batched_tokens": 13}) as llm:
        families.assert_parity(path, families.PROMPTS, families.generate(llm, families.PROMPTS, 24))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stablelm", "starcoder2"])
def test_modelling_code_of_transformers(kind: str, tmp_path: Path) -> None:
    """The second has one table for embeddings and head. Several programs share the caches."""
    from hal.engine.tiny import save_tiny, tiny_config

    save_tiny(tiny_config(kind), tmp_path)
    tokens = []
    for device in ("cpu", TPU):
        with LLM(str(tmp_path), device=device, dtype="float32", **{**SMALL, "max_num_seqs": 2}) as llm:
            outputs = llm.generate([[5, 6, 7] * 9, [8]], SamplingParams(max_tokens=12, ignore_eos=True))
            tokens.append([output.token_ids for output in outputs])
    assert tokens[0] == tokens[1]
