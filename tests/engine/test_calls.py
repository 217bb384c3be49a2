"""Calls that are interrupted, that come from two threads, or that follow a failure; and outputs between calls."""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hal.engine.executor_start
from hal.contracts.executor import Executor
from hal.engine.llm import LLM
from hal.engine.request_output import RequestOutput
from hal.errors import CapacityError, HalError, StateError, WorkerError
from hal.guard import Phase, current, phase
from hal.sampling.params import SamplingParams

ENGINE = Path(hal.engine.executor_start.__file__).parent
PROMPTS = [[5, 6, 7], [1, 2, 3, 4], [9] * 6, [3, 11, 5]]
PARAMS = [SamplingParams(max_tokens=9, temperature=0.8, seed=1, ignore_eos=True, logprobs=1, prompt_logprobs=1),
          SamplingParams(max_tokens=12, ignore_eos=True, stop="4"),
          SamplingParams(max_tokens=10, ignore_eos=True, stop_token_ids=(4,)),
          SamplingParams(max_tokens=3, temperature=1.0, seed=2, ignore_eos=True, frequency_penalty=0.5)]


def engine(**options: Any) -> LLM:
    return LLM(**{"device": "null", "max_model_len": 64, "block_size": 4, "num_blocks": 40, "max_num_seqs": 3,
                  "max_num_batched_tokens": 8, "num_cpu_blocks": 4, **options})


def facts(output: RequestOutput) -> tuple[Any, ...]:
    return output.token_ids, output.text, output.finish_reason, output.logprobs, output.prompt_logprobs


def add_all(llm: LLM) -> list[int]:
    return [llm.add_request(prompt, params) for prompt, params in zip(PROMPTS, PARAMS, strict=True)]


def drain(llm: LLM) -> list[RequestOutput]:
    """The outputs that were handed out complete."""
    done = []
    for _ in range(1000):
        if not llm.unfinished:
            return done
        done += [o for o in llm.step() if o.finish_reason is not None]
    raise AssertionError("the engine never finishes")


def is_clean(llm: LLM) -> bool:
    """No row, block, step or phase is held."""
    while llm.core.pending:
        llm.step()
    scheduler = llm.scheduler
    return not (current() or llm.unfinished or scheduler.unfinished or any(scheduler.blocks.refs)
                or len(scheduler._free_rows) != scheduler.max_rows
                or scheduler.blocks.num_free_host != scheduler.num_cpu_blocks)


class Interrupted(Exception):
    """What a signal handler may raise."""


class At:
    """Raises Interrupted before the n-th instruction that hal/engine executes while this is entered. `count` counts
    them. What LLM.step returns is excluded: no signal is handled between its last assignment and its return."""

    def __init__(self, n: int | None = None) -> None:
        self.n, self.count = n, 0
        self.last = max(line for _, _, line in LLM.step.__code__.co_lines() if line is not None)

    def __enter__(self) -> At:
        sys.settrace(self._called)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _called(self, frame: FrameType, event: str, argument: object) -> Any:
        if Path(frame.f_code.co_filename).parent != ENGINE:
            return None
        frame.f_trace_opcodes = True
        return self._executed

    def _executed(self, frame: FrameType, event: str, argument: object) -> Any:
        if event == "opcode" and (frame.f_code is not LLM.step.__code__ or frame.f_lineno != self.last):
            self.count += 1
            if self.count == self.n:
                raise Interrupted
        return self._executed


