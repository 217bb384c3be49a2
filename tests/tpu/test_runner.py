"""Nothing compiles after warm-up; caches are updated in place; the kernel's layout; the guard."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hal.checkpoints.hf_config import read_config
from hal.config import EngineConfig, Topology, WorkerConfig
from hal.engine.llm import LLM
from hal.errors import ConfigError, WorkerError
from hal.sampling.params import SamplingParams

Checkpoint = Callable[[str], Path]
TPU = "runners.tpu:backend"


@pytest.mark.parametrize("largest_first", [False, True])
@pytest.mark.parametrize("budget", ["5", "60", "600"])
def test_every_request_finds_its_small_programs_compiled_first(budget: str, largest_first: bool,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    from runners.tpu.plan import by_need, make_plan

    monkeypatch.setenv("HAL_COMPILE_BUDGET", budget)
    engine = EngineConfig()
    plan = make_plan(WorkerConfig(engine, read_config(engine.model), Topology()))
    order = by_need(plan, largest_first)
    assert sorted(map(str, order)) == sorted(map(str, plan.buckets()))
    if largest_first:
        begin, order = order[:2], order[2:]
        assert [b.dims[symbol] for b in begin for symbol, _ in b.sizes] == [
            rungs[-1] for axes in plan.kinds.values() for rungs in axes.values()]
    else:
        assert [b.dims[symbol] for b in order[:2] for symbol, _ in b.sizes] == [
            rungs[0] for axes in plan.kinds.values() for rungs in axes.values()]
    for kind in plan.kinds:
        sizes = [[size for _, size in b.sizes] for b in order if b.kind == kind]
        assert sizes == sorted(sizes)


@pytest.mark.parametrize(("variables", "seconds"), [
    ({"PJRT_DEVICE": "CPU"}, 20), ({"PJRT_DEVICE": "CPU", "XLA_PERSISTENT_CACHE_PATH": "somewhere"}, 120),
    ({"PJRT_DEVICE": "TPU"}, 120), ({}, 120), ({"HAL_COMPILE_BUDGET": "0"}, 0), ({"HAL_COMPILE_BUDGET": "7.5"}, 7.5),
    ({"HAL_COMPILE_BUDGET": "inf"}, float("inf"))])
def test_the_compile_budget_is_small_where_programs_are_not_kept(variables: dict[str, str], seconds: float,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    from runners.tpu.plan import budget

    for name in ("PJRT_DEVICE", "XLA_PERSISTENT_CACHE_PATH", "HAL_COMPILE_BUDGET"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert budget() == seconds


@pytest.mark.parametrize("given", ["", "ten", "-1", "nan", "1,5"])
def test_a_compile_budget_that_is_not_seconds_is_refused(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from runners.tpu.plan import budget

    monkeypatch.setenv("HAL_COMPILE_BUDGET", given)
    with pytest.raises(ConfigError, match="HAL_COMPILE_BUDGET") as caught:
        budget()
    assert repr(given) in str(caught.value)


class Clock:
    """Seconds that pass while programs are compiled, and at no other time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, each: float) -> None:
        from runners.tpu.runner import TpuModelRunner

        self.now, self.calls, original = 0.0, 0, TpuModelRunner._compile

        def compile_(runner: Any, *args: Any) -> None:
            original(runner, *args)
            self.now, self.calls = self.now + each, self.calls + 1

        monkeypatch.setattr(TpuModelRunner, "_compile", compile_)
        monkeypatch.setattr("runners.tpu.runner.monotonic", lambda: self.now)


@pytest.mark.torch_release
@pytest.mark.usefixtures("xla")
@pytest.mark.parametrize(("budget", "each", "warm"), [("10", 3.0, 4), ("9", 3.0, 3), ("1", 50.0, 1), ("0", 1.0, 0)])
def test_a_spent_budget_leaves_programs_to_the_steps_that_need_them(
        checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], budget: str,
        each: float, warm: int) -> None:
    """The clock stops the warm-up, within one program. Strict mode takes later compiling as the user's choice."""
    from runners.tpu import lowering

    monkeypatch.setenv("HAL_COMPILE_BUDGET", budget)
    monkeypatch.setenv("HAL_STRICT", "1")
    clock = Clock(monkeypatch, each)
    sampled = SamplingParams(max_tokens=5, temperature=0.7, top_p=0.8, presence_penalty=0.5, seed=3, logprobs=2,
                             prompt_logprobs=1)
    with engine(checkpoint("gpt2")) as llm:
        runner: Any = llm.executor._worker.runner  # type: ignore[attr-defined]
        planned = len(runner.programs) + runner.uncompiled
        assert clock.calls == len(runner.programs) == warm and runner.late == 0 < runner.uncompiled
        before = lowering.compiles()
        first = llm.generate([[1, 2, 3]], sampled)
        late, made = runner.late, clock.calls
        assert made > warm and runner.uncompiled == planned - made
        assert late == lowering.compiles() - before  # 0 where torch_xla still has an earlier engine's programs
        again = llm.generate([[1, 2, 3]], sampled)
        assert again[0].token_ids == first[0].token_ids and (runner.late, clock.calls) == (late, made)
    monkeypatch.setenv("HAL_COMPILE_BUDGET", "inf")
    with engine(checkpoint("gpt2")) as llm:
        assert llm.executor._worker.runner.uncompiled == 0  # type: ignore[attr-defined]
        assert llm.generate([[1, 2, 3]], sampled)[0].token_ids == first[0].token_ids
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("hal:")]
    told = f"compiling about {warm} of {planned} XLA programs"
    assert [told in line and "HAL_COMPILE_BUDGET" in line for line in lines[:-1]] == [True] * (float(budget) > 5)


