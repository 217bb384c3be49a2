"""AsyncLLM: tasks that read, go away or are slow; ranks that die; engines that drain."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentences

from hal.engine.llm import LLM
from hal.engine.request_output import RequestOutput
from hal.errors import ConfigError, HalError, NumericsError, RequestError, StateError, WorkerError
from hal.sampling.params import SamplingParams
from hal.serve.async_llm import AsyncLLM

SMALL: dict[str, Any] = {"device": "null", "max_model_len": 64, "block_size": 4, "num_blocks": 60, "max_num_seqs": 3,
                         "max_num_batched_tokens": 16}
LONG = SamplingParams(max_tokens=50, ignore_eos=True)
JOBS: list[tuple[Any, SamplingParams]] = [
    ([5, 6, 7], SamplingParams(max_tokens=9, temperature=0.8, seed=1, ignore_eos=True, logprobs=1, prompt_logprobs=1)),
    ("1+2", SamplingParams(max_tokens=40, ignore_eos=True, stop="4")), ([9] * 6, LONG),
    ("37+85=", SamplingParams(max_tokens=30, temperature=1.0, seed=2, ignore_eos=True, frequency_penalty=0.5))]


def run(body: Callable[[AsyncLLM], Coroutine[Any, Any, Any]], **options: Any) -> Any:
    async def main() -> Any:
        async with AsyncLLM(**{**SMALL, **options}) as engine:
            return await body(engine)

    return asyncio.run(main())


async def last(outputs: AsyncIterator[RequestOutput]) -> RequestOutput:
    return [output async for output in outputs][-1]


def facts(output: RequestOutput) -> tuple[Any, ...]:
    return output.token_ids, output.text, output.finish_reason, output.logprobs, output.prompt_logprobs


async def until(true: Callable[[], Any]) -> None:
    for _ in range(20_000):
        if true():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it never becomes true")


def paced(engine: AsyncLLM, seconds: float = 0.002) -> None:
    """From now on the engine makes a step only when this loop has run for so long since the last one. Otherwise all
    requests may have ended when a loop that was not scheduled for a while looks at them."""
    loop, step, turns = asyncio.get_running_loop(), engine.llm.step, threading.Semaphore(0)

    def in_turn(**options: Any) -> list[RequestOutput]:
        loop.call_soon_threadsafe(loop.call_later, seconds, turns.release)
        assert turns.acquire(timeout=60)
        return step(**options)

    engine.llm.step = in_turn  # type: ignore[method-assign]


async def clean(engine: AsyncLLM) -> None:
    """Wait until the engine holds no row, block or stream. `_grown` and `_urgent` are its thread's own."""
    def nothing_held() -> bool:
        stats, scheduler = engine.stats(), engine.llm.scheduler
        return not (stats.running or stats.waiting or stats.used_blocks or engine._open or engine._streams
                    or engine._grown or engine._urgent) and len(scheduler._free_rows) == scheduler.max_rows

    await until(nothing_held)


def test_tasks_get_what_generate_gives_in_growing_snapshots() -> None:
    with LLM(**SMALL) as llm:
        expected = [facts(*llm.generate([prompt], params)) for prompt, params in JOBS]

    async def read(engine: AsyncLLM, prompt: Any, params: SamplingParams) -> tuple[Any, ...]:
        before: RequestOutput | None = None
        async for output in engine.generate(prompt, params):
            if before is not None:
                size = len(before.token_ids)
                assert output is not before and output.token_ids[:size] == before.token_ids
                assert output.text.startswith(before.text) and len(output.token_ids) > size
            before = output
        assert before is not None
        return facts(before)

    async def body(engine: AsyncLLM) -> None:
        found = await asyncio.gather(*[read(engine, *JOBS[i % len(JOBS)]) for i in range(24)])
        assert found == [expected[i % len(JOBS)] for i in range(24)]
        await clean(engine)

    run(body)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["closed", "cancelled", "dropped", "cancelled before the first output"])
def test_a_reader_that_goes_away_aborts_its_request_alone(how: str) -> None:
    async def body(engine: AsyncLLM) -> None:
        paced(engine)
        kept = asyncio.create_task(last(engine.generate([9] * 6, LONG)))
        if how.startswith("cancelled"):
            tasks = [asyncio.create_task(last(engine.generate([i, 5], LONG))) for i in range(1, 9)]
            if how == "cancelled":
                await until(lambda: engine.stats().running == 3)
            else:
                await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            assert all(isinstance(e, asyncio.CancelledError)
                       for e in await asyncio.gather(*tasks, return_exceptions=True))
        else:
            streams = [engine.generate([i, 5], LONG) for i in range(1, 4)]
            for stream in streams:
                assert (await anext(stream)).finish_reason is None
                if how == "closed":
                    await stream.aclose()  # type: ignore[attr-defined]
            del streams, stream
            gc.collect()
        assert len((await kept).token_ids) == 50
        await clean(engine)
        assert engine.stats().decode_tokens < 50 * 5

    run(body)


