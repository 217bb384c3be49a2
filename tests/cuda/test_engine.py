"""The whole stack on a GPU, against transformers and against itself in other modes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import families
import heads
import parity
import pytest
import torch
from eager import eager_steps

from hal.config import BUNDLED_MODEL
from hal.engine.llm import LLM
from hal.sampling.params import SamplingParams

Checkpoint = Callable[[str], Path]
SHARED = "runners.cuda:shared_gpu"
PROBLEMS = [json.loads(line) for line in (BUNDLED_MODEL / "heldout.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("mode", parity.MODES)
@pytest.mark.parametrize("name", checkpoints.NAMES)
def test_fp32_is_transformers(checkpoint: Checkpoint, name: str, mode: str) -> None:
    outputs, llm = parity.run(checkpoint(name), "cuda", max_num_seqs=8, **parity.MODES[mode])
    parity.assert_parity(checkpoint(name), outputs, atol=5e-4)
    assert (llm.stats().preemptions > 0) == ("num_blocks" in parity.MODES[mode])


@pytest.mark.parametrize("name", families.FAMILIES)
def test_native_families(tmp_path: Path, name: str) -> None:
    path = families.save(name, tmp_path / "model")
    asked = families.LONG if "longrope" in name else families.PROMPTS
    with families.run(path, "cuda", max_num_batched_tokens=13, max_num_seqs=4) as llm:
        families.assert_parity(path, asked, families.generate(llm, asked), margin=5e-4)


@pytest.mark.parametrize("options", [
    {"graphs": False}, {"async_scheduling": False}, {"passes": 2}, {"max_num_batched_tokens": 24}], ids=str)
@pytest.mark.parametrize("name", ["qwen3", "gpt2", "mistral-window"])
def test_modes_agree(checkpoint: Checkpoint, name: str, options: dict[str, Any]) -> None:
    """Eager, step by step, from cached prefixes, and with prompts in chunks."""
    outputs, _ = parity.run(checkpoint(name), "cuda", max_num_seqs=8, **options)
    parity.assert_parity(checkpoint(name), outputs, atol=5e-4)


@pytest.mark.parametrize("options", [{}, parity.MODES["recompute"], {"max_num_batched_tokens": 16}], ids=str)
@pytest.mark.parametrize("kind", ["draft", "itself", "eagle"])
def test_drafts_of_a_model_change_nothing(checkpoint: Checkpoint, tmp_path: Path, kind: str, options: dict[str, Any],
                                          ) -> None:
    target = checkpoint("llama3-gqa")
    draft = {"draft": checkpoint("qwen3"), "itself": target}.get(kind) or heads.save(
        tmp_path / "head", vocab=checkpoints.VOCAB, hidden=64, drafts=80)
    outputs, llm = parity.run(target, "cuda", max_num_seqs=8, speculate="eagle" if kind == "eagle" else "draft",
                              draft_model=str(draft), **options)
    parity.assert_parity(target, outputs, atol=5e-4)
    stats = llm.stats()
    assert stats.drafted_tokens > 0 and (kind != "itself" or stats.accepted_tokens > 0.95 * stats.drafted_tokens)


@pytest.mark.parametrize("draft_tp", [1, 2])
def test_a_draft_beside_a_target_of_two_ranks_that_share_the_gpu(checkpoint: Checkpoint, draft_tp: int) -> None:
    target = checkpoint("llama3-gqa")
    outputs, llm = parity.run(target, SHARED, max_num_seqs=8, memory_fraction=0.2, num_blocks=120, tp=2,
                              speculate="draft", draft_model=str(target), draft_tp=draft_tp)
    parity.assert_parity(target, outputs, atol=5e-4)
    assert llm.stats().accepted_tokens > 0.9 * llm.stats().drafted_tokens > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", checkpoints.NAMES)
def test_low_precision(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> None:
    outputs, _ = parity.run(checkpoint(name), "cuda", dtype=str(dtype).removeprefix("torch."), max_num_seqs=8)
    parity.assert_close_choices(checkpoint(name), outputs, dtype)


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}, {"tp": 2, "pp": 2}], ids=str)
def test_processes_that_share_the_gpu(checkpoint: Checkpoint, layout: dict[str, int]) -> None:
    for name in ("qwen3", "gpt2"):
        outputs, _ = parity.run(checkpoint(name), SHARED, max_num_seqs=8, memory_fraction=0.2, num_blocks=120,
                                max_model_len=128, **layout)
        parity.assert_parity(checkpoint(name), outputs, atol=5e-4)


@pytest.mark.parametrize("options", [{}, {"graphs": False}, {"dtype": "bfloat16"}, {"dtype": "float32"},
                                     {"device": SHARED, "tp": 2, "num_blocks": 2100},
                                     {"device": SHARED, "pp": 2, "num_blocks": 2100}], ids=str)
def test_the_bundled_model_adds(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """No step is computed without a graph, unless ranks share a GPU, which graphs cannot wait for."""
    with LLM(**{"device": "cuda", **options}) as llm:
        eager = eager_steps(monkeypatch)
        outputs = llm.generate([p["prompt"] for p in PROBLEMS])
    assert bool(eager) == (options.get("graphs") is False or "device" in options)
    assert sum(o.text == p["answer"] for o, p in zip(outputs, PROBLEMS, strict=True)) >= 990


def test_a_seeded_request_is_the_same_alone_and_among_64(checkpoint: Checkpoint) -> None:
    mine = SamplingParams(max_tokens=24, temperature=0.8, top_p=0.9, top_k=50, repetition_penalty=1.1, seed=5)
    plain = SamplingParams(max_tokens=24, temperature=1.0, seed=9)
    prompts = checkpoints.prompts(64, longest=30)
    with LLM(str(checkpoint("qwen3")), device="cuda", dtype="float32", block_size=4, num_blocks=1200,
             max_model_len=64) as llm:
        for params in (mine, plain):
            together = llm.generate(prompts, params)
            for i in (0, 31, 63):
                assert llm.generate([prompts[i]], params)[0].token_ids == together[i].token_ids


def test_nothing_is_captured_or_allocated_in_steady_decoding(checkpoint: Checkpoint) -> None:
    with LLM(str(checkpoint("qwen3")), device="cuda", dtype="bfloat16", max_num_seqs=8) as llm:
        runner = llm.executor._worker.runner
        llm.executor._worker.strict = False  # checking meaning reads the device
        for prompt in checkpoints.prompts(8, longest=12):
            llm.add_request(prompt, SamplingParams(max_tokens=240, ignore_eos=True))
        for _ in range(20):
            llm.step(text=False)
        captured, allocated = runner.compiled, torch.cuda.memory_stats()["num_device_alloc"]
        torch.cuda.set_sync_debug_mode("error")  # an event's own synchronize is not counted
        try:
            for _ in range(200):
                llm.step(text=False)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert (runner.compiled, torch.cuda.memory_stats()["num_device_alloc"]) == (captured, allocated)


@pytest.mark.parametrize("options", [{}, {"graphs": False}, {"async_scheduling": False},
                                     {"device": SHARED, "tp": 2, "num_blocks": 2100}], ids=str)
def test_several_steps_a_message_give_the_same_texts(options: dict[str, Any]) -> None:
    """Greedy and drawn, with penalties and logprobs; no step waits for the device, captures or compiles."""
    params = [SamplingParams(max_tokens=12, temperature=(0.0, 0.7)[i % 2], seed=i, logprobs=(None, 2)[i % 5 > 3],
                             repetition_penalty=(1.0, 1.1)[i % 3 > 1]) for i in range(100)]
    found = []
    for steps in (1, 8):
        with LLM(**{"device": "cuda", "dtype": "float32", "steps_per_message": steps, **options}) as llm:
            compiled = llm.executor._worker.runner.compiled
            outputs = llm.generate([p["prompt"] for p in PROBLEMS[:100]], params)
            found.append([(o.token_ids, o.text, o.finish_reason) for o in outputs])
            assert llm.executor._worker.runner.compiled == compiled
    assert sum(a == b for a, b in zip(*found, strict=True)) >= 99


@pytest.mark.parametrize("options", [{"quantize": "fp8"}, {"quantize": "int8"}, {"quantize": "int4"},
                                     {"quantize": "int4", "kv_dtype": "fp8"}], ids=str)
def test_the_bundled_model_adds_in_fewer_bits(options: dict[str, Any]) -> None:
    """Decoding reads the stored bits, and prompts go through tensor cores or dequantised weights."""
    some = PROBLEMS[::5]
    with LLM(device="cuda", **options) as llm:
        outputs = llm.generate([p["prompt"] for p in some], SamplingParams(max_tokens=8))
    assert sum(o.text.strip() == p["answer"] for o, p in zip(outputs, some, strict=True)) >= len(some) - 2