@pytest.mark.torch_release
@pytest.mark.usefixtures("xla")
def test_caches_in_host_memory_are_no_larger_than_sequences_need(checkpoint: Checkpoint) -> None:
    """XLA's CPU client converts the whole of a bfloat16 cache in each step."""
    with LLM(str(checkpoint("gpt2")), device=TPU, block_size=4, max_num_seqs=3, max_num_batched_tokens=16,
             max_model_len=40) as llm:
        assert llm.executor.num_blocks == 3 * 10 + 1


def batches(llm: LLM, steps: int, seed: int = 11) -> tuple[int, set[int]]:
    """Requests that come, go and are aborted at random; how many steps ran, and how wide they were."""
    rng, widths, start = np.random.default_rng(seed), set(), llm.stats().steps
    while llm.stats().steps - start < steps:
        if rng.random() < 0.3 or not llm.unfinished:
            ids = rng.integers(0, 199, rng.integers(1, 60)).tolist()
            llm.add_request(ids, SamplingParams(max_tokens=int(rng.integers(1, 40)), seed=5, temperature=float(
                rng.choice([0.0, 0.9])), top_p=float(rng.choice([1.0, 0.8])), presence_penalty=float(
                rng.choice([0.0, 0.0, 1.0])), logprobs=rng.choice([None, 3])))
        llm.step()
        widths.add(llm.stats().running)
    return llm.stats().steps - start, widths


