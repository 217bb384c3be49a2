"""Decode steps that run as one call on the CPU, against the same steps operation by operation."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import checkpoints
import families
import pytest
import torch
import torch.nn.functional as F
from by_hand import generate
from hypothesis import given, settings
from hypothesis import strategies as st
from lockstep import LockstepCommunicator
from test_cpu_runner import make

from hal.checkpoints.hf_config import read_config
from hal.config import EngineConfig, Topology, WorkerConfig
from hal.contracts.communicator import AxisName, LocalCommunicator
from hal.engine.llm import LLM
from hal.engine.request_output import RequestOutput
from hal.errors import StateError
from hal.models.ops import Ops
from hal.sampling.params import SamplingParams
from hal.sampling.sampler import Sampler
from runners.cpu import backend, compiled
from runners.cpu.linears import BUCKETS, DenseWeight, Kernels
from runners.cpu.ops import CpuOps
from runners.cpu.runner import CpuModelInput, CpuModelRunner
from runners.cpu.sampler import CpuSampler
from runners.cpu.tape import Recorder, Tape, Untaped

pytestmark = pytest.mark.skipif(not compiled.available() or compiled.level() == "off", reason="no kernels here")
HEADS: dict[str, Any] = dict(vocab_size=199, hidden_size=64, intermediate_size=104, num_hidden_layers=2,
                             num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=256)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", dict(HEADS, tie_word_embeddings=True)),
    "biases": ("llama", dict(HEADS, attention_bias=True, mlp_bias=True)),
    "window": ("mistral", dict(HEADS, sliding_window=8, intermediate_size=100)),
    "mha": ("llama", dict(HEADS, num_key_value_heads=4, hidden_size=72)),
}
MODES: dict[str, dict[str, Any]] = {
    "chunked": {"max_num_batched_tokens": 13},
    "recompute": {"num_blocks": 45, "max_model_len": 128},
    "swap": {"num_blocks": 45, "max_model_len": 128, "num_cpu_blocks": 64},
    "several": {"steps_per_message": 4},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def save(name: str, directory: Path) -> Path:
        return checkpoints.save_model(*MODELS[name], directory)
    return checkpoints.made_once(save, tmp_path_factory)


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(path: Path, params: SamplingParams, taped: bool, **options: Any) -> list[RequestOutput]:
    with pytest.MonkeyPatch.context() as patch:
        if not taped:
            patch.setattr(CpuModelRunner, "_record", refuse)
        with LLM(str(path), device="cpu", block_size=4, **options) as llm:
            outputs = llm.generate(checkpoints.prompts(), params)
            runner = llm.executor._worker.runner  # type: ignore[attr-defined]
            assert (runner.tape is not None and runner.tape.steps > 20) == taped
            if "num_blocks" in options:
                assert llm.stats().preemptions > 0
    return outputs


def refuse(*_: Any) -> Tape:
    raise Untaped("this test compares with it")


@pytest.mark.parametrize(("name", "mode"), [
    ("qwen3", "chunked"), ("qwen3", "recompute"), ("qwen3", "several"), ("biases", "chunked"),
    pytest.param("window", "swap"), pytest.param("mha", "several")])
def test_outputs_are_those_of_the_step_by_operations(model: Callable[[str], Path], name: str, mode: str) -> None:
    """Prompts in chunks between decodes, sequences that are preempted, and batches whose size changes."""
    params = SamplingParams(max_tokens=40, logprobs=2, ignore_eos=True)
    ours, plain = (run(model(name), params, taped, dtype="float32", **MODES[mode]) for taped in (True, False))
    for one, other in zip(ours, plain, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs is not None and other.logprobs is not None
        for a, b in zip(one.logprobs, other.logprobs, strict=True):
            assert abs(a.logprob - b.logprob) < 1e-4


def test_seeded_sampling_gives_the_same_tokens(model: Callable[[str], Path]) -> None:
    params = SamplingParams(max_tokens=40, temperature=0.9, top_p=0.9, repetition_penalty=1.2, seed=5, ignore_eos=True)
    ours, plain = (run(model("qwen3"), params, taped, dtype="float32") for taped in (True, False))
    assert [o.token_ids for o in ours] == [o.token_ids for o in plain]


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@pytest.mark.parametrize("name", ["qwen3", "biases"])
def test_bfloat16_rounds_where_the_operations_round(model: Callable[[str], Path], name: str, quantize: str | None,
                                                    ) -> None:
    """The logits of one step differ as those of two orders of the same sums do, by few units of bfloat16."""
    runner, caches = make(model(name), "bfloat16", quantize)
    generate(runner, caches, checkpoints.prompts(), 6, budget=30)
    runner.warmup(caches)
    assert runner.tape is not None
    for n in (1, 3, 4):
        m = decode_input(runner, n)
        plain, taped = (runner.forward(m, [c.clone() for c in caches] if plain else caches, None).logits.float()
                        for plain in (True, False))
        assert runner.tape.steps
        assert (plain - taped).abs().max() < 0.03 * plain.abs().max(), n


def decode_input(runner: CpuModelRunner, n: int, context: int = 9) -> CpuModelInput:
    """`n` sequences that decode, each after `context` tokens, with blocks of their own."""
    m: Any = runner.dummy_input(n, 1)
    blocks = -(-context // m.block_size)
    m.block_tables = torch.arange(1, n * blocks + 1, dtype=torch.int32).view(n, blocks)
    m.input_ids = torch.arange(n, dtype=torch.int32) * 7 + 3
    m.seq_lens = torch.full((n,), context, dtype=torch.int32)
    m.positions = m.seq_lens - 1
    m.slot_mapping = m.block_tables[:, -1] * m.block_size + m.positions % m.block_size
    return m


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_writes_the_same_cache_and_logits(model: Callable[[str], Path], threads: int) -> None:
    """More threads than cores sleep at the barriers."""
    runner, caches = make(model("qwen3"))
    runner.warmup(caches)
    assert runner.tape is not None
    for cache in caches:
        cache.normal_(generator=torch.Generator().manual_seed(1))
    m, others = decode_input(runner, 4), [c.clone() for c in caches]
    expected = runner.forward(m, others, None)
    torch.set_num_threads(threads)
    for _ in range(20):
        got = runner.forward(m, caches, None)
    torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=1e-4)
    for ours, theirs in zip(caches, others, strict=True):
        torch.testing.assert_close(ours[:, 1:], theirs[:, 1:], rtol=0, atol=1e-4)


def test_a_sequence_that_has_stopped_keeps_its_keys(model: Callable[[str], Path]) -> None:
    """In a message of several steps its slot is in the null block. The first slot of a block clears the block."""
    runner, caches = make(model("qwen3"))
    runner.warmup(caches)
    for tape in (runner.tape, None):
        runner.tape = tape
        for cache in caches:
            cache.fill_(float("nan")) if tape is None else cache.fill_(0.25)
        m = decode_input(runner, 2)
        if tape is not None:
            m.slot_mapping[1] = 0
        before = [c.clone() for c in caches]
        runner.forward(m, caches, None)
        for cache, old in zip(caches, before, strict=True):
            last = m.block_tables[:, -1].tolist()
            assert not cache[:, last[0], :, 1:].any() and cache[:, last[0], :, 0].any()
            if tape is not None:
                assert torch.equal(cache[:, last[1]], old[:, last[1]])


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 9), width=st.integers(1, 600), parts=st.integers(1, 3), threads=st.integers(1, 3),
       dtype=st.sampled_from([torch.float32, torch.bfloat16]), wide=st.booleans(), seed=st.integers(0, 1000))
def test_each_operation_is_pytorchs(rows: int, width: int, parts: int, threads: int, dtype: torch.dtype, wide: bool,
                                    seed: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    ids = torch.randint(0, 11, (rows,), dtype=torch.int32)
    m = CpuModelInput.__new__(CpuModelInput)
    m.__dict__.update(input_ids=ids, positions=ids, seq_lens=ids, slot_mapping=ids,
                      block_tables=torch.zeros(rows, 1, dtype=torch.int32))
    tables = [torch.randn(11, 2 * parts * width).to(dtype) for _ in range(2)]
    norm = torch.rand(width).to(torch.float32 if wide else dtype)
    long = torch.rand(2 * parts * width).to(dtype)
    angles = torch.randn(11, 2 * width)
    weight = torch.randn(70, 2 * parts * width).to(dtype)
    layer: Any = type("Layer", (), {"packed": DenseWeight(weight, None, Kernels(), ("kernel",) * len(BUCKETS))})()

    def step(ops: Ops) -> list[torch.Tensor]:
        x, y = (F.embedding(ids, table) for table in tables)
        cos, sin = ops.begin_rotary(ids, angles, dtype)
        summed, total = ops.add_rms_norm(x, y, long, 1e-6)
        heads = x.view(rows, 2 * parts, width)
        some = torch.cat((ops.rms_norm(heads[:, :parts], norm, 1e-6), heads[:, parts:]), 1)
        product = layer.packed(total) if type(ops) is Ops else ops.linear(total, layer)
        return [cos, sin, summed, total, some, ops.silu_mul(x), product]

    ops = CpuOps()
    with Recorder(m, dtype, LocalCommunicator()) as ops.recorder:
        noted = step(ops)
    Tape(ops.recorder, noted[-1], ops.kernels).run(ids, m)
    for ours, plain in zip(noted, step(Ops()), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5 if dtype == torch.float32 else 1.6e-2, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 7, 8, 1003])
def test_the_greedy_token_is_the_first_of_the_largest(dtype: torch.dtype, n: int) -> None:
    torch.manual_seed(n)
    rows = [-torch.rand(n), torch.zeros(n), torch.randn(n).round(), torch.full((n,), -torch.inf)]
    for at in {0, n // 2, n - 1}:
        rows += [torch.randn(n).index_fill(0, torch.tensor(at), value) for value in (torch.nan, torch.inf, -torch.inf)]
    scores = torch.stack(rows).to(dtype)
    sampler = CpuSampler()
    expected = Sampler().greedy(scores)
    assert sampler.kernels and torch.equal(sampler.greedy(scores), expected) and (expected == -1).any()


def test_an_operation_that_a_tape_has_not_leaves_the_step_as_it_is(
        checkpoint: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    softcap = families.save("gemma2", tmp_path)
    for path, reason in ((checkpoint("gpt2"), "embedding"), (softcap, "mul")):
        with caplog.at_level(logging.INFO, "hal"):
            runner, caches = make(path)
            runner.warmup(caches)
        assert runner.tape is None and reason in runner.untaped
        assert f"operation by operation: {runner.untaped}" in caplog.text
        generate(runner, caches, checkpoints.prompts(), 4, budget=30)


def test_what_a_step_needs_beside_decoding_is_computed_without_the_tape(model: Callable[[str], Path]) -> None:
    runner, caches = make(model("qwen3"))
    runner.warmup(caches)
    tape = runner.tape
    assert tape is not None and tape.described() == "1 to 4" and tape.takes(decode_input(runner, 4))
    for name, value in (("num_samples", 1), ("num_decode_seqs", 1), ("adapter_slots", torch.zeros(2)),
                        ("sample_counts", torch.ones(2)), ("logits_indices", torch.zeros(3))):
        m = decode_input(runner, 2)
        setattr(m, name, value)
        assert not tape.takes(m), name
    assert not tape.takes(decode_input(runner, 5))
    before = tape.steps
    runner.forward(decode_input(runner, 2), [c.clone() for c in caches], None)  # other caches than those it knows
    assert tape.steps == before


def test_what_lies_outside_of_a_table_is_refused(model: Callable[[str], Path]) -> None:
    runner, caches = make(model("qwen3"))
    runner.warmup(caches)
    m = decode_input(runner, 2)
    m.input_ids[1] = 199
    with pytest.raises(StateError, match="outside of the model's tables"):
        runner.forward(m, caches, None)


def test_a_large_models_choice_is_measured_once(model: Callable[[str], Path], tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAL_CPU_CHOICES", str(tmp_path / "choices.json"))
    monkeypatch.setattr("runners.cpu.runner._SMALL", 0)
    runner, caches = make(model("qwen3"))
    monkeypatch.setattr(CpuModelRunner, "_gains", lambda self, tape, kv_caches, n: n > 1)
    runner.warmup(caches)
    assert runner.tape is not None and runner.tape.taken == [False, False, True, True, True]
    monkeypatch.setattr(CpuModelRunner, "_gains", None)  # a later start measures nothing
    runner.warmup(caches)
    assert runner.tape.taken == [False, False, True, True, True]


class Counting(LockstepCommunicator):
    """Notes the collectives that its rank calls."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.called: list[tuple[Any, ...]] = []

    def all_reduce(self, x: torch.Tensor, axis: AxisName = "tp") -> torch.Tensor:
        self.called.append(("all_reduce", axis, x.dtype, *x.shape))
        return super().all_reduce(x, axis)

    def all_gather(self, x: torch.Tensor, axis: AxisName = "tp", dim: int = -1) -> torch.Tensor:
        self.called.append(("all_gather", axis, x.dtype, *x.shape))
        return super().all_gather(x, axis, dim)