def test_a_slow_reader_delays_nobody_and_gets_merged_outputs() -> None:
    async def body(engine: AsyncLLM) -> None:
        paced(engine)
        slow = engine.generate([9] * 6, LONG)
        first = await anext(slow)
        others = await asyncio.gather(*[last(engine.generate([i, 5], LONG)) for i in range(1, 9)])
        assert all(len(output.token_ids) == 50 for output in others)
        await clean(engine)  # the slow one has ended too, and waits for its reader
        rest = [output async for output in slow]
        assert len(first.token_ids) < 50 and [len(output.token_ids) for output in rest] == [50]

    run(body)


def test_a_refused_request_gets_its_error_and_changes_nothing() -> None:
    async def body(engine: AsyncLLM) -> None:
        kept = asyncio.create_task(last(engine.generate([9] * 6, LONG)))
        for prompt, params in (([], None), ([99], None), ("1" * 70, None), ([5], SamplingParams(logprobs=99))):
            with pytest.raises(RequestError):
                await anext(engine.generate(prompt, params))
        with pytest.raises(RequestError, match="no embeddings"):
            await engine.embed("1")
        assert len((await kept).token_ids) == 50
        await clean(engine)

    run(body)


def kill(engine: AsyncLLM) -> None:
    os.kill(engine.llm.executor._ranks.processes[0].process.pid, signal.SIGKILL)  # type: ignore[attr-defined]


@pytest.mark.slow
def test_requests_go_on_or_fail_when_a_rank_dies() -> None:
    with LLM(**SMALL) as llm:
        expected = [facts(*llm.generate([prompt], params)) for prompt, params in JOBS]

    async def load(engine: AsyncLLM, when: int) -> list[Any]:
        """The outputs of all jobs, when a rank is killed after the engine's step of this number."""
        tasks = [asyncio.create_task(last(engine.generate(*job))) for job in JOBS]
        await until(lambda: engine.stats().steps >= when)
        kill(engine)
        found = await asyncio.gather(*tasks, return_exceptions=True)
        return [output if isinstance(output, BaseException) else facts(output) for output in found]

    async def body(engine: AsyncLLM) -> None:
        paced(engine, 0.005)
        assert await load(engine, 3) == expected and engine.failures == 1 and engine.health() is None
        kill(engine)  # while nothing runs
        await until(lambda: engine.failures == 2 and engine.health() is None)
        assert facts(await last(engine.generate(*JOBS[0]))) == expected[0]
        await clean(engine)

        engine.retries = 0
        found = await load(engine, engine.stats().steps + 3)
        assert all(isinstance(error, WorkerError) and error.rank == 1 for error in found)
        engine.restarts = 0
        assert facts(await last(engine.generate(*JOBS[0]))) == expected[0] and engine.failures == 3
        await clean(engine)

        assert all(isinstance(error, WorkerError) for error in await load(engine, engine.stats().steps + 3))
        assert isinstance(engine.health(), WorkerError)
        with pytest.raises(WorkerError, match="rank 1"):
            await anext(engine.generate(*JOBS[0]))

    run(body, tp=2)


