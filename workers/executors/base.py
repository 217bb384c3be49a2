"""The base of executors: submitted steps, the order of their outputs, and how a failure ends an engine."""

from __future__ import annotations

import abc
import ctypes
import os
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import numpy as np

from hal.contracts.inputs import ModelInput
from hal.contracts.request import ExecuteModelRequest, SamplingRequest
from hal.errors import HalError, StateError, WorkerError, in_forked_child
from hal.profiling import span
from hal.schema import Declared
from hal.torch_state import TorchState
from workers.executors.processes import threads_of_driver
from workers.links.reports import Failure, FailureListeners, chain
from workers.worker.base import WorkerBase

A = TypeVar("A")
R = TypeVar("R")
Take = Callable[[], Declared]


class SubmittedStep:
    """A step that was submitted (see hal.contracts.executor.StepHandle)."""

    def __init__(self, executor: ExecutorBase, take: Take | None, request: ExecuteModelRequest | None = None) -> None:
        self._executor, self.take = executor, take
        self.request = request  # kept while its sampling follows
        self.output: Declared | None = None

    def sample(self, columns: Mapping[str, Any] | None = None) -> None:
        self._executor.sample(self, columns or {})

    def result(self) -> Declared:
        if self.output is None:
            self._executor.finish(self)
        assert self.output is not None
        return self.output

    def fetch(self, _: None = None) -> None:
        assert self.take is not None
        with span("fetch"):
            self.output = self.take()


