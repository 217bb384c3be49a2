"""The executor: rank 0 in this process, the other ranks in processes of their own."""

from __future__ import annotations

import dataclasses
import os
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar, cast

import torch

from hal import backend as backends
from hal import guard
from hal.backend import Backend
from hal.config import DType, EngineConfig, Topology, WorkerConfig
from hal.control import ControlPlane
from hal.errors import ConfigError, HalError, StateError, WorkerError
from hal.models.config import ModelConfig
from hal.outputs import SamplerOutput
from hal.request import ExecuteModelRequest
from hal.runner import Progress, no_progress
from workers.agreement import agree, facts_of
from workers.base import make_worker
from workers.groups import serve_store
from workers.links import connect
from workers.ranks import PATIENCE, Ranks, threads_per_rank
from workers.reports import Failure

GENERIC_WORKER = "workers.worker:Worker"
_BLAME = 2.0  # seconds that the cause may take to arrive after a connection broke
A = TypeVar("A")
R = TypeVar("R")


def make_executor(engine: EngineConfig, model: ModelConfig, backend: Backend, progress: Progress = no_progress,
                  worker: str = GENERIC_WORKER) -> WorkerExecutor:
    """See hal.executor.make_executor. `worker` names a WorkerBase, as "module:attribute"."""
    dtype = backends.resolve_dtype(backend, engine.dtype, model.dtype)
    device = backend.name if engine.device == "auto" else engine.device
    engine = dataclasses.replace(engine, dtype=cast(DType, dtype), device=device, async_scheduling=(
        backends.resolve_async(backend, engine.async_scheduling, engine.pp)))
    backends.require(backend, dtype=dtype, tp=engine.tp, pp=engine.pp, num_cpu_blocks=engine.num_cpu_blocks)
    if engine.wire == "none" and engine.tp * engine.pp > 1:
        raise ConfigError("wire='none' needs a scheduler on every rank, and here the driver alone has one",
                          got=f"tp={engine.tp}, pp={engine.pp}", expected="wire='model-input' or wire='request'")
    return WorkerExecutor(engine, model, backend, progress, worker)


class StepHandle:
    """A step that was submitted (see hal.executor.StepHandle)."""

    def __init__(self, executor: WorkerExecutor, fetch: Callable[[], SamplerOutput] | None) -> None:
        self._executor, self._fetch = executor, fetch
        self._output: SamplerOutput | None = None

    def result(self) -> SamplerOutput:
        if self._output is None:
            self._executor.finish(self)
        assert self._output is not None
        return self._output

    def fetch(self, plane: ControlPlane) -> None:
        """Take the output from the rank that sampled, or from the device."""
        fetch = self._fetch
        self._output = fetch() if fetch is not None else SamplerOutput.decode(plane.receive_output().copy())


class WorkerExecutor:
    """All ranks of one engine (see hal.executor.Executor)."""

    def __init__(self, engine: EngineConfig, model: ModelConfig, backend: Backend, progress: Progress,
                 worker: str) -> None:
        guard.install()
        tp = 1 if backend.capabilities.spmd else engine.tp
        configs = [WorkerConfig(engine, model, Topology(tp, engine.pp, rank)) for rank in range(tp * engine.pp)]
        self._failure: WorkerError | None = None
        self._closed = False
        self._pending: deque[StepHandle] = deque()
        self._plane: ControlPlane
        self._ranks = Ranks()
        # Not shutdown(): a finalizer may run in the middle of anything, and must not communicate.
        self._finalizer = weakref.finalize(self, self._ranks.end)
        self._worker = make_worker(worker, configs[0], backend)
        self.num_cpu_blocks = engine.num_cpu_blocks
        try:
            self.num_blocks = self._start(configs, worker, progress)
        except BaseException as error:
            failure = self._blame(error)
            self._end(patience=0)
            if failure is not None:
                raise failure.at_start() from error
            if isinstance(error, HalError) or not isinstance(error, Exception):
                raise
            raise Failure.of(0, error).at_start() from error

    def _start(self, configs: list[WorkerConfig], name: str, progress: Progress) -> int:
        worker, ranks, store = self._worker, self._ranks, None
        if len(configs) > 1:
            if "OMP_NUM_THREADS" not in os.environ:  # else each rank would take all cores, and wait for the others'
                torch.set_num_threads(threads_per_rank(len(configs)))
            store, port = serve_store(len(configs))
            ranks.start(configs[1:], name, port)
        device = worker.init_device()
        agree(facts_of(configs[0]), self._expect("up"))
        self._plane, communicator = connect(configs[0], worker.backend, device, store)
        worker.connect(self._plane, communicator)
        worker.load_model(progress)
        own, reports = worker.determine_num_blocks(), self._expect("sized")
        agree(worker.facts(), reports)
        blocks: int = min([own, *(report["blocks"] for report in reports)])
        ranks.tell(blocks=blocks)
        worker.initialize_cache(blocks)
        worker.warmup(progress)
        self._expect("ready")
        return blocks

    def _expect(self, event: str) -> list[dict[str, Any]]:
        reports = self._ranks.expect(event)
        if isinstance(reports, Failure):
            raise reports.at_start()
        return reports

    def execute_model(self, request: ExecuteModelRequest) -> StepHandle:
        if self._closed:
            raise self._failure or StateError("the executor is shut down", hint="make a new engine")
        failure = self._ranks.failure()
        if failure is not None:
            self._fail(failure, None)
        handle = StepHandle(self, self._guarded(self._submit, request))
        self._pending.append(handle)
        return handle

    def _submit(self, request: ExecuteModelRequest) -> Callable[[], SamplerOutput] | None:
        output = self._worker.execute_model(request)
        return None if output is None else self._worker.fetch(output)

    def finish(self, handle: StepHandle) -> None:
        """Fetch the outputs up to this handle's, in the order of the steps."""
        if self._closed:
            raise self._failure or StateError("the executor is shut down", hint="fetch results before shutdown")
        first = None
        while first is not handle:
            first = self._pending.popleft()
            self._guarded(first.fetch, self._plane)

    def shutdown(self) -> None:
        if not self._closed:
            try:
                self._plane.broadcast([])
            except WorkerError:
                pass  # a rank is gone or hangs; end() sees to it
            self._end()

    def _guarded(self, call: Callable[[A], R], argument: A) -> R:
        """Run a part of a step; when it fails, nothing of the engine remains."""
        try:
            return call(argument)
        except BaseException as error:
            if not isinstance(error, Exception):  # an interrupt: ranks no longer agree about the step
                self._end(patience=0)
                raise
            self._fail(self._blame(error) or Failure.of(0, error, self._worker.describe_step()), error)

    def _blame(self, error: BaseException) -> Failure | None:
        """The rank that failed first, unless it is this one."""
        own = Failure.of(0, error)
        return self._ranks.failure(_BLAME) if own.lost else None

    def _fail(self, failure: Failure, error: Exception | None) -> NoReturn:
        self._failure = failure.in_step()
        self._end(patience=0)
        raise self._failure from error

    def _end(self, patience: float = PATIENCE) -> None:
        self._closed = True
        self._pending.clear()
        self._ranks.end(patience)
        self._worker.shutdown()
        self._finalizer.detach()