def on_two_ranks(path: Path, filled: Sequence[torch.Tensor], taped: Sequence[bool],
                 ) -> list[tuple[list[torch.Tensor], list[tuple[Any, ...]]]]:
    """Of each rank, a thread: logits of decode steps of 1, 3 and 4 sequences, and the collectives that it called."""
    shelf: list[torch.Tensor | None] = [None, None]
    barrier = threading.Barrier(2)

    @torch.inference_mode()
    def run_rank(rank: int) -> tuple[list[torch.Tensor], list[tuple[Any, ...]]]:
        topology = Topology(tp=2, rank=rank)
        engine = EngineConfig(model=str(path), tp=2, dtype="float32", block_size=4, max_num_seqs=4)
        communicator = Counting(topology, shelf, barrier)
        runner = backend.make_runner(WorkerConfig(engine, read_config(path), topology), backend.device(0),
                                     communicator)
        runner.load_model()
        caches = runner.make_kv_caches(filled[0].shape[1])
        runner.warmup(caches)
        tape = runner.tape
        assert tape is not None, runner.untaped
        for cache, whole in zip(caches, filled, strict=True):
            cache.copy_(whole.chunk(2, 2)[rank])
        if not taped[rank]:
            runner.tape = None
        communicator.called.clear()
        logits = [runner.execute_forward(decode_input(runner, n), caches).logits.clone() for n in (1, 3, 4)]
        assert tape.steps == (3 if taped[rank] else 0)
        return logits, communicator.called

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run_rank, range(2)))


@pytest.mark.parametrize("name", ["qwen3", "biases"])
def test_ranks_call_the_collectives_of_the_step_by_operations(model: Callable[[str], Path], name: str) -> None:
    """With the tape on both ranks, on one of them and on none."""
    torch.set_num_threads(1)
    whole, caches = make(model(name))
    for cache in caches:
        cache.normal_(generator=torch.Generator().manual_seed(1))
    plain = on_two_ranks(model(name), caches, (False, False))
    assert len(plain[0][1]) == 3 * (2 + 2 * whole.config.model.num_layers)  # embedding, logits, and two of each layer
    for taped in ((True, True), (True, False)):
        for logits, called in on_two_ranks(model(name), caches, taped):
            assert called == plain[0][1]
            for ours, theirs in zip(logits, plain[0][0], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    for n, ours in zip((1, 3, 4), plain[0][0], strict=True):
        alone = whole.forward(decode_input(whole, n), [c.clone() for c in caches], None)
        torch.testing.assert_close(ours, alone.logits, rtol=0, atol=1e-4)
