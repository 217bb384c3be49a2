"""The CPU's runner, driven by hand, against transformers; and the CPU backend."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from by_hand import generate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hal.checkpoints.hf_config import read_config
from hal.config import EngineConfig, Topology, WorkerConfig
from hal.contracts import backend as backends
from hal.contracts.communicator import LocalCommunicator
from hal.contracts.inputs import NULL_BLOCK
from hal.contracts.outputs import SamplerOutput
from hal.testing.strategies import instances
from runners.cpu import backend
from runners.cpu.memory import free_memory
from runners.cpu.runner import CpuModelInput, CpuModelRunner

Checkpoint = Callable[[str], Path]
GIB = 1 << 30


def make(directory: Path, dtype: str = "float32", quantize: str | None = None,
         ) -> tuple[CpuModelRunner, Sequence[torch.Tensor]]:
    engine = EngineConfig(model=str(directory), dtype=dtype, block_size=4, max_num_seqs=4)  # type: ignore[arg-type]
    runner = backend.make_runner(WorkerConfig(engine, read_config(directory, quantize=quantize), Topology()),
                                 backend.device(0), LocalCommunicator())
    runner.load_model()
    return runner, runner.make_kv_caches(120)


def test_the_last_layer_computes_only_the_tokens_of_a_prompt_whose_logits_are_wanted(
        checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    found, computed = [], []
    for selects in (True, False):
        monkeypatch.setattr(CpuModelRunner, "selects_rows", selects)
        runner, caches = make(checkpoint("qwen3"))
        counts: list[int] = []
        computed.append(counts)
        last: Any = runner.model.get_submodule("layers")[-1]  # type: ignore[index]
        last.mlp.register_forward_hook(lambda _, args, out, to=counts: to.append(len(args[0])))
        seqs = generate(runner, caches, checkpoints.prompts(), 3, budget=13, params={"logprobs": 0})
        found.append([s.tokens for s in seqs])
    assert found[0] == found[1] and sum(computed[0]) < sum(computed[1])


@pytest.mark.slow
@pytest.mark.torch_release
@pytest.mark.parametrize("name", checkpoints.NAMES)
def test_tokens_and_logprobs_are_transformers(checkpoint: Checkpoint, name: str) -> None:
    """Prompts in chunks beside sequences that decode; the null block is as harmless as it is wild."""
    runner, caches = make(checkpoint(name))
    for cache in caches:
        cache[:, NULL_BLOCK] = 1e4
    oracle = checkpoints.load(checkpoint(name))
    seqs = generate(runner, caches, checkpoints.prompts(), 16, budget=13, apart=2,
                    params={"logprobs": 0, "prompt_logprobs": 0})
    for s in seqs:
        prompt = s.tokens[:s.prompt]
        assert s.tokens[s.prompt:] == checkpoints.greedy(oracle, prompt, 16)[0]
        expected = checkpoints.logprobs(oracle, s.tokens)
        after = expected[:-1].gather(1, torch.tensor(s.tokens[1:])[:, None])[:, 0]
        got = [next(iter(o.values())) for o in s.outputs]  # of each prompt token after the first, then of the output
        torch.testing.assert_close(torch.tensor(got), after, atol=1e-4, rtol=0)


@pytest.mark.torch_release
@pytest.mark.parametrize("name", ["qwen2-tied", "llama2-mha", "mistral-window"])
def test_bfloat16_is_as_near_to_fp32_as_transformers_is(checkpoint: Checkpoint, name: str) -> None:
    runner, caches = make(checkpoint(name), "bfloat16")
    exact, rounded = (checkpoints.load(checkpoint(name), d) for d in (torch.float32, torch.bfloat16))
    ours, theirs = [], []
    for s in generate(runner, caches, checkpoints.prompts(), 12, budget=30, params={"logprobs": 0}):
        reference, other = (checkpoints.logprobs(m, s.tokens) for m in (exact, rounded))
        for i, token in enumerate(s.tokens[s.prompt:]):
            at = s.prompt + i - 1
            ours.append(abs(s.outputs[i]["logprob"] - float(reference[at, token])))
            theirs.append(abs(float(other[at, token] - reference[at, token])))
    assert sum(ours) < 1.5 * sum(theirs), (sum(ours) / len(ours), sum(theirs) / len(theirs))


def test_a_seeded_request_is_the_same_alone_and_among_others(checkpoint: Checkpoint) -> None:
    params = {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.2, "frequency_penalty": 0.3, "seed": 11}
    prompts = checkpoints.prompts()
    runner, caches = make(checkpoint("qwen3"))
    together = generate(runner, caches, prompts, 10, budget=17, params=params)
    for prompt, other in zip(prompts, together, strict=True):
        runner, caches = make(checkpoint("qwen3"))
        assert generate(runner, caches, [prompt], 10, budget=100, params=params)[0].tokens == other.tokens


def test_warmup_and_sizes(checkpoint: Checkpoint) -> None:
    runner, _ = make(checkpoint("llama3-gqa"))
    caches = runner.make_kv_caches(5)
    assert sum(c.numel() * c.element_size() for c in caches) == 5 * runner.kv_bytes_per_block()
    assert all(c.shape[1] == 5 and not c.any() for c in caches)
    seen: list[tuple[str, int, int]] = []
    runner.warmup(caches, lambda *args: seen.append(args))
    assert seen[-1][1] == seen[-1][2] and not any(c[:, 1:].any() for c in caches)
    assert isinstance(runner.dummy_input(3, 1), CpuModelInput)
    engine = runner.config.engine
    assert runner.reserve_bytes() > engine.max_num_batched_tokens * runner.config.model.hidden_size * 4


def test_the_cache_takes_memory_only_where_it_is_written(checkpoint: Checkpoint) -> None:
    runner, _ = make(checkpoint("llama3-gqa"))
    before = _resident()
    caches = runner.make_kv_caches(GIB // runner.kv_bytes_per_block())
    assert sum(c.numel() * c.element_size() for c in caches) > 0.9 * GIB
    runner.execute_model(runner.dummy_input(2, 3), caches)
    assert _resident() - before < GIB // 8


def _resident() -> int:
    """Bytes of this process that lie in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_a_step_without_samples(checkpoint: Checkpoint) -> None:
    runner, caches = make(checkpoint("qwen3"))
    m = runner.dummy_input(2, 3)
    m.num_samples, m.logits_indices = 0, torch.zeros(0, dtype=torch.int32)
    output = runner.execute_model(m, caches)
    assert output is not None and list(output["token_ids"].shape) == [0]


