"""Numbers and token ids of numpy, torch and Python are taken alike; every other type is refused by name."""

from __future__ import annotations

import array
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hal.config import EngineConfig
from hal.engine.llm import LLM
from hal.errors import ConfigError, RequestError
from hal.sampling.params import SamplingParams

NUMPY = [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64]
TORCH = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8]
HOLDERS: dict[str, Callable[[list[int]], Any]] = {
    "list": list, "tuple": tuple, "array.array": lambda ids: array.array("l", ids),
    "list of numpy": lambda ids: [np.int32(i) for i in ids],
    "list of torch": lambda ids: [torch.tensor(i) for i in ids],
    **{f"numpy {kind.__name__}": lambda ids, kind=kind: np.array(ids, kind) for kind in NUMPY},
    **{str(kind): lambda ids, kind=kind: torch.tensor(ids, dtype=kind) for kind in TORCH}}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(device="null", max_model_len=64, num_blocks=60) as made:
        yield made


@settings(max_examples=100, deadline=None)
@given(holder=st.sampled_from(sorted(HOLDERS)), ids=st.lists(st.integers(0, 15), min_size=1, max_size=63))
def test_token_ids_are_the_same_in_every_container(llm: LLM, holder: str, ids: list[int]) -> None:
    got = llm.check(HOLDERS[holder](ids))
    assert got == ids and {type(token) for token in got} == {int}


@pytest.mark.parametrize("holder", HOLDERS)
def test_generate_takes_one_or_several(llm: LLM, holder: str) -> None:
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    one, = llm.generate([5, 6, 7], params)
    held = HOLDERS[holder]([5, 6, 7])
    outputs = llm.generate(held, params)
    outputs += llm.generate([held, "1+1=", held], params)[::2] + llm.generate((held,), params)
    assert [o.token_ids for o in outputs] == [one.token_ids] * 4
    assert outputs[0].prompt_token_ids == [5, 6, 7] and type(outputs[0].prompt_token_ids[0]) is int
    assert llm.generate(np.array(["1+1=", "2+2="]), params)[1].prompt == "2+2="
    assert llm.generate(range(5, 8), params)[0].token_ids == one.token_ids


NO_IDS = {"None": None, "int": 5, "bytes": b"12", "bytearray": bytearray(b"12"), "dict": {5: 1}, "set": {5, 6},
          "floats": [5.0, 6.0], "a boolean": [True], "numpy floats": np.array([5.0]),
          "numpy booleans": np.array([True]), "torch floats": torch.tensor([5.0]),
          "torch booleans": torch.tensor([True]), "two dimensions": np.ones((2, 2), int),
          "no dimension": np.int64(5), "a tensor without data": torch.ones(3, dtype=torch.int64, device="meta"),
          "a generator": (i for i in range(3)), "texts among ids": [5, "6"], "None among ids": [5, None],
          "nested": [[5], [6]], "a class": list, "half a character": "\udc80"}


@pytest.mark.parametrize("kind", NO_IDS)
def test_an_invalid_prompt_is_refused_by_name(llm: LLM, kind: str) -> None:
    prompt: Any = NO_IDS[kind]
    for call in (llm.check, llm.add_request, llm.stream, lambda p: llm.generate(["1+1=", p])):
        with pytest.raises(RequestError, match=r"got: "):
            call(prompt)
    if kind != "nested":
        with pytest.raises(RequestError, match=r"got: "):
            llm.generate(prompt)
    assert not llm.unfinished


@pytest.mark.parametrize("params", [{"max_tokens": 3}, "x", 5, [None], [SamplingParams(), None], [SamplingParams()] * 3,
                                    [{}, {}], (SamplingParams(), "x")], ids=str)
def test_invalid_params_enqueue_nothing(llm: LLM, params: Any) -> None:
    with pytest.raises(RequestError):
        llm.generate(["1+1=", "2+2="], params)
    for call in (llm.add_request, llm.stream, llm.check):
        with pytest.raises(RequestError):
            call("1+1=", params if params != [SamplingParams()] else 5)
    assert not llm.unfinished and llm.stats().waiting == 0
    assert len(llm.generate(["1+1=", "2+2="], (SamplingParams(max_tokens=2),) * 2)) == 2