@pytest.fixture(scope="module", params=[False, True], ids=["in turn", "ahead"])
def llm(request: pytest.FixtureRequest) -> Iterator[LLM]:
    with engine(async_scheduling=request.param) as made:
        yield made


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_an_interrupted_step_says_so_and_restart_brings_all_back(llm: LLM, seed: int) -> None:
    numbers = add_all(llm)
    with At() as undisturbed:
        done = {o.request_id: o for o in drain(llm)}
    expected = [facts(done[n]) for n in numbers]
    draw, interrupted = random.Random(seed), 0
    for _ in range(30):
        numbers, done_here = add_all(llm), list[RequestOutput]()
        at = At(draw.randrange(1, undisturbed.count))
        with suppress(Interrupted), at:  # a run whose prefixes are cached executes fewer instructions
            while llm.unfinished:
                done_here += [o for o in llm.step() if o.finish_reason is not None]
        if not llm.calls.idle:  # else the exception came before the call's first change, or after its last
            for call in (llm.step, lambda: llm.generate([5]), lambda: llm.add_request([5])):
                with pytest.raises(StateError, match=r"(?s)(Interrupted|has not ended).*restart\(\)"):
                    call()
            llm.restart()
        done_here += drain(llm)
        where = f"seed {seed}, instruction {at.n}"
        assert sorted(o.request_id for o in done_here) == numbers, where
        assert [facts(o) for o in sorted(done_here, key=lambda o: o.request_id)] == expected, where
        assert is_clean(llm), where
        interrupted += at.count >= (at.n or 0)
    assert interrupted > 20