@pytest.mark.torch_release
@pytest.mark.usefixtures("xla")
def test_500_steps_compile_nothing(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 1 to 6 sequences and all lengths, over a plan with several rungs."""
    from runners.tpu import lowering

    monkeypatch.setenv("HAL_COMPILE_BUDGET", "30")
    monkeypatch.setattr("runners.tpu.runner.monotonic", lambda: 0.0)  # the warm-up has all the time it needs
    with LLM(str(checkpoint("qwen2-tied")), device=TPU, dtype="float32", block_size=4, max_num_seqs=6, num_blocks=150,
             max_num_batched_tokens=48, max_model_len=100) as llm:
        before = lowering.compiles()
        steps, widths = batches(llm, 500)
        assert steps >= 500 and {1, 6} <= widths
        assert lowering.compiles() == before


@pytest.mark.torch_release
@pytest.mark.usefixtures("xla")
def test_a_step_that_compiles_is_refused(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    from runners.tpu.runner import TpuModelRunner

    sample = TpuModelRunner._sample

    def careless(self: Any, m: Any, *args: Any) -> Any:
        (m.input_ids * 3 + 1).cpu()
        return sample(self, m, *args)

    monkeypatch.setattr(TpuModelRunner, "_sample", careless)
    monkeypatch.setenv("HAL_STRICT", "1")
    with engine(checkpoint("gpt2")) as llm, pytest.raises(WorkerError, match="a step compiled a program"):
        llm.generate([[1, 2, 3]])


@pytest.mark.torch_release
@pytest.mark.usefixtures("xla")
@pytest.mark.parametrize("method", ["prepare_model_input", "execute_model"])
@pytest.mark.parametrize("call", ["all_reduce", "rendezvous"])
def test_communication_in_a_phase_is_refused(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, method: str,
                                             call: str) -> None:
    import torch_xla.core.xla_model as xm

    from runners.tpu.runner import TpuModelRunner

    original = getattr(TpuModelRunner, method)

    def talkative(self: Any, *args: Any) -> Any:
        getattr(xm, call)(*(("sum", [torch.ones(1)]) if call == "all_reduce" else ("here",)))
        return original(self, *args)

    monkeypatch.setattr(TpuModelRunner, method, talkative)
    monkeypatch.setenv("HAL_STRICT", "1")
    with engine(checkpoint("gpt2")) as llm, pytest.raises(WorkerError, match=call) as caught:
        llm.generate([[1, 2, 3]])
    assert caught.value.cause == "GuardError"


def engine(path: Path) -> LLM:
    return LLM(str(path), device=TPU, dtype="float32", block_size=4, max_num_seqs=4, max_num_batched_tokens=64,
               max_model_len=128, num_blocks=200)


@pytest.mark.torch_release
@pytest.mark.usefixtures("xla")
@pytest.mark.parametrize("window", [None, 5])
def test_attention_is_what_the_tpu_kernel_computes(window: int | None) -> None:
    """Layout and arguments of the ragged kernel, by its own reference; only its speed needs a TPU."""
    from types import SimpleNamespace

    from hal.contracts.attention import AttentionSpec
    from runners.tpu import lowering
    from runners.tpu.attention import TpuAttention

    torch.manual_seed(0)
    size, lens, queries = 4, [9, 1, 17, 40], [1, 1, 17, 35]
    starts = np.cumsum([0, *queries])
    tables = torch.randperm(39)[:40 - 4].add(1).view(4, 9)
    tables = torch.cat((tables, torch.arange(4)[:, None] + 40), 1).int()
    positions = np.concatenate([np.arange(n - q, n) for n, q in zip(lens, queries, strict=True)])
    owner = np.repeat(np.arange(4), queries)
    slots = tables.numpy()[owner, positions // size] * size + positions % size
    arrays = [positions, positions, slots, starts, np.array(lens), tables.numpy()]
    given = lowering.to_device([torch.from_numpy(a.astype(np.int32)) for a in arrays])
    m: Any = SimpleNamespace(**dict(zip(("input_ids", "positions", "slot_mapping", "query_start_loc", "seq_lens",
                                         "block_tables"), given, strict=True)), block_size=size)
    spec = AttentionSpec(4, 2, 16, 0.25, window)
    attention = TpuAttention([spec])
    cache = torch.randn(attention.cache_shape(spec, 50, size)).to("xla:0")
    q, k, v = (torch.randn(len(slots), heads, 16).to("xla:0") for heads in (4, 2, 2))
    step = attention.begin(m, [cache], decode=False)
    got = step(0, q, k, v).cpu()
    expected = lowering.ragged_attention(q, step.caches[0][0], m.seq_lens, m.block_tables, m.query_start_loc, 0.25,
                                         window, kernel=False).cpu()
    torch.testing.assert_close(got, expected.reshape(got.shape), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("budget", [2.0, 5.0, 10.0, 30.0, 60.0, 120.0])
def test_all_stages_have_one_plan(monkeypatch: pytest.MonkeyPatch, budget: float) -> None:
    """Layers that do not divide: with a plan by its own number of them, each rank would pad a step to its own size."""
    from runners.tpu.plan import make_plan

    monkeypatch.setenv("HAL_COMPILE_BUDGET", str(budget))
    engine = EngineConfig(pp=2)
    for layers in (3, 5, 7):
        model = dataclasses.replace(read_config(engine.model), num_layers=layers)
        plans = [make_plan(WorkerConfig(engine, model, Topology(pp=2, rank=rank))) for rank in (0, 1)]
        assert plans[0].buckets() == plans[1].buckets()



@pytest.mark.usefixtures("xla")
def test_a_row_without_a_finite_maximum_ends_alone(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Padding looks up token 0, whose embedding is NaN here, and writes the null block that shorter sequences read. The
    request that has token 9 ends; the others have the tokens of the sound checkpoint on a CPU."""
    shutil.copytree(checkpoint("qwen3"), tmp_path / "damaged")
    weights = load_file(tmp_path / "damaged" / "model.safetensors")
    weights["model.embed_tokens.weight"][[0, 9]] = torch.nan
    save_file(weights, tmp_path / "damaged" / "model.safetensors", {"format": "pt"})
    prompts = [[5, 6, 7], [5, 9, 7], list(range(20, 41))]
    size: dict[str, Any] = {"max_model_len": 32, "max_num_seqs": 4, "num_blocks": 20}
    kinds = ({}, {"temperature": 1e-38}, {"temperature": 1e-37, "top_k": 1}, {"temperature": 3e-38, "top_p": 0.5},
             {"temperature": 3.4e38, "top_k": 1})
    with LLM(str(checkpoint("qwen3")), device="cpu", **size) as llm:
        expected = [o.token_ids for o in llm.generate(prompts, SamplingParams(max_tokens=6))]
    with LLM(str(tmp_path / "damaged"), device=TPU, **size) as llm:
        for kind in kinds:
            outputs = llm.generate(prompts, SamplingParams(max_tokens=6, logprobs=1, **kind))
            assert [o.finish_reason for o in outputs] == ["length", "error", "length"], kind
            assert [o.token_ids for o in outputs] == [expected[0], [], expected[2]], kind
