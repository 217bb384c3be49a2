"""Out of device memory: the error says of what, and what to do; the process and the device remain usable."""

from __future__ import annotations

import functools
import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hal.cli import main
from hal.engine.llm import LLM
from hal.errors import CapacityError, ConfigError, HalError, WorkerError
from hal.sampling.params import SamplingParams

MIB = 1 << 20
Limit = Callable[[int | None], None]
# 50 MB of weights, 16 KiB a KV block, and large steps: 64 KiB of one activation a token.
WIDE = {"model_type": "llama", "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 16384, "vocab_size": 512,
        "max_position_embeddings": 8192, "torch_dtype": "bfloat16", "bos_token_id": None, "eos_token_id": None}


def adds(**options: Any) -> bool:
    """A new engine, which is small, is right."""
    with LLM(device="cuda", num_blocks=64, max_num_seqs=8, max_num_batched_tokens=64, **options) as llm:
        return llm.generate(["37+85="])[0].text == "122"


@pytest.fixture
def limit() -> Iterator[Limit]:
    """limit(bytes): what PyTorch may take from the device beyond what is in use now; None is no limit."""
    def set_limit(more: int | None) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        used = torch.cuda.memory_reserved() if more is not None else 0
        torch.cuda.set_per_process_memory_fraction(1.0 if more is None else (used + more) / total)

    assert adds()  # what libraries allocate once in a process
    yield set_limit
    set_limit(None)


@pytest.fixture
def wide(tmp_path: Path) -> Callable[..., LLM]:
    def make(shape: dict[str, Any] | None = None, **options: Any) -> LLM:
        (tmp_path / "config.json").write_text(json.dumps(WIDE | (shape or {})))
        return LLM(str(tmp_path), **{"device": "cuda", "random_weights": True, "max_num_seqs": 4,
                                     "max_num_batched_tokens": 512, **options})

    return make


def assert_named(error: HalError, *words: str) -> None:
    text = str(error)
    assert all(word in text for word in words) and error.hint and "to do: " in text, text


@pytest.mark.parametrize(("room", "options", "what"), [
    (44, {}, "device memory cannot hold the model's weights"),
    (256, {"max_num_batched_tokens": 8192}, "device memory cannot hold this step"),  # that is tried at the start
    (1024, {}, "device memory cannot hold the KV cache")], ids=["weights", "step", "cache"])
def test_memory_runs_out_at_the_start(limit: Limit, wide: Callable[..., LLM], room: int, options: dict[str, Any],
                                      what: str) -> None:
    before = torch.cuda.memory_allocated()
    limit(room * MIB)
    try:
        wide(**options)
    except CapacityError as error:  # and while it is handled
        assert_named(error, what, "CUDA out of memory. Tried to allocate ")
        assert torch.cuda.memory_allocated() - before < 32 * MIB
        assert adds(graphs=False)  # in the room that there is
    else:
        pytest.fail("it fits")
    limit(None)
    assert adds()


def limited(limit: Limit, during: str, run: Callable[..., Any], *step: Any) -> Any:
    if torch.cuda.is_current_stream_capturing():
        return run(*step)  # its pool has nothing yet
    if during == "the run before it":
        torch.empty(1 << 42, dtype=torch.uint8, device="cuda")
    result = run(*step)
    torch.cuda.synchronize()
    limit(0)
    return result


@pytest.mark.parametrize("during", ["the capture", "the run before it"])
def test_memory_runs_out_while_capturing_graphs(limit: Limit, wide: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch,
                                during: str) -> None:
    from runners.cuda import runner

    original, before = runner.capture, torch.cuda.memory_allocated()

    def capture(empty: Any, dims: Any, received: Any, run: Callable[..., Any], *more: Any) -> Any:
        return original(empty, dims, received, functools.partial(limited, limit, during, run), *more)

    monkeypatch.setattr(runner, "capture", capture)
    try:
        wide(num_blocks=1024)
    except CapacityError as error:
        assert_named(error, "device memory cannot hold CUDA graphs", "CUDA out of memory", "graphs=False")
        assert torch.cuda.memory_allocated() - before < 32 * MIB
    else:
        pytest.fail("it fits")
    monkeypatch.undo()
    limit(None)
    assert adds()
    with wide(num_blocks=1024) as llm:  # its graphs too
        assert llm.executor._worker.runner.graphs and len(llm.generate([[1, 2, 3]])[0].token_ids) == 128


@pytest.mark.parametrize("asynchronous", [False, True])
def test_memory_runs_out_in_a_step(limit: Limit, wide: Callable[..., LLM], asynchronous: bool) -> None:
    before = torch.cuda.memory_allocated()
    # A cache of 1 GiB. Graphs have their memory from the start on.
    with wide(max_num_batched_tokens=8192, num_blocks=65536, async_scheduling=asynchronous, graphs=False) as llm:
        params = SamplingParams(max_tokens=4, ignore_eos=True)
        llm.generate([[1, 2, 3]], params)
        llm.add_request([i % 500 for i in range(8000)], params)
        limit(8 * MIB)  # for the input; activations take 20 at a time
        try:
            while llm.unfinished:
                llm.step()
        except WorkerError as error:
            assert_named(error, "rank 0 failed in step ", "device memory cannot hold this step", "CUDA out of memory")
            assert (error.rank, error.cause) == (0, "CapacityError")
            assert torch.cuda.memory_allocated() - before < 32 * MIB
            limit(None)
            assert adds()  # a new engine; and the old one
            llm.restart()
        else:
            pytest.fail("it fits")
        done = []
        while llm.unfinished:
            done += [o for o in llm.step() if o.finish_reason is not None]
        assert [len(o.token_ids) for o in done] == [4]


@pytest.mark.parametrize("left", [16, 128])
def test_on_a_device_that_is_full(limit: Limit, wide: Callable[..., LLM], left: int) -> None:
    """Not by a limit of PyTorch's: nothing else can have more either."""
    limit(None)
    filler = torch.empty(torch.cuda.mem_get_info()[0] - left * MIB, dtype=torch.uint8, device="cuda")
    with pytest.raises(CapacityError) as info:
        wide(max_num_batched_tokens=8192)
    assert_named(info.value, "memory cannot hold ")
    del filler
    limit(None)
    assert adds()


def test_a_cache_that_cannot_fit_is_refused_unallocated(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--device", "cuda", "--num-blocks", str(1 << 28), "37+85="]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "hal: error: memory cannot hold the KV cache" in err and "to do: num_blocks of" in err
    assert adds()


@pytest.mark.parametrize("dim", [264, 320])
def test_a_head_dim_that_the_kernels_do_not_have(wide: Callable[..., LLM], dim: int) -> None:
    with pytest.raises(ConfigError) as info:
        wide({"head_dim": dim})
    assert_named(info.value, "do not have this head_dim", f"got: {dim}", "--device cpu")
    assert adds()