class ExecutorBase(abc.ABC):
    """The executor of one process. A subclass submits a step, finds the cause of a failure, and ends the ranks.

    Args:
        world_size: the number of ranks that share this host's cores.
    """

    input_type: type[ModelInput]
    output_type: type[Declared]
    tokens_per_row: int
    kv_bytes_per_block: int
    multi_step: bool
    round_times: Sequence[Sequence[float]] = ()

    def __init__(self, world_size: int) -> None:
        self._torch = TorchState(threads_of_driver(world_size))
        self._failure: HalError | None = None
        self._closed = False
        self.listeners = FailureListeners()
        self._pending: deque[SubmittedStep] = deque()
        self._unsampled: SubmittedStep | None = None  # the last step, while it waits for its sampling
        self._process = os.getpid()
        _executors.add(self)

    _worker: WorkerBase

    @abc.abstractmethod
    def _taking(self, request: ExecuteModelRequest, output: Any) -> Take:
        """A function that waits for the output of the step that was just submitted. `output` is the result of this
        process's worker, if it has one."""

    @abc.abstractmethod
    def _blame(self, error: BaseException) -> Failure:
        """The first failure, given the error that a step raised here."""

    @abc.abstractmethod
    def _end(self, patience: float) -> None:
        """End this executor's ranks. They have `patience` seconds to end by themselves."""

    def take_types(self, worker: WorkerBase) -> None:
        """Take over the types and limits that the worker knows once the model is loaded."""
        self.input_type, self.output_type = worker.input_type, worker.output_type
        self.tokens_per_row, self.has_row_states = worker.tokens_per_row, worker.has_row_states
        self.multi_step = worker.multi_step

    def start(self, start: Callable[[], int]) -> None:
        """Run `start`, which makes this process's rank ready and returns the number of KV blocks. When it fails, all
        ranks are ended, and the first failure is raised."""
        try:
            with self._torch:
                self.num_blocks = start()
        except BaseException as error:
            failure = self._blame(error)
            self._close(0, error)
            if failure.rank == self._worker.topology.rank and (
                    isinstance(error, HalError) or not isinstance(error, Exception)):
                raise
            raise failure.at_start() from error

    def check(self) -> None:
        if self._closed:
            raise self._failure or StateError("the executor is shut down", hint="make a new engine")

    def health(self) -> HalError | None:
        try:
            self.check()
        except HalError as error:
            return error
        return None

    def expert_loads(self) -> np.ndarray[Any, Any] | None:
        return self._worker.expert_loads()

    def on_failure(self, listener: Callable[[WorkerError], None]) -> None:
        self.listeners.add(listener)

    def execute_model(self, request: ExecuteModelRequest, *, sampling_follows: bool = False) -> SubmittedStep:
        self.check()
        if self._unsampled is not None:
            raise StateError(f"step {request.step} cannot begin", got=f"step {_number(self._unsampled)} waits for what "
                             "its sampling needs", expected="a call of sample() on that step's handle")
        if sampling_follows and request.num_steps > 1:
            raise StateError("a step that gives its sequences several tokens has one phase", got=f"sampling_follows, "
                             f"num_steps={request.num_steps}", expected="steps_per_message=1",
                             hint="set Sequence.needs_tokens for sequences whose sampling waits for the host")
        request.sampling_follows = sampling_follows and self._worker.two_phase
        if not sampling_follows:
            with self._torch:
                handle = SubmittedStep(self, self._guarded(self._submit, request))
        else:
            if request.sampling_follows:
                with self._torch:
                    self._guarded(self._worker.execute_model, request)
            handle = self._unsampled = SubmittedStep(self, None, request)
        self._pending.append(handle)
        return handle

    def _submit(self, request: ExecuteModelRequest) -> Take:
        return self._taking(request, self._worker.execute_model(request))

    def sample(self, handle: SubmittedStep, columns: Mapping[str, Any]) -> None:
        """See hal.contracts.executor.StepHandle."""
        self.check()
        request = handle.request
        if handle is not self._unsampled or request is None:
            raise StateError("the step does not wait for what its sampling needs",
                             got="a step that was submitted without sampling_follows" if request is None else
                             f"a second call for step {request.step}", expected="one call after execute_model(..., "
                             "sampling_follows=True)")
        sampling = SamplingRequest.of(request, columns, self._worker.config.model.vocab_size)
        begun = request.sampling_follows
        request.join(sampling)
        self._unsampled = None
        with self._torch:
            handle.take = (self._guarded(lambda s: self._taking(request, self._worker.sample(s)), sampling) if begun
                           else self._guarded(self._submit, request))

    def finish(self, handle: SubmittedStep) -> None:
        """Take the outputs of all steps up to this handle's step, in the order of the steps."""
        if self._closed:
            raise self._failure or StateError("the executor is shut down", hint="fetch results before shutdown")
        if handle is self._unsampled:
            raise StateError(f"step {_number(handle)} has no output", got="it waits for what its sampling needs",
                             expected="a call of sample() on its handle")
        first = None
        while first is not handle:
            first = self._pending.popleft()
            self._guarded(first.fetch, None)  # with the caller's torch settings, since it computes nothing

    def _guarded(self, call: Callable[[A], R], argument: A) -> R:
        """Run a part of a step. When it fails, the whole engine is ended."""
        try:
            return call(argument)
        except BaseException as error:
            if not isinstance(error, Exception):  # an interrupt: ranks no longer agree about the step
                self._close(0)
                raise
            self._fail(self._blame(error), error)

    def _fail(self, failure: Failure, error: Exception | None) -> NoReturn:
        raised = self._failure = failure.in_step()
        self._close(0, error)
        self.listeners.tell(raised)
        raise raised from error

    def _close(self, patience: float, error: BaseException | None = None) -> None:
        self._closed = True
        self._pending.clear()
        self._unsampled = None
        for each in chain(error):  # its frames hold memory that the next engine needs, and graphs that delay an abort
            traceback.clear_frames(each.__traceback__)
        self._end(patience)

    def disown(self) -> None:
        """In a forked child: leave the engine to the process that made it. The child must not end the ranks. A process
        group's destructor would wait for threads that the child does not have, so nothing that this executor holds is
        ever destroyed."""
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))
        if not self._closed:
            self._closed = True
            self._failure = in_forked_child(self._process)


def fewest(blocks: Sequence[int]) -> int:
    """The number of KV blocks that all ranks can have. A rank of which a block takes no memory reports 0, and does not
    count; where all do, there are none."""
    return min((count for count in blocks if count), default=0)


def _number(handle: SubmittedStep) -> int | str:
    return "?" if handle.request is None else handle.request.step


_executors: weakref.WeakSet[ExecutorBase] = weakref.WeakSet()


def _disown_all() -> None:
    for executor in list(_executors):
        executor.disown()


os.register_at_fork(after_in_child=_disown_all)
