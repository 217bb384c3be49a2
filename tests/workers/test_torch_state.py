"""What a caller changes of torch does not reach the rank in its process, and is the caller's again after each call."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils._device
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from hal.contracts import backend as backends
from hal.engine.llm import LLM
from hal.sampling.params import SamplingParams
from hal.torch_state import TorchState
from workers.executors.processes import threads_of_driver, threads_per_rank

Change = Callable[[ExitStack], object]


# LLM itself reads outputs, as the caller may: these compute nothing.
READS = "numpy", "to", "resolve_conj", "resolve_neg", "detach", "__len__", "__get__", "tolist"


class NoFunctions(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function.__name__ in READS, f"the caller's mode sees {function}"
        return function(*args, **(kwargs or {}))


class NoOperations(TorchDispatchMode):
    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert operation.overloadpacket.__name__ in READS, f"the caller's mode sees {operation}"
        return operation(*args, **(kwargs or {}))


def put(write: Callable[[Any], object], value: Any, before: Any) -> Change:
    def change(stack: ExitStack) -> None:
        write(value)
        stack.callback(write, before)

    return change


def library_precision(stack: ExitStack) -> None:
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this torch has one precision for all libraries")
    stack.callback(torch.set_float32_matmul_precision, "highest")
    matmul.fp32_precision = "bf16"


CHANGES: dict[str, Change] = {
    "default device": put(torch.set_default_device, "meta", None),
    "device context": lambda stack: stack.enter_context(torch.device("meta")),
    "function mode": lambda stack: stack.enter_context(NoFunctions()),
    "dispatch mode": lambda stack: stack.enter_context(NoOperations()),
    "default dtype": put(torch.set_default_dtype, torch.float64, torch.float32),
    "autocast": lambda stack: stack.enter_context(torch.autocast("cpu", torch.bfloat16)),
    "no grad": lambda stack: stack.enter_context(torch.no_grad()),
    "inference mode": lambda stack: stack.enter_context(torch.inference_mode()),
    "deterministic": put(torch.set_deterministic_debug_mode, 2, 0),
    "precision": put(torch.set_float32_matmul_precision, "medium", "highest"),
    "precision of a library": library_precision,
    "threads": put(torch.set_num_threads, torch.get_num_threads() + 2, torch.get_num_threads()),
    "numpy's errors": lambda stack: stack.enter_context(np.errstate(all="raise")),
    "all at once": lambda stack: [CHANGES[name](stack) for name in (
        "default device", "inference mode", "autocast", "default dtype", "precision", "deterministic", "threads")]}


def state() -> tuple[Any, ...]:
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    device = torch.utils._device.CURRENT_DEVICE
    return (device, torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack(),
            torch.get_default_dtype(), torch.is_autocast_enabled("cpu"), torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(), torch.get_deterministic_debug_mode(),
            getattr(matmul, "fp32_precision", None), torch.get_num_threads())


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before construction", "between calls"])
@pytest.mark.parametrize("change", CHANGES)
def test_the_engine_keeps_the_callers_torch_settings(change: str, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []
    make = type(backends.load("cpu")).make_runner

    def make_runner(*arguments: Any) -> Any:
        runner = make(*arguments)
        for name in ("load_model", "make_kv_caches", "prepare_model_input", "fetch"):
            monkeypatch.setattr(runner, name, spy(getattr(runner, name)))
        return runner

    def spy(call: Callable[..., Any]) -> Callable[..., Any]:
        def record(*arguments: Any) -> Any:
            seen.append(state()[:-2])  # a library's precision may be "none" or what that means
            return call(*arguments)

        return record

    monkeypatch.setattr(type(backends.load("cpu")), "make_runner", make_runner)
    fresh, random = state()[:-2], torch.random.get_rng_state()
    with ExitStack() as stack:
        if when == "before construction":
            CHANGES[change](stack)
        before = state()
        llm = LLM(device="cpu")
        stack.callback(llm.shutdown)
        assert state() == before
        if when == "between calls":
            assert llm.generate("37+85=")[0].text == "122"
            CHANGES[change](stack)
        before = state()
        assert llm.generate("37+85=")[0].text == "122"
        output, = llm.generate(["2+2="], SamplingParams(temperature=1.0, seed=1, logprobs=2))
        assert output.logprobs is not None and state() == before
        llm.shutdown()
        assert state() == before
    assert set(seen) == {fresh} and len(seen) > 8
    assert torch.equal(torch.random.get_rng_state(), random)


def test_the_engine_has_its_own_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """And each rank its share of the cores, so that they do not wait for each other's."""
    for asked, world, expected in (("3", 1, 3), ("3,2", 8, 3), ("", 2, threads_per_rank(2)),
                                   ("many", 5, threads_per_rank(5))):
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
        assert threads_of_driver(world) == expected
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert 1 <= threads_of_driver(1) <= threads_per_rank(1)
    before = torch.get_num_threads()
    with TorchState(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_another_threads_settings_are_its_own() -> None:
    """Default devices belong to a thread: an engine may be made in one and used in another."""
    texts: list[str] = []
    with LLM(device="cpu") as llm:
        def run() -> None:
            with torch.device("meta"):
                texts.append(llm.generate("37+85=")[0].text)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        with torch.inference_mode():
            texts.append(llm.generate("37+85=")[0].text)
    assert texts == ["122", "122"]