@pytest.mark.slow
def test_other_interrupted_calls_leave_nothing_behind(llm: LLM) -> None:
    draw = random.Random(0)

    def stream() -> None:
        for _ in llm.stream(PROMPTS[1], PARAMS[1]):
            pass

    def add_and_abort() -> None:
        llm.abort(llm.add_request(PROMPTS[2], PARAMS[2]))

    for call in (lambda: llm.generate(PROMPTS, PARAMS), stream, add_and_abort, llm.restart):
        with At() as undisturbed:
            call()
        for _ in range(5):
            other = llm.add_request(PROMPTS[0], PARAMS[0])
            at = At(draw.randrange(1, undisturbed.count))
            with suppress(Interrupted), at:
                call()
            gc.collect()  # the iterator of a stream that was not closed
            if not llm.calls.idle:
                llm.restart()
            done = [o.request_id for o in drain(llm)]
            where = f"instruction {at.n}"
            # An interrupted add_request may have enqueued its request, whose number nobody learns.
            assert done[:1] == [other] or other in done, where
            assert len(done) == 1 or (call is add_and_abort and len(done) == 2), where
            assert is_clean(llm), where


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2])
def test_signal_handlers_that_raise_at_random_moments(tp: int) -> None:
    def interrupt(*_: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    draw = random.Random(tp)
    try:
        with engine(tp=tp) as llm:
            expected = [facts(o) for o in llm.generate(PROMPTS, PARAMS)]
            for _ in range(60 // tp**3):
                numbers = add_all(llm)
                # The test itself may be interrupted after step().
                held = {n: llm.requests.live[n].output for n in numbers}
                delay = draw.uniform(0.0002, 0.03)
                try:
                    signal.setitimer(signal.ITIMER_REAL, delay)
                    try:
                        drain(llm)
                    finally:
                        signal.setitimer(signal.ITIMER_REAL, 0)
                except (Interrupted, WorkerError):
                    pass
                if not llm.calls.idle:
                    with pytest.raises(HalError, match=r"restart\(\)"):
                        llm.step()
                    llm.restart()
                drain(llm)
                assert [facts(held[n]) for n in numbers] == expected and is_clean(llm), f"tp {tp}, {delay} s"
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("recover", [LLM.restart, LLM.shutdown])
def test_a_phase_that_a_signal_handler_kept_open_is_left(monkeypatch: pytest.MonkeyPatch,
                                                         recover: Callable[[LLM], None]) -> None:
    def interrupted(*_: object) -> None:
        phase(Phase.EXECUTE).__enter__()  # as if the exception came before the block began
        raise Interrupted

    with engine() as llm:
        monkeypatch.setattr(llm.scheduler, "schedule", interrupted)
        with pytest.raises(Interrupted):
            llm.generate([PROMPTS[0]], PARAMS[0])
        assert current() is not None
        recover(llm)
        assert current() is None


def test_a_call_from_a_second_thread_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    inside, go_on = threading.Event(), threading.Event()
    with engine(async_scheduling=False) as llm:
        expected = llm.generate([PROMPTS[0]], PARAMS[0])[0].token_ids
        schedule = llm.scheduler.schedule

        def wait() -> Any:
            inside.set()
            assert go_on.wait(30)
            return schedule()

        monkeypatch.setattr(llm.scheduler, "schedule", wait)
        got: list[RequestOutput] = []
        thread = threading.Thread(target=lambda: got.extend(llm.generate([PROMPTS[0]], PARAMS[0])))
        thread.start()
        assert inside.wait(30)
        for call in (llm.step, llm.restart, llm.shutdown, lambda: llm.abort(0), lambda: llm.generate([[5]]),
                     lambda: llm.add_request([5]), lambda: next(llm.stream([5])), lambda: llm.check([5])):
            with pytest.raises(StateError, match="LLM is not thread-safe"):
                call()
        go_on.set()
        thread.join(30)
        assert got[0].token_ids == expected and is_clean(llm)
        assert llm.generate([PROMPTS[0]], PARAMS[0])[0].token_ids == expected


@pytest.mark.slow
def test_a_failed_rank_is_named_until_restart() -> None:
    with engine(tp=2, async_scheduling=False) as llm:
        expected = [facts(o) for o in llm.generate(PROMPTS, PARAMS)]
        numbers = add_all(llm)
        llm.step()
        assert llm.health() is None
        os.kill(llm.executor._ranks.processes[0].process.pid, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while llm.health() is None and time.monotonic() < deadline:
            time.sleep(0.01)  # no step runs
        assert "rank 1 died" in str(llm.health())
        with pytest.raises(WorkerError) as first:
            drain(llm)
        assert "rank 1 died" in str(llm.health()) and "restart()" in str(llm.health())
        for call in (llm.step, lambda: llm.generate([5]), lambda: llm.add_request([5])):
            with pytest.raises(WorkerError, match=r"restart\(\)") as later:
                call()
            assert (later.value.what, later.value.rank) == (first.value.what, first.value.rank) == (first.value.what, 1)
        llm.abort(numbers[1])
        llm.restart()
        assert llm.health() is None
        done = {o.request_id: o for o in drain(llm)}
        assert [facts(done[n]) for n in numbers[:1] + numbers[2:]] == expected[:1] + expected[2:] and is_clean(llm)


def test_a_restart_that_lacks_room_keeps_the_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    make = hal.engine.executor_start.make_executor

    def fewer(*options: Any) -> Executor:
        executor = make(*options)
        executor.num_blocks = 8  # as if a rank had given less
        return executor

    with engine(async_scheduling=False) as llm:
        params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (50, 4)]
        expected = [o.token_ids for o in llm.generate(PROMPTS[:2], params)]
        large, small = (llm.add_request(prompt, each) for prompt, each in zip(PROMPTS, params, strict=False))
        monkeypatch.setattr(hal.engine.executor_start, "make_executor", fewer)
        for _ in range(2):
            with pytest.raises(CapacityError, match=f"^request {large}: the KV cache is too small"):
                llm.restart()
            with pytest.raises(StateError, match=r"(?s)CapacityError.*restart\(\)"):
                llm.step()
            assert llm.unfinished
        monkeypatch.undo()
        llm.restart()
        assert {o.request_id: o.token_ids for o in drain(llm)} == dict(zip((large, small), expected, strict=True))
        again = llm.add_request(PROMPTS[0], params[0])
        monkeypatch.setattr(hal.engine.executor_start, "make_executor", fewer)
        small = llm.add_request(PROMPTS[1], params[1])
        with pytest.raises(CapacityError):
            llm.restart()
        llm.abort(again)  # which makes room for the other
        llm.restart()
        assert [(o.request_id, o.token_ids) for o in drain(llm)] == [(small, expected[1])] and is_clean(llm)


def test_nothing_is_enqueued_after_shutdown() -> None:
    llm = engine()
    kept = llm.add_request(PROMPTS[0], PARAMS[0])
    llm.shutdown()
    for call in (llm.step, lambda: llm.generate([5]), lambda: llm.add_request([5]), lambda: llm.stream([5])):
        with pytest.raises(StateError, match=r"(?s)shut down.*restart\(\)"):
            call()
    assert llm.unfinished and llm.stats().waiting == 1 and llm.stats().running == 0
    llm.restart()
    assert [o.request_id for o in drain(llm)] == [kept] and is_clean(llm)
    llm.shutdown()


def test_a_stream_that_is_collected_in_the_middle_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    with engine(async_scheduling=False) as llm:
        streams = [llm.stream(PROMPTS[1], PARAMS[1])]
        next(streams[0])
        schedule = llm.scheduler.schedule

        def collect() -> Any:
            streams.clear()
            return schedule()

        monkeypatch.setattr(llm.scheduler, "schedule", collect)
        expected = [5, 6]
        output, = llm.generate([expected], SamplingParams(max_tokens=6, ignore_eos=True))
        assert len(output.token_ids) == 6 and is_clean(llm)


def test_outputs_that_grew_in_another_call_are_handed_out_by_step(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (9, 3, 5)]
    expected = [o.token_ids for o in llm.generate(PROMPTS[:3], params)]
    numbers = [llm.add_request(prompt, each) for prompt, each in zip(PROMPTS, params, strict=False)]
    generated, = llm.generate([PROMPTS[1]], params[1])
    assert generated.token_ids == expected[1] and llm.unfinished
    first = llm.step()
    assert {o.request_id for o in first} <= set(numbers) and first
    assert all(o.text == llm.tokenizer.decode(o.token_ids, skip_special_tokens=True) for o in first)
    assert len(list(llm.stream(PROMPTS[2], SamplingParams(max_tokens=30, ignore_eos=True)))) == 30
    last = llm.step()
    assert not llm.unfinished and llm.step() == []
    done = {o.request_id: o for o in first + last if o.finish_reason is not None}
    assert [done[n].token_ids for n in numbers] == expected
    assert [len(o.token_ids) for o in last] == sorted(len(o.token_ids) for o in last)  # in the order in which they end
    aborted = llm.add_request(PROMPTS[0], params[0])
    llm.generate([PROMPTS[1]], SamplingParams(max_tokens=20, ignore_eos=True))
    llm.abort(aborted)
    assert not llm.unfinished and llm.step() == [] and is_clean(llm)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(["add", "generate", "stream", "next", "close", "step", "abort", "restart"]),
                max_size=25), st.integers(0, 99))