@pytest.fixture(scope="module")
def gqa(checkpoint: Checkpoint) -> CpuModelRunner:
    return make(checkpoint("llama3-gqa"))[0]


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(m=instances(CpuModelInput, min_size=1, max_size=4), seqs=st.integers(0, 3), tokens=st.integers(0, 5),
       blocks=st.integers(0, 3), samples=st.integers(0, 3))
def test_padding_changes_no_real_rows_result(gqa: CpuModelRunner, m: CpuModelInput, seqs: int, tokens: int, blocks: int,
                                             samples: int) -> None:
    """A padded step through the whole runner: the same tokens and logprobs, and nothing else written to the cache."""
    for ids in (m.input_ids, m.history, m.prompt_targets, m.bias_ids):
        if ids is not None:  # drawn for a larger vocabulary
            ids.copy_(torch.where(ids < 0, ids, ids % checkpoints.VOCAB))
    generator, blocks_there = torch.Generator().manual_seed(0), int(m.block_tables.max()) + 1
    caches = [torch.randn(gqa.attention.cache_shape(spec, blocks_there, m.block_size), generator=generator)
              for spec in gqa.model.attention_specs]
    padded_caches = [c.clone() for c in caches]
    m.num_logprobs, dims = max(m.num_logprobs, 0), m.dims
    wide = m.padded(num_seqs=dims["num_seqs"] + seqs, num_tokens=dims["num_tokens"] + tokens,
                    max_blocks=dims["max_blocks"] + blocks, num_logits=dims["num_logits"] + samples,
                    num_sampled=dims["num_sampled"] + samples)
    wide.check()
    gqa.pending.last.copy_(torch.arange(len(gqa.pending.last)))
    expected = gqa.execute_model(m, caches)
    gqa.pending.last.copy_(torch.arange(len(gqa.pending.last)))
    got = gqa.execute_model(wide, padded_caches)
    assert isinstance(expected, SamplerOutput) and isinstance(got, SamplerOutput)
    assert torch.equal(got.token_ids[:m.num_samples], expected.token_ids)
    assert got.logprobs is not None and expected.logprobs is not None
    torch.testing.assert_close(got.logprobs[:m.num_samples], expected.logprobs, rtol=0, atol=1e-4)
    for ours, theirs in zip(padded_caches, caches, strict=True):
        torch.testing.assert_close(ours[:, 1:], theirs[:, 1:], rtol=0, atol=1e-4)  # other row counts, other kernels


@pytest.mark.slow
def test_importing_the_backend_loads_neither_torch_nor_devices() -> None:
    code = ("import sys, runners.cpu; assert 'torch' not in sys.modules; import runners.cpu.runner;"
            "assert not {'torch_xla', 'intel_extension_for_pytorch'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_no_start_imports_the_compiler_of_pytorch() -> None:
    """Which takes about two seconds."""
    code = ("import sys, hal; llm = hal.LLM(device='cpu'); llm.generate('1+1=', hal.SamplingParams(max_tokens=1));"
            "assert 'torch._dynamo' not in sys.modules")
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_the_backend_is_found_and_available() -> None:
    assert backends.load("runners.cpu:backend") is backend and backend.unavailable() is None
    assert backend.versions()["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert backend.free_memory(backend.device(3)) > 0


def test_free_memory_honours_control_groups(tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"

    def write(path: Path, text: object) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")

    write(proc / "meminfo", f"MemTotal: 99 kB\nMemAvailable: {16 * GIB // 1024} kB")
    assert free_memory(proc, groups) == 16 * GIB
    write(proc / "self/cgroup", "0::/outer/inner")
    assert free_memory(proc, groups) == 16 * GIB
    write(groups / "outer/inner/memory.max", "max")
    write(groups / "outer/inner/memory.current", GIB)
    assert free_memory(proc, groups) == 16 * GIB
    write(groups / "outer/memory.max", 8 * GIB)
    write(groups / "outer/memory.current", 5 * GIB)
    write(groups / "outer/memory.stat", f"anon 1\ninactive_file {2 * GIB}")
    assert free_memory(proc, groups) == 5 * GIB
    write(groups / "outer/inner/memory.max", 1000)
    assert free_memory(proc, groups) == 0
    write(proc / "self/cgroup", "4:cpu,memory:/a")
    write(groups / "memory/a/memory.limit_in_bytes", 3 * GIB)
    write(groups / "memory/a/memory.usage_in_bytes", GIB)
    assert free_memory(proc, groups) == 2 * GIB
    (proc / "meminfo").unlink()
    (proc / "self/cgroup").unlink()
    assert free_memory(proc, groups) > GIB