def test_a_request_that_ends_the_engine_each_time_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any exception of a step is a failure of the engine. Requests that ran beside it each time are given up too."""
    step = LLM.step

    def fails(llm: LLM, *, text: bool = True) -> list[RequestOutput]:
        outputs = step(llm, text=text)
        if any(output.prompt_token_ids == [7, 7] and len(output.token_ids) >= 5 for output in outputs):
            raise ArithmeticError("poison")
        return outputs

    monkeypatch.setattr(LLM, "step", fails)

    async def body(engine: AsyncLLM) -> None:
        bad = asyncio.create_task(last(engine.generate([7, 7], LONG)))
        await until(lambda: engine.failures)
        beside = asyncio.create_task(last(engine.generate([9] * 6, LONG)))
        with pytest.raises(StateError, match="poison"):
            await bad
        assert engine.failures == 2 and len((await beside).token_ids) == 50
        assert len((await last(engine.generate([5], LONG))).token_ids) == 50 and engine.health() is None

    run(body)


def test_drain_waits_then_aborts_and_refuses_new_requests() -> None:
    async def body(engine: AsyncLLM) -> None:
        paced(engine)
        started = [asyncio.create_task(last(engine.generate([i, 5], LONG))) for i in range(1, 6)]
        await until(lambda: engine.stats().running)
        assert await engine.drain() == 0 and engine.draining
        assert [len((await task).token_ids) for task in started] == [50] * 5
        with pytest.raises(StateError, match="drains"):
            await anext(engine.generate([5]))

    async def deadline(engine: AsyncLLM) -> None:
        paced(engine, 0.02)
        started = [asyncio.create_task(last(engine.generate([i, 5], LONG))) for i in range(1, 4)]
        await until(lambda: engine.stats().decode_tokens)
        assert await engine.drain(0.05) == 3
        for output in await asyncio.gather(*started):
            assert output.finish_reason == "abort" and 0 < len(output.token_ids) < 50
        await clean(engine)

    run(body)
    run(deadline)


def test_shutdown_tells_those_who_wait() -> None:
    async def body(engine: AsyncLLM) -> None:
        paced(engine)
        started = [asyncio.create_task(last(engine.generate([i, 5], LONG))) for i in range(1, 6)]
        await until(lambda: engine.stats().running)
        await engine.shutdown()
        await engine.shutdown()
        assert {type(error) for error in await asyncio.gather(*started, return_exceptions=True)} == {StateError}
        with pytest.raises(StateError, match="shut down"):
            await anext(engine.generate([5]))
        assert isinstance(engine.health(), StateError) and not engine._thread.is_alive()

    run(body)


def test_ranks_of_a_launcher_are_refused() -> None:
    with pytest.raises(ConfigError, match="launcher"):
        AsyncLLM(**SMALL, wire="none")


def test_one_loop_at_a_time_and_requests_of_a_closed_loop_end() -> None:
    engine = AsyncLLM(**SMALL)
    step, made, refused = engine.llm.step, list[RequestOutput](), threading.Event()

    def held_back(**options: Any) -> list[RequestOutput]:  # so that the request is there when the other loop comes
        assert not made or refused.wait(60)
        made.extend(outputs := step(**options))
        return outputs

    engine.llm.step = held_back  # type: ignore[method-assign]

    async def other() -> None:
        with pytest.raises(StateError, match="another event loop"):
            await anext(engine.generate([5]))

    async def leave() -> Awaitable[Any]:
        stream = engine.generate([9] * 6, LONG)
        await anext(stream)
        await asyncio.to_thread(asyncio.run, other())  # which raises what it raises
        refused.set()
        return stream  # type: ignore[return-value]

    loop = asyncio.new_event_loop()
    stream = loop.run_until_complete(leave())
    loop.close()  # without the clean-up of asyncio.run

    async def follow() -> None:
        assert len((await last(engine.generate([5], LONG))).token_ids) == 50
        await clean(engine)

    asyncio.run(follow())
    engine.close()
    del stream


def test_embeddings_of_many_tasks_share_steps(tmp_path: Path) -> None:
    path = sentences.save("bert-mean", tmp_path)
    texts = [[5 + i % 7, 6, 8] for i in range(24)]
    options = {"device": "cpu", "dtype": "float32", "max_num_batched_tokens": 64, "max_num_seqs": 16}
    with LLM(str(path), **options) as llm:
        expected = llm.embed(texts)

    async def main() -> None:
        async with AsyncLLM(str(path), **options) as engine:
            found = await asyncio.gather(*[engine.embed([text]) for text in texts])
            np.testing.assert_allclose(np.concatenate(found), expected, atol=1e-6)
            assert engine.stats().steps < len(texts)
            with pytest.raises(RequestError, match="no such prompt"):
                await engine.embed([[5]], prompt_name="query")
            runner = engine.llm.executor._worker.runner  # type: ignore[attr-defined]
            runner.model.embed.weight.data[99] = float("nan")
            mixed: list[Any] = await asyncio.gather(*[engine.embed([text]) for text in (texts[0], [5, 99], texts[1])],
                                                    return_exceptions=True)
            assert isinstance(mixed[1], NumericsError) and engine.health() is None and engine.failures == 0
            np.testing.assert_allclose(np.concatenate([mixed[0], mixed[2]]), expected[:2], atol=1e-6)
            with pytest.raises(HalError, match="no tokens"):
                await anext(engine.generate([5]))

    asyncio.run(main())