def test_every_output_is_handed_out_once(calls: list[str], seed: int) -> None:
    draw = random.Random(seed)
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (1, 4, 11)]
    with engine(async_scheduling=draw.random() < 0.5) as llm:
        wanted, aborted, done, streams = set[int](), set[int](), list[int](), list[Iterator[RequestOutput]]()
        for call in calls:
            prompt, each = draw.choice(PROMPTS), draw.choice(params)
            if call == "add":
                wanted.add(llm.add_request(prompt, each))
            elif call == "generate":
                assert [len(o.token_ids) for o in llm.generate([prompt] * 2, each)] == [each.max_tokens] * 2
            elif call == "stream":
                streams.append(llm.stream(prompt, each))
            elif call == "next" and streams:
                next(draw.choice(streams), None)
            elif call == "close" and streams:
                streams.pop(draw.randrange(len(streams))).close()  # type: ignore[attr-defined]
            elif call == "step":
                done += [o.request_id for o in llm.step() if o.finish_reason is not None and o.request_id in wanted]
            elif call == "abort" and wanted - set(done):
                aborted.add(draw.choice(sorted(wanted - set(done))))
                llm.abort(max(aborted))
                wanted.discard(max(aborted))
            elif call == "restart":
                llm.restart()
            assert len(llm.requests.grown) <= len(wanted)
        streams.clear()
        gc.collect()
        done += [o.request_id for o in drain(llm)]
        assert sorted(done) == sorted(wanted) and is_clean(llm)
