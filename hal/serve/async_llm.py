"""AsyncLLM: an LLM for asyncio. One thread runs the engine, and any number of tasks give it requests."""

from __future__ import annotations

import asyncio
import logging
import os
import weakref
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import fields
from functools import partial
from operator import attrgetter
from queue import Empty, SimpleQueue
from threading import Thread
from time import monotonic, thread_time
from typing import Any, TypeVar

import numpy as np

from hal.checkpoints.chat import Message
from hal.config import BUNDLED_MODEL
from hal.engine.llm import LLM
from hal.engine.prompts import Prompt, Prompts
from hal.engine.request_output import RequestOutput
from hal.engine.request_state import RequestState
from hal.engine.stats import Stats
from hal.errors import ConfigError, HalError, LengthError, NumericsError, RequestError, StateError, WorkerError
from hal.sampling.params import SamplingParams

_log = logging.getLogger("hal")
_SHARE = 0.02  # of the time that may go into giving outputs to tasks; see AsyncLLM
_LONGEST = 0.05  # seconds that an output is held back for this
_SHUT_DOWN = "the engine is shut down"
_POLL = 0.01  # seconds between two looks whether all requests have ended
_values = attrgetter(*(each.name for each in fields(RequestOutput)))
T = TypeVar("T")


class _Stream:
    """A request, between the task that reads it and the engine's thread.

    Args:
        ids: of the prompt; or, where `params` is None, of the texts to embed. retries: the number of failures of the
            engine after which it goes on.

    Attributes:
        request: the engine's state of it, once it is enqueued; told: an output was given to the task. The engine's
            thread alone uses these.
        latest: the newest output (or the vectors), or the error, that the task has not read. It replaces an older
            output, which it contains, so nothing piles up for a slow reader.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, retries: int, ids: list[Any], prompt: Prompt = "",
                 params: SamplingParams | None = None) -> None:
        self.loop, self.retries, self.ids, self.prompt, self.params = loop, retries, ids, prompt, params
        self.request: RequestState | None = None
        self.told = False
        self.latest: RequestOutput | np.ndarray | HalError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, latest: RequestOutput | np.ndarray | HalError) -> None:
        self.latest = latest
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next(self) -> Any:
        if self.latest is None:
            self._waiter = self.loop.create_future()
            await self._waiter
        latest, self.latest = self.latest, None
        if isinstance(latest, HalError):
            raise latest
        return latest


class AsyncLLM:
    """An engine for one model, which the tasks of an asyncio loop use.

        async with AsyncLLM("path/to/checkpoint") as engine:
            async for output in engine.generate("Once upon a time", SamplingParams(max_tokens=32)):
                print(output.text)

    Making it loads the model, so make it before the loop runs, or in `asyncio.to_thread`. The engine has a thread of
    its own. The tasks of one loop at a time may use it; another loop may follow when the first one is closed or no
    request is left.

    **Slow readers, and readers that go away.** Outputs are cumulative, and a task gets the newest one. So a slow reader
    delays no other request and costs no memory. A generator that is closed, or whose task is cancelled, aborts its
    request. The loop and the engine share Python's lock, so outputs that are given to tasks delay the engine. Outputs
    of running requests are therefore given together, and held back by up to 0.05 seconds while giving them takes
    more than 2% of the time: a fast model with many readers yields several tokens at a time. The first and the last
    output of a request are never held back.

    **Failures.** When a rank dies, the engine starts new workers, and requests go on from the tokens that they have.

    Args:
        model, progress, options: see LLM.
        retries: the number of failures after which a request goes on. With 0, a failure ends the requests in flight
            with its error. So a request that ends the engine each time is given up, with those beside it each time.
        restarts: how often the engine starts new workers before a request has completed. When none is left, the
            engine has failed: all requests, later calls and `health` get the error. With 0 this is the first failure.
        max_prompt_tokens: longer prompts and texts are refused; None: those that the model cannot take.

    Attributes:
        failures: of the engine so far.

    Raises:
        The errors of LLM.
    """

    def __init__(self, model: str | os.PathLike[str] = str(BUNDLED_MODEL), *, retries: int = 1, restarts: int = 3,
                 max_prompt_tokens: int | None = None, progress: bool = False, **options: Any) -> None:
        if options.get("wire") == "none":
            raise ConfigError("requests come at times that the ranks of a launcher cannot agree on", got="wire='none'",
                              expected="another wire policy", hint="LLM runs under a launcher (docs/distributed.md)")
        self.llm = LLM(model, progress=progress, **options)
        self.retries, self.restarts, self.failures, self.max_prompt_tokens = retries, restarts, 0, max_prompt_tokens
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        # Texts become tokens in another thread, so that a long prompt delays no step. It is one thread, since a
        # tokenizer that cuts texts is not thread-safe.
        self._tokenizer = ThreadPoolExecutor(1, "hal-tokenizer")
        # Used by the loop's thread:
        self._open = set[_Stream]()  # whose last output the task has not been given
        self._refusal: str | None = None  # why new requests are refused
        # Used by the engine's thread:
        self._streams: dict[int, _Stream] = {}  # by request_id, until the request is complete
        self._texts: list[_Stream] = []
        self._grown: dict[_Stream, None] = {}  # whose task has not been given the newest output
        self._urgent: dict[_Stream, None] = {}  # those of them whose output is the first or the last one
        self._restarts_left = restarts
        self._failed: HalError | None = None
        # Used by both: outputs are on their way to tasks, and the time from which on more may follow them.
        self._giving, self._next = False, 0.0
        self._thread = Thread(target=self._run, name="hal-engine", daemon=True)
        self._watch()
        self._thread.start()
        self._end = weakref.finalize(self, _end, self._inbox, self._thread)  # also when the program ends

    async def generate(self, prompt: Prompt, params: SamplingParams | None = None,
                       ) -> AsyncGenerator[RequestOutput, None]:
        """Yield the output when it has grown, and when it has ended; each is a snapshot of all tokens so far, whose
        text never shows a part of a stop text.

        Args:
            prompt: a text, or token ids. params: None: see `LLM.defaults`.

        Raises:
            RequestError, CapacityError: the request is refused. WorkerError: a rank failed, and `retries` or `restarts`
            are used up. StateError: the engine drains or is shut down, or another loop uses it.
        """
        prepared = self._enter().run_in_executor(self._tokenizer, self.llm.prepare, prompt, params)
        ids, chosen = await prepared
        self._check_length(ids)
        with self._opened(_Stream(self._enter(), self.retries, ids, prompt, chosen)) as stream:
            output: RequestOutput | None = None
            while output is None or output.finish_reason is None:
                output = await stream.next()
                yield output

    async def chat_ids(self, messages: Sequence[Message], *, tools: Sequence[Any] | None = None,
                       options: Mapping[str, Any] | None = None) -> list[int]:
        """The token ids of a conversation, for `generate`. See `LLM.chat_ids`."""
        ids_of = partial(self.llm.chat_ids, messages, tools=tools, options=options)
        return await self._enter().run_in_executor(self._tokenizer, ids_of)

    async def text_ids(self, texts: Prompts, *, prompt_name: str | None = None, truncate: bool = True,
                       ) -> list[list[int]]:
        """The token ids of texts, for `embed`. Arguments and errors are those of `LLM.embed`."""
        ids_of = partial(self.llm.text_ids, texts, prompt_name=prompt_name, truncate=truncate)
        found = await self._enter().run_in_executor(self._tokenizer, ids_of)
        for ids in found:
            self._check_length(ids)
        return found

    async def embed(self, texts: Prompts, *, prompt_name: str | None = None, truncate: bool = True) -> np.ndarray:
        """See `LLM.embed`. Calls that wait at the same time share steps."""
        ids = await self.text_ids(texts, prompt_name=prompt_name, truncate=truncate)
        with self._opened(_Stream(self._enter(), self.retries, ids)) as waiting:
            vectors: np.ndarray = await waiting.next()
            return vectors

    async def load_adapter(self, name: str, path: str | os.PathLike[str]) -> None:
        """See `LLM.load_adapter`. The engine's thread loads it between two steps, and requests go on. New workers
        after a failure read the directory again, so it must stay while the adapter is loaded."""
        await self._between_steps(partial(self.llm.load_adapter, name, path))

    async def unload_adapter(self, name: str, *, wait: bool = False) -> None:
        """See `LLM.unload_adapter`."""
        await self._between_steps(partial(self.llm.unload_adapter, name, wait=wait))

    @property
    def adapters(self) -> list[str]:
        """See `LLM.adapters`. May be read from any thread."""
        return self.llm.adapters

    async def drain(self, deadline: float | None = None) -> int:
        """Refuse new requests, and wait until those in flight have ended.

        Args:
            deadline: seconds after which the others are aborted, so that their finish_reason is "abort".

        Returns:
            How many were aborted.
        """
        self._refusal = self._refusal or "the engine drains, and takes no new request"
        end, aborted = None if deadline is None else monotonic() + deadline, 0
        while self._open:
            if end is not None and monotonic() >= end and not aborted:
                aborted = len(self._open)
                for each in self._open:
                    self._inbox.put(partial(self._abort, each))
            await asyncio.sleep(_POLL)
        return aborted

    def health(self) -> HalError | None:
        """The error that ended the engine, or that it restarts after; None while it can run steps. May be called from
        any thread."""
        return self.llm.health() if self._failed is None else _again(self._failed)

    @property
    def draining(self) -> bool:
        """Whether new requests are refused since `drain` or `shutdown` was called."""
        return self._refusal is not None

    def stats(self) -> Stats:
        """See `LLM.stats`. May be called from any thread."""
        return self.llm.stats()

    async def shutdown(self) -> None:
        """End the engine, and with it all requests: they get a StateError. Idempotent."""
        self._refusal = _SHUT_DOWN
        await asyncio.to_thread(self.close)
        while self._open:
            await asyncio.sleep(0)

    def close(self) -> None:
        """`shutdown` for a program whose loop does not run."""
        self._refusal = _SHUT_DOWN
        self._end()
        self._tokenizer.shutdown(wait=False)

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *args: object) -> None:
        await self.shutdown()

    # In the loop's thread:

    def _enter(self) -> asyncio.AbstractEventLoop:
        """The running loop. Raises StateError, or the error that ended the engine."""
        if self._refusal is not None:
            raise StateError(self._refusal, hint="send the request to another engine")
        if self._failed is not None:
            raise _again(self._failed)
        loop = asyncio.get_running_loop()
        for each in [each for each in self._open if each.loop is not loop]:
            if not each.loop.is_closed():
                raise StateError("another event loop uses this engine", expected="one loop at a time")
            self._open.discard(each)
            self._inbox.put(partial(self._abort, each))
        return loop

    async def _between_steps(self, work: Callable[[], T]) -> T:
        """The result of some work that the engine's thread does between two steps. Raises its errors."""
        done = Future[T]()

        def command() -> None:
            if not done.set_running_or_notify_cancel():
                return
            try:
                if self._failed is not None:
                    raise _again(self._failed)
                done.set_result(work())
            except Exception as error:  # it is the caller's, and no failure of the engine
                done.set_exception(error)

        self._enter()
        self._inbox.put(command)
        return await asyncio.wrap_future(done)

    def _check_length(self, ids: list[int]) -> None:
        if self.max_prompt_tokens is not None and len(ids) > self.max_prompt_tokens:
            raise LengthError("the prompt is longer than this engine takes", got=f"{len(ids)} tokens",
                              expected=f"at most {self.max_prompt_tokens}")

    @contextmanager
    def _opened(self, stream: _Stream) -> Iterator[_Stream]:
        """Give the engine a request, and abort it when the block ends before the request does."""
        self._open.add(stream)
        self._inbox.put(partial(self._add, stream))
        try:
            yield stream
        finally:
            if stream in self._open:
                self._open.discard(stream)
                self._inbox.put(partial(self._abort, stream))

    def _give(self, items: list[tuple[_Stream, Any]]) -> None:
        """Wake the tasks of these streams. They run before `_given` does."""
        started = thread_time()  # the time in which this thread waits for Python's lock does not count
        for each, result in items:
            each.put(result)
            if not isinstance(result, RequestOutput) or result.finish_reason is not None:
                self._open.discard(each)
        asyncio.get_running_loop().call_soon(self._given, started)

    def _given(self, started: float) -> None:
        self._next = monotonic() + min((thread_time() - started) / _SHARE, _LONGEST)
        self._giving = False

    # In the engine's thread:

    def _run(self) -> None:
        while True:
            try:
                if not self._turn():
                    break
            except Exception as error:
                self._recover(error)
        self._failed = StateError(_SHUT_DOWN)
        with suppress(Empty):
            while True:
                if (command := self._inbox.get_nowait()) is not None:
                    command()
        self._fail(self._flying(), self._failed)
        with suppress(HalError):
            self.llm.shutdown()

    def _flying(self) -> list[_Stream]:
        return [*self._streams.values(), *self._texts]

    def _turn(self) -> bool:
        """Take what tasks want, and run a step. Returns False when the engine is to end."""
        idle = self._failed is not None or not (self.llm.unfinished or self._texts)
        self._hand_out(everything=idle)
        with suppress(Empty):
            while True:
                command = self._inbox.get(block=idle)
                if command is None:
                    return False
                command()
                idle = False
        if self._texts:
            self._embed(self._texts)
        elif self._failed is None and self.llm.unfinished:
            for output in self.llm.step(text=False):
                stream = self._streams[output.request_id]
                self._grown[stream] = None
                if output.finish_reason is not None:
                    del self._streams[output.request_id]
                    self._restarts_left = self.restarts
                if output.finish_reason is not None or not stream.told:
                    self._urgent[stream] = None
        return True

    def _hand_out(self, *, everything: bool) -> None:
        """Give the outputs that grew to their tasks, or only the urgent ones while the others are held back."""
        everything = everything or not (self._giving or monotonic() < self._next)
        streams = self._grown if everything else self._urgent
        if not streams:
            return
        self._send([(stream, _snapshot(stream)) for stream in streams])
        if everything:
            self._grown = {}
        else:
            for stream in self._urgent:
                del self._grown[stream]
        self._urgent = {}

    def _send(self, items: list[tuple[_Stream, Any]]) -> None:
        self._giving = True
        try:
            items[0][0].loop.call_soon_threadsafe(self._give, items)
        except RuntimeError:  # the loop is closed, and its tasks are gone
            self._giving = False
            for each, _ in items:
                self._abort(each)

    def _add(self, stream: _Stream) -> None:
        if self._failed is not None:
            self._send([(stream, _again(self._failed))])
        elif stream.params is None:
            self._texts.append(stream)
        elif (name := stream.params.adapter) not in (None, *self.llm.adapters):  # unloaded after `prepare` found it
            self._send([(stream, RequestError(
                "the adapter was unloaded before the request began", got=repr(name), param="adapter"))])
        else:
            try:
                stream.request = self.llm.enqueue(stream.prompt, stream.ids, stream.params, polled=True)
            except HalError as error:
                self._send([(stream, _again(error))])
                raise
            self._streams[stream.request.seq.request_id] = stream

    def _abort(self, stream: _Stream) -> None:
        """End a request whose task is gone, or that `drain` does not wait for."""
        if self._forget(stream) and not stream.loop.is_closed():
            self._send([(stream, StateError(self._refusal or "") if stream.request is None else _snapshot(stream))])

    def _forget(self, stream: _Stream) -> bool:
        """Remove a request from the engine. False: it is complete."""
        if stream.request is None:
            known = stream in self._texts
            self._texts = [each for each in self._texts if each is not stream]
            return known
        number = stream.request.seq.request_id
        self.llm.abort(number)
        self._grown.pop(stream, None)
        return self._streams.pop(number, None) is not None

    def _fail(self, ended: Iterable[_Stream], error: BaseException) -> None:
        for stream in list(ended):
            self._forget(stream)
            self._send([(stream, _again(error))])

    def _embed(self, waiting: list[_Stream]) -> None:
        try:
            vectors = self.llm.embed([ids for each in waiting for ids in each.ids])
        except NumericsError as error:
            for each in waiting if len(waiting) > 1 else ():
                self._embed([each])
            if len(waiting) == 1:
                self._fail(waiting, error)
            return
        self._restarts_left, at = self.restarts, 0
        for each in waiting:
            self._forget(each)
            self._send([(each, vectors[at:at + len(each.ids)])])
            at += len(each.ids)

    def _watch(self) -> None:
        """Notice a failure while no step runs, too."""
        self.llm.executor.on_failure(lambda _: self._inbox.put(self._check))

    def _check(self) -> None:
        error = self.llm.health()
        if error is not None and self._failed is None:
            raise error

    def _recover(self, error: BaseException) -> None:
        """Start new workers, or give up."""
        self.failures += 1
        flying = self._flying()
        self._fail([each for each in flying if not each.retries], error)
        for each in flying:
            each.retries -= 1
        while self._restarts_left > 0:
            self._restarts_left -= 1
            _log.warning("the engine failed and starts new workers: %s", error)
            # New workers could not read the files of a lost adapter, and each step would fail, whoever uses it.
            for adapter, lost in self.llm.drop_lost_adapters().items():
                _log.error("the adapter %r is no longer loaded: %s", adapter.name, lost)
                self._fail([each for each in self._streams.values() if each.request is not None
                            and each.request.seq.adapter is adapter], lost)
            try:
                self.llm.restart()
                self._watch()
                return
            except Exception as again:
                error = again  # the requests may be the cause, such as one that no longer fits
                self._fail(self._flying(), error)
        self._failed = _again(error)
        self._fail(self._flying(), error)
        _log.error("the engine has failed: %s", error)


def _snapshot(stream: _Stream) -> RequestOutput:
    request = stream.request
    assert request is not None
    stream.told = True
    if request.seq.finish_reason is None:
        request.write_text()
    output = RequestOutput(*_values(request.output))  # several times as fast as dataclasses.replace
    output.token_ids = output.token_ids.copy()
    output.logprobs = None if output.logprobs is None else output.logprobs.copy()
    return output


def _again(error: BaseException) -> HalError:
    """A new error with the same text: a raised error keeps the frames that it passed through alive."""
    if isinstance(error, WorkerError):
        return WorkerError(error.what, rank=error.rank, cause=error.cause, remote_traceback=error.remote_traceback,
                           hint=error.hint)
    if isinstance(error, NumericsError):
        return error  # of one request
    if isinstance(error, RequestError):
        return type(error)(error.what, got=error.got, expected=error.expected, hint=error.hint, param=error.param)
    if isinstance(error, HalError):
        return type(error)(error.what, got=error.got, expected=error.expected, hint=error.hint)
    return StateError("the engine failed", got=f"{type(error).__name__}: {error}")


def _end(inbox: SimpleQueue[Callable[[], None] | None], thread: Thread) -> None:
    inbox.put(None)
    thread.join()