def test_a_prompt_beyond_any_context_is_refused_before_its_ids_are_read(llm: LLM) -> None:
    for prompt in ([1, 2, 3] * 1_700_000, range(5_000_000), np.zeros(5_000_000, np.int64)):
        start = time.perf_counter()
        with pytest.raises(RequestError, match="longer than the context"):
            llm.generate(prompt)
        assert time.perf_counter() - start < 5  # reading them one by one takes longer


@pytest.mark.parametrize("number", [None, "5", 1.5, [], {}, np.array([5, 6])], ids=str)
def test_abort_refuses_what_is_not_a_number(llm: LLM, number: Any) -> None:
    with pytest.raises(RequestError, match="number is not an integer"):
        llm.abort(number)
    llm.abort(10**9)
    llm.abort(np.int64(10**9))  # type: ignore[arg-type]


def wrappers(value: Any) -> list[Any]:
    """A value as numpy and torch hold it."""
    if isinstance(value, bool):
        return [np.bool_(value), np.array(value), torch.tensor(value)]
    if isinstance(value, int):
        return [np.int64(value), np.array(value), torch.tensor(value)]
    return [np.float64(value), np.float32(value), np.array(value), torch.tensor(value, dtype=torch.float64)]


SAMPLING = {"temperature": 0.5, "top_p": 0.25, "min_p": 0.5, "repetition_penalty": 1.5, "presence_penalty": -0.5,
            "frequency_penalty": 2.0, "top_k": 5, "max_tokens": 7, "seed": -3, "logprobs": 2, "prompt_logprobs": 0,
            "ignore_eos": True}
ENGINE = {"tp": 2, "pp": 3, "max_num_seqs": 5, "max_num_batched_tokens": 9, "block_size": 4, "num_blocks": 7,
          "num_cpu_blocks": 0, "max_model_len": 8, "seed": 5, "memory_fraction": 0.5, "heartbeat": 2.5,
          "prefix_caching": False, "async_scheduling": False, "graphs": False, "random_weights": True}


@pytest.mark.parametrize(("kind", "name", "value"), [
    *[(SamplingParams, *item) for item in SAMPLING.items()], *[(EngineConfig, *item) for item in ENGINE.items()]],
    ids=lambda v: getattr(v, "__name__", v))
def test_numbers_become_pythons_own(kind: Any, name: str, value: Any) -> None:
    plain = getattr(kind(**{name: value}), name)
    for held in wrappers(value):
        got = getattr(kind(**{name: held}), name)
        assert got == plain == value and type(got) is type(value)


def test_lists_and_texts_become_tuples() -> None:
    for held in (5, [5], (5,), {5}, np.array([5]), np.int64(5), torch.tensor([5]), [np.int32(5)], np.array(5)):
        ids = SamplingParams(stop_token_ids=held).stop_token_ids  # type: ignore[arg-type]
        assert ids == (5,) and type(ids[0]) is int
    for text in ("a", ["a"], np.str_("a"), np.array(["a"])):
        stop = SamplingParams(stop=text).stop  # type: ignore[arg-type]
        assert stop == ("a",) and type(stop[0]) is str
    assert EngineConfig(model=Path("some/where")).model == "some/where"  # type: ignore[arg-type]


WRONG: list[Any] = [None, "1", b"1", [1], {"a": 1}, {1}, object(), 1 + 2j, float("nan"), np.array([1, 2]),
                    torch.tensor([1, 2]), torch.empty((), device="meta"), 10**5000, 1.5, True, "yes", ""]


@pytest.mark.parametrize(("kind", "error"), [(SamplingParams, RequestError), (EngineConfig, ConfigError)])
def test_every_field_refuses_other_types_by_name(kind: Any, error: type[Exception]) -> None:
    for field in dataclasses.fields(kind):
        refused = 0
        for value in WRONG:
            try:
                made = getattr(kind(**{field.name: value}), field.name)
            except error as refusal:
                assert field.name in str(refusal), (field.name, value)
                assert "expected" in str(refusal) and len(str(refusal)) < 600
                refused += 1
            else:
                assert made is None or type(made) in (int, float, bool, str, tuple)
        assert refused >= len(WRONG) - 5, field.name  # token ids may be a list, a set, an array or a tensor
