"""Tokens under vLLM equal those of hal's own engine, in every layout, dialect and order of scheduling."""

from __future__ import annotations

import itertools
import runpy
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from served import bundled, serving, tokens_of
from vllm import SamplingParams

import hal

PROMPTS = ["37+85=", "123+456=", "999+1=", "250+250=", "1+1=2;2+2=4;3+", "5" * 40]
LONG = {"max_tokens": 24, "ignore_eos": True}


def greedy_and_seeded() -> list[dict[str, Any]]:
    return [{"temperature": 0.0} if i % 2 else {"temperature": 1.3, "seed": 100 + i, "top_k": 12, "top_p": 0.95,
                                                "min_p": 0.01} for i in range(len(PROMPTS))]


@cache
def expected(device: str) -> list[list[int]]:
    with hal.LLM(bundled(), device=device, dtype="float32", max_model_len=96, max_num_seqs=8, num_blocks=64) as llm:
        outputs = llm.generate(PROMPTS, [hal.SamplingParams(**LONG, **params) for params in greedy_and_seeded()])
        return [list(output.token_ids) for output in outputs]


def generate(llm: Any) -> list[list[int]]:
    return tokens_of(llm.generate(PROMPTS, [SamplingParams(**LONG, **params) for params in greedy_and_seeded()],
                                  use_tqdm=False))


def preemptions(llm: Any) -> int:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")


@pytest.mark.parametrize("device", ["cpu", "null", "fake", "numpy"])
def test_tokens_are_those_of_hals_engine(device: str) -> None:
    if device == "numpy":
        pytest.importorskip("hal_numpy", reason="the example backend is not installed")
    with serving(device) as llm:
        assert generate(llm) == expected(device)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_quantised_checkpoint_has_the_answers_of_hals_engine(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantize: str | None) -> None:
    """Quantised in the files, or on load. In bfloat16, since vLLM refuses float32 for such checkpoints."""
    model = bundled()
    if quantize is None:
        tests = Path(hal.__file__).parents[1] / "tests"
        monkeypatch.syspath_prepend(str(tests))  # for what the file imports
        published = SimpleNamespace(**runpy.run_path(str(tests / "weights/published.py")))
        config, writer, _ = published.FORMATS["fp8-channel"]
        model = str(published.write(Path(model), tmp_path, config, writer)[0])
    prompts, params = PROMPTS[:4], {"temperature": 0.0, "max_tokens": 4}
    with serving(model=model, dtype="bfloat16", hal={"quantize": quantize} if quantize else {}) as llm:
        found = tokens_of(llm.generate(prompts, SamplingParams(**params), use_tqdm=False))
    with hal.LLM(model, device="cpu", dtype="bfloat16", max_model_len=96, max_num_seqs=8, num_blocks=64,
                 quantize=quantize) as llm:
        assert found == [list(each.token_ids) for each in llm.generate(prompts, hal.SamplingParams(**params))]


# tp, pp, wire policy, dialect, and whether steps are scheduled ahead of their tokens, where there is one stage.
EVERY = list(itertools.product((1, 2), (1, 2), ("model-input", "request"), ("V1", "V2"), (False, True)))
PAIRS = [(1, 1, "model-input", "V1", False), (2, 2, "request", "V1", False), (2, 2, "model-input", "V2", False),
         (2, 1, "request", "V1", True), (1, 2, "model-input", "V2", True), (1, 1, "request", "V2", True)]


def test_the_layouts_have_each_pair_of_values() -> None:
    for places in itertools.combinations(range(5), 2):
        assert {tuple(case[i] for i in places) for case in PAIRS} == {tuple(case[i] for i in places) for case in EVERY}


@pytest.mark.parametrize(("tp", "pp", "wire", "dialect", "ahead"), [
    *PAIRS, *(pytest.param(*case, marks=pytest.mark.slow) for case in EVERY if case not in PAIRS)])
def test_tokens_are_the_same_in_every_layout(tp: int, pp: int, wire: str, dialect: str, ahead: bool) -> None:
    device = "fake" if ahead else "null"
    with serving(device, dialect, hal={"wire": wire}, async_scheduling=ahead, tensor_parallel_size=tp,
                 pipeline_parallel_size=pp) as llm:
        assert llm.llm_engine.vllm_config.scheduler_config.async_scheduling == (ahead and pp == 1)
        assert generate(llm) == expected(device)


@pytest.mark.parametrize("dialect", ["V1", "V2"])
@pytest.mark.parametrize(("device", "ahead"), [("null", False), ("fake", False), ("fake", True)])
def test_preempted_requests_have_the_same_tokens(device: str, ahead: bool, dialect: str) -> None:
    """7 blocks hold one long sequence and a half; prompts are computed in chunks of 16 tokens."""
    with serving(device, dialect, num_gpu_blocks_override=7, max_num_batched_tokens=16, async_scheduling=ahead,
                 disable_log_stats=False) as llm:
        assert llm.llm_engine.vllm_config.scheduler_config.async_scheduling == ahead
        assert generate(llm) == expected(device)
        assert preemptions(llm) > 0


def test_a_repeated_prompt_hits_the_prefix_cache(cpu: Any) -> None:
    prompt = "12+34=46;56+78=134;90+12=102;34+56=90;78+90="
    params = SamplingParams(temperature=0.0, max_tokens=8, logprobs=2)
    first, second = (cpu.generate(prompt, params, use_tqdm=False)[0] for _ in range(2))
    assert first.num_cached_tokens == 0 and second.num_cached_tokens == 32
    assert first.outputs[0].token_ids == second.outputs[0].token_ids
    for one, other in zip(first.outputs[0].logprobs, second.outputs[0].logprobs, strict=True):
        assert one.keys() == other.keys()
        # Chunks of other sizes, whose sums have another order.
        assert [one[t].logprob for t in one] == pytest.approx([other[t].logprob for t in one], abs=1e-4)


@pytest.mark.parametrize("layout", [{}, {"pipeline_parallel_size": 2}], ids=str)
def test_both_count_the_same_blocks(layout: dict[str, int]) -> None:
    """A number of blocks, a number of bytes, and what is free; the larger stage decides."""
    for options in ({"num_gpu_blocks_override": 9}, {"kv_cache_memory_bytes": 1 << 20}, {"gpu_memory_utilization": .5}):
        with serving("null", **{"num_gpu_blocks_override": None, **options, **layout}) as llm:
            core = llm.llm_engine.engine_core.engine_core
            hal_executor = core.model_executor._hal
            assert core.scheduler.kv_cache_manager.block_pool.num_gpu_blocks == hal_executor.num_blocks
            if "kv_cache_memory_bytes" in options:
                assert hal_executor.num_blocks == (1 << 20) // hal_executor.kv_bytes_per_block
