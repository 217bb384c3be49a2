"""A model whose layers have different caches gives the tokens of its own plain forward pass, however it is run."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import hybrid
import numpy as np
import pytest
import torch

from hal.config import EngineConfig, Topology, WorkerConfig
from hal.conformance.context import Run, drive
from hal.contracts import backend as backends
from hal.contracts.cache import RowState
from hal.contracts.communicator import LocalCommunicator
from hal.contracts.executor import make_executor
from hal.contracts.request import ExecuteModelRequest
from hal.contracts.runner import no_progress
from hal.engine.llm import LLM
from hal.engine.scheduler import Scheduler
from hal.errors import ConfigError, SchemaError, StateError
from hal.model_config import DeltaConfig
from hal.recording.bisect import bisect
from hal.recording.record import RecordingExecutor
from hal.recording.replay import replay
from hal.sampling.params import SamplingParams
from hal.schema import Array

PARAMS = SamplingParams(max_tokens=14, ignore_eos=True)
PROMPTS = [np.random.default_rng(i).integers(0, hybrid.VOCAB, n).tolist() for i, n in enumerate((20, 13, 9, 17, 5))]
# Three rows at once, whose sequences outgrow the blocks; prompts in chunks of at most 7 tokens.
TIGHT: dict[str, Any] = {"block_size": 4, "num_blocks": 14, "max_num_seqs": 3, "max_num_batched_tokens": 7,
                         "max_model_len": hybrid.LENGTH, "random_weights": True}
SWAP = {"num_cpu_blocks": 16}


@functools.cache
def expected() -> list[list[int]]:
    """Greedily, each token by a forward pass over the whole sequence. No choice is a close one."""
    found = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(PARAMS.max_tokens):
            best = hybrid.plain_logits(tokens)[-1].topk(2)
            assert best.values[0] - best.values[1] > 1e-3
            tokens.append(int(best.indices[0]))
        found.append(tokens)
    return found


def run(device: str, record: Path | None = None, **options: Any) -> tuple[list[Run], list[ExecuteModelRequest]]:
    """The runs, and the requests that they took."""
    config = EngineConfig(device=device, **{**TIGHT, **options})
    backend, requests = backends.select(device), list[ExecuteModelRequest]()
    executor: Any = make_executor(config, hybrid.MODEL, backend)
    if record is not None:
        executor = RecordingExecutor(executor, WorkerConfig(config, hybrid.MODEL, Topology()), backend)

    def execute(request: ExecuteModelRequest) -> Any:
        requests.append(request)
        handle = executor.execute_model(request)
        return handle if in_flight > 1 else handle.result()

    ahead = bool(config.async_scheduling)
    in_flight = 2 if ahead or config.pp > 1 else 1
    try:
        scheduler = Scheduler(config, executor.num_blocks, executor.num_cpu_blocks, depth=config.pp, ahead=ahead,
                              has_row_states=executor.has_row_states)
        runs = drive(execute, scheduler, PROMPTS, PARAMS, apart=2, in_flight=in_flight)
        if record is not None:
            executor.save(record)
    finally:
        executor.shutdown()
    return runs, requests


def check(device: str, **options: Any) -> None:
    runs, requests = run(device, **options)
    assert [r.tokens for r in runs] == expected()
    assert sum(r.preemptions for r in runs) > 0
    swaps = [r for r in requests if r.rows_to_swap_out is not None]
    assert bool(swaps) == bool(options.get("num_cpu_blocks")) == any(r.rows_to_swap_in is not None for r in requests)


@pytest.mark.parametrize("options", [{}, SWAP, {"max_num_batched_tokens": 40, **SWAP}], ids=str)
def test_preempted_in_one_process(options: dict[str, Any]) -> None:
    check("hybrid:backend", **options)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, SWAP], ids=str)
def test_preempted_on_a_device_that_runs_behind_the_host(options: dict[str, Any]) -> None:
    check("hybrid:ahead", async_scheduling=True, **options)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"tp": 2, **SWAP}, {"pp": 2}, {"pp": 2, "wire": "request", **SWAP}], ids=str)
def test_preempted_on_several_ranks(options: dict[str, Any]) -> None:
    check("hybrid:backend", **options)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"tp": 2}, {"tp": 2, "wire": "request"}, {"pp": 2, **SWAP},
                                     {"tp": 2, "pp": 2, **SWAP}, {"tp": 2, "pp": 2, "wire": "request"}], ids=str)
def test_preempted_on_several_ranks_in_every_way(options: dict[str, Any]) -> None:
    check("hybrid:backend", **options)


def test_prefixes_are_not_shared(tmp_path: Path) -> None:
    """The engine asks for prefix caching by default, and a state belongs to a whole sequence."""
    (tmp_path / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": hybrid.VOCAB, "hidden_size": 32,
        "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 64,
        "max_position_embeddings": hybrid.LENGTH, "rms_norm_eps": 1e-6, "torch_dtype": "float32"}))
    with LLM(str(tmp_path), device="hybrid:backend", random_weights=True, block_size=4, max_num_seqs=2) as llm:
        for _ in range(2):
            assert llm.generate([PROMPTS[0]], PARAMS)[0].token_ids == expected()[0][len(PROMPTS[0]):]
        assert llm.stats().cached_tokens == 0


@pytest.mark.slow
def test_recorded_swaps_replay_and_bisect(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    _, requests = run("hybrid:backend", path, **SWAP)
    assert any(r.rows_to_swap_in is not None for r in requests)
    again = replay(path, hybrid.backend, "hybrid:backend", random_weights=True)
    assert again.exact and len(again.steps) == len(requests)
    found = bisect(path, "hybrid:ahead", "hybrid:backend", random_weights=True)
    assert found.divergence is None and found.flip is None and found.calls == 3 * len(requests)


def test_memory_is_that_of_the_declared_caches() -> None:
    """Per block the two shapes, with keys and values of two sizes; per row the state, and one row for padding."""
    config = WorkerConfig(EngineConfig(device="hybrid:backend", **TIGHT), hybrid.MODEL, Topology())
    runner = hybrid.HybridRunner(config, torch.device("cpu"), LocalCommunicator())
    runner.load_model()
    caches, item = runner.make_kv_caches(5), 4
    assert [list(c.shape) for c in caches] == [[2, 5, 2, 4, 16], [1, 5, 6, 4, 20], [2, 5, 2, 4, 16]]
    assert runner.kv_bytes_per_block() == item * 4 * (2 * 2 * 2 * 16 + 6 * 20) == sum(c.nbytes for c in caches) // 5
    assert runner.has_row_states and [list(x.shape) for x in runner.row_states] == [[1, 4, 16], [1, 4, 2, 16]]
    runner.warmup(caches)
    assert not any(x[:, :-1].any() for x in runner.row_states)  # padding alone


def test_a_shared_prefix_is_refused() -> None:
    """An engine that shares prefixes although a layer keeps a state per row would get wrong tokens."""
    config = EngineConfig(device="hybrid:backend", **TIGHT)
    executor = make_executor(config, hybrid.MODEL, hybrid.backend)
    try:
        scheduler = Scheduler(config, executor.num_blocks)  # not told of the states
        with pytest.raises(Exception, match=r"(?s)without the state.*Executor.has_row_states") as error:
            for _ in range(2):
                drive(lambda r: executor.execute_model(r).result(), scheduler, PROMPTS[:1], PARAMS)
        assert isinstance(error.value.__cause__, StateError)
    finally:
        executor.shutdown()


def test_a_state_has_one_size() -> None:
    with pytest.raises(SchemaError, match=r"(?s)'kv' has a size that is not a constant.*num_tokens"):
        RowState({"kv": Array("float32", "num_tokens", 8)})


def test_xla_refuses_to_shard_states() -> None:
    from runners.tpu.spmd import load

    delta = DeltaConfig(layers=(1,), key_heads=2, value_heads=2, key_dim=8, value_dim=8, taps=4, split=False)
    config = EngineConfig(device="tpu", dtype="float32", tp=2, **TIGHT)
    with pytest.raises(ConfigError, match=r"(?s)does not shard states of rows.*got: tp=2.*expected: tp=1.*Hybrid"):
        load(config, replace(hybrid.MODEL, delta=delta), 0, torch.float32, None, no_progress)
