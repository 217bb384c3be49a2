"""A device of little memory: what is allocated counts, what is reserved suffices, what an engine had comes back."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))  # `fake_runners`

import fake_runners
from fake_runners import OnCpu

from hal import LLM, SamplingParams
from hal.config import EngineConfig, Topology, WorkerConfig
from hal.conformance.context import Context
from hal.contracts.backend import load
from hal.contracts.communicator import LocalCommunicator
from hal.errors import CapacityError, WorkerError
from hal.features.penalties import NO_PENALTIES
from hal.model_config import ModelConfig, RopeConfig
from hal.testing.fake import FakeBackend
from hal.testing.fake_device import OutOfDeviceMemory

pytestmark = pytest.mark.torch_release
MODULE = "hal.testing.fake:backend"


def test_memory_is_limited_and_comes_back() -> None:
    backend = FakeBackend(memory_bytes=1 << 20)
    device = backend.device(0)
    assert backend.free_memory(device) == 1 << 20
    x = torch.zeros(100_000, device=device)
    view = x.view(10, -1)[3]
    assert backend.free_memory(device) == (1 << 20) - 400_384 == (1 << 20) - backend.fake.used
    with pytest.raises(OutOfDeviceMemory, match=r"test_memory.py:\d+\n  got: 1,048,576 bytes\n  expected: at mos"):
        torch.empty(1 << 20, dtype=torch.uint8, device=device)
    with pytest.raises(torch.OutOfMemoryError):  # of an operation
        x.double()
    with pytest.raises(CapacityError):
        torch.empty(1 << 50, dtype=torch.uint8, device=device)  # more than any host has
    del x
    assert backend.fake.used == 400_384  # the view keeps it
    del view
    assert backend.fake.used == 0 and backend.fake.peak == 400_384
    assert torch.empty(1 << 20, dtype=torch.uint8, device=device).untyped_storage().nbytes() == 1 << 20


def test_steps_that_need_more_than_was_reserved(tmp_path: Path) -> None:
    kind = fake_runners.allocates_what_it_does_not_count
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    for backend in (OnCpu(kind), FakeBackend(kind, memory_bytes=1 << 27)):
        ctx = Context(backend, "fake", "float32", 0, scratch=tmp_path)
        ctx.verify(ctx.engine(ctx.prompts(5, 9), params))
    with pytest.raises(CapacityError, match=r"out of memory at .*fake_runners.py"):
        ctx = Context(FakeBackend(kind, memory_bytes=1 << 25), "fake", "float32", 0, scratch=tmp_path)
        ctx.engine(ctx.prompts(5, 9), params)


def test_the_kv_cache_takes_what_is_free() -> None:
    from hal.contracts.backend import load

    fake: Any = load(MODULE)
    with LLM(device=MODULE) as llm:
        assert llm.executor.num_blocks > 64
        blocks, used = llm.executor.num_blocks, fake.fake.used
        assert used < fake.fake.memory_bytes * 0.9
    assert fake.fake.used < used / 100  # weights and cache are gone with the engine
    with pytest.raises(CapacityError, match="memory cannot hold the KV cache"):
        LLM(device=MODULE, num_blocks=2 * blocks)


@pytest.mark.slow
def test_a_failed_step_leaves_no_memory_behind() -> None:
    """The new workers find as much room as the first, though the error, whose traceback knows the old ones, is still
    being handled."""
    fake: Any = load("fake_runners:fails_once")
    with LLM(device="fake_runners:fails_once") as llm:
        blocks = llm.executor.num_blocks
        ids = [llm.add_request("37+85="), llm.add_request("12+7=")]
        done: dict[int, str | None] = {}
        while llm.unfinished:
            try:
                done |= {o.request_id: o.text for o in llm.step() if o.finish_reason is not None}
            except WorkerError as error:
                assert "it breaks once" in str(error) and fake.fake.used < 1 << 16
                llm.restart()
                assert llm.executor.num_blocks == blocks
        assert [done[i] for i in ids] == ["122", "19"] and fake.runner.steps > fake.runner.FAILS


@pytest.mark.slow
def test_a_failed_start_leaves_no_memory_behind() -> None:
    """A smaller engine has all the room while the error is still being handled."""
    fake: Any = load("fake_runners:fails_to_warm_up")
    try:
        LLM(device="fake_runners:fails_to_warm_up", num_blocks=200)
    except CapacityError as error:
        assert "does not fit" in str(error) and fake.fake.used < 1 << 16 < fake.fake.peak
        with pytest.raises(CapacityError, match="does not fit"):
            LLM(device="fake_runners:fails_to_warm_up", num_blocks=100)
    else:
        pytest.fail("it warms up")


SAMPLED = {"temperature": 0.8, "seed": 1, "top_k": 50, "top_p": 0.9, "min_p": 0.01, **dict.fromkeys(NO_PENALTIES, 1.2),
           "history": 3, "prompt_lens": 1}


def step_input(runner: Any, num_seqs: int, queries: int, context: int, sampled: bool) -> Any:
    """Sequences whose last `queries` tokens of `context` are computed, all in the null block."""
    size, fields = runner.config.engine.block_size, SAMPLED if sampled else {}
    packed = runner.input_type.schema.allocate(
        {"num_tokens": num_seqs * queries, "num_seqs": num_seqs, "max_blocks": -(-context // size),
         "num_logits": num_seqs, "num_sampled": num_seqs, "max_history": context}, fields, block_size=size,
        num_decode_seqs=num_seqs if queries == 1 else 0, num_samples=num_seqs, max_query_len=queries,
        num_logprobs=2 if sampled else -1)
    values = {"positions": np.tile(np.arange(context - queries, context), num_seqs), "seq_lens": context,
              "query_start_loc": np.arange(num_seqs + 1) * queries,
              "logits_indices": (np.arange(num_seqs) + 1) * queries - 1, **fields}
    for name, array in packed.arrays.items():
        array[...] = values.get(name, 0)
    return packed.to(runner.device)


@pytest.mark.slow
@settings(max_examples=12, deadline=None, phases=[Phase.generate])  # an example is soon found, and slow to shrink
@given(st.data())
def test_the_reserved_memory_is_enough(data: st.DataObject) -> None:
    """The largest steps of any small model stay within PagedModelRunner.reserve_bytes, on a device without a fused
    attention kernel."""
    draw = data.draw
    kv, length = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([64, 256, 512]))
    model = ModelConfig(family="llama", architecture="LlamaForCausalLM", vocab_size=draw(st.sampled_from([300, 9000])),
                        hidden_size=64, num_layers=2, num_heads=kv * draw(st.sampled_from([1, 2, 4])), num_kv_heads=kv,
                        head_dim=draw(st.sampled_from([16, 64])), intermediate_size=draw(st.sampled_from([96, 512])),
                        max_position=length, rope=RopeConfig(), windows=(None, draw(st.sampled_from([None, 16]))))
    engine = EngineConfig(random_weights=True, dtype=draw(st.sampled_from(["float32", "bfloat16"])),
                          max_num_seqs=draw(st.sampled_from([1, 8, 64])), async_scheduling=True,
                          max_num_batched_tokens=draw(st.sampled_from([16, 128, 512])),
                          block_size=draw(st.sampled_from([4, 16])))
    backend = FakeBackend(memory_bytes=1 << 33)
    runner = backend.make_runner(WorkerConfig(engine, model, Topology()), backend.device(0), LocalCommunicator())
    runner.load_model()
    caches, tokens = runner.make_kv_caches(2), engine.max_num_batched_tokens
    for queries in {1, 2, min(length, tokens), min(length, tokens) // 2}:
        num_seqs = engine.max_num_seqs if queries == 1 else min(tokens // queries, engine.max_num_seqs)
        for sampled in (False, True):
            before = backend.fake.peak = backend.fake.used
            runner.execute_model(step_input(runner, num_seqs, queries, length, sampled), caches)
            assert backend.fake.peak - before <= runner.reserve_bytes(), (num_seqs, queries, sampled)
