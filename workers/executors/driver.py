"""The executor of an engine whose driver is rank 0 in this process and starts the other ranks itself."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from functools import partial
from typing import Any, TypeVar, cast

from hal import guard
from hal.config import DType, EngineConfig, Topology, WorkerConfig
from hal.contracts import backend as backends
from hal.contracts.backend import Backend
from hal.contracts.control_plane import ControlPlane
from hal.contracts.proposer import proposer_class
from hal.contracts.request import ExecuteModelRequest
from hal.contracts.runner import Progress, no_progress
from hal.errors import HalError, WorkerError
from hal.model_config import ModelConfig
from hal.models import check_topology
from hal.values import imported
from workers.executors.base import ExecutorBase, SubmittedStep, Take, fewest
from workers.executors.connections import connect
from workers.executors.launched import LaunchedExecutor
from workers.executors.processes import PATIENCE
from workers.links.groups import RendezvousStore
from workers.links.reports import Failure
from workers.worker.base import make_worker
from workers.worker.consistency import agree, facts_of

GENERIC_WORKER = "workers.worker.generic:Worker"
R = TypeVar("R")
_BLAME = 10.0  # seconds that the cause may take to arrive after a connection broke, on a busy machine or through Ray
# By EngineConfig.executor, the class that starts all ranks but the driver; see workers.executors.processes.Ranks.
EXECUTORS = {"multiprocess": "workers.executors.processes:Ranks", "ray": "workers.executors.ray_actors:RayRanks"}


def make_executor(engine: EngineConfig, model: ModelConfig, backend: Backend, progress: Progress = no_progress,
                  worker: str = GENERIC_WORKER) -> ExecutorBase:
    """See hal.contracts.executor.make_executor. `worker` names a WorkerBase, as "module:attribute"."""
    dtype = backends.resolve_dtype(backend, engine.dtype, model.dtype)
    device = backend.name if engine.device == "auto" else engine.device
    engine = dataclasses.replace(engine, dtype=cast(DType, dtype), device=device, async_scheduling=(
        backends.resolve_async(backend, engine)))
    backends.require(backend, dtype=dtype, kv_dtype=engine.kv_dtype, tp=engine.tp, pp=engine.pp,
                     num_cpu_blocks=engine.num_cpu_blocks, embeddings=model.embedding is not None,
                     batch_invariant=engine.batch_invariant, max_adapters=engine.max_adapters)
    if backend.capabilities.checkpoints:
        check_topology(model, Topology(engine.tp, engine.pp, ep=engine.ep))
    if engine.speculate is not None:
        proposer_class(engine.speculate).check(engine, model)
    if engine.wire == "none" and backends.mesh(backend, engine).world_size > 1:
        return LaunchedExecutor(engine, model, backend, progress, worker)
    return DriverExecutor(engine, model, backend, progress, worker)


class DriverExecutor(ExecutorBase):
    """All ranks of one engine, with the driver (see hal.contracts.executor.Executor)."""

    def __init__(self, engine: EngineConfig, model: ModelConfig, backend: Backend, progress: Progress,
                 worker: str) -> None:
        mesh = backends.mesh(backend, engine)
        super().__init__(mesh.world_size)
        guard.install()
        self._losses = WorkerError.losses
        configs = [WorkerConfig(engine, model, topology) for topology in mesh.every_rank()]
        self._plane: ControlPlane
        self._store: RendezvousStore | None = None
        self._ranks = imported(EXECUTORS[engine.executor])(self.listeners)
        # Not shutdown(): a finalizer may run in the middle of anything, and must not communicate.
        self._finalizer = weakref.finalize(self, self._ranks.end)
        self._worker = make_worker(worker, configs[0], backend)
        self.num_cpu_blocks = engine.num_cpu_blocks
        self.start(partial(self._start, configs, worker, progress))

    def _start(self, configs: list[WorkerConfig], name: str, progress: Progress) -> int:
        worker, ranks, store = self._worker, self._ranks, None
        if len(configs) > 1:
            store = self._store = RendezvousStore(ranks.start(configs[1:], name))
        device = worker.init_device()
        agree(facts_of(configs[0]), self._expect("up"))
        self._plane, communicator = self._unless_one_fails(lambda: connect(configs[0], worker.backend, device, store))
        worker.connect(self._plane, communicator)
        worker.load_model(progress)
        self.take_types(worker)
        own, reports = worker.determine_num_blocks(), self._expect("sized")
        self.kv_bytes_per_block = max([worker.kv_bytes_per_block, *(report["block"] for report in reports)])
        agree(worker.facts(), reports)
        blocks = fewest([own, *(report["blocks"] for report in reports)])
        ranks.tell(blocks=blocks)
        worker.initialize_cache(blocks)
        worker.warmup(progress)
        self._expect("ready")
        self.round_times = worker.round_times
        return blocks

    def _unless_one_fails(self, call: Callable[[], R]) -> R:
        """Run a call that waits for the other ranks, and return early when a rank is gone. The call itself would notice
        this only at its own deadline, after minutes."""
        future: Future[R] = Future()

        def run() -> None:
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, name="hal-connect", daemon=True).start()
        while not wait([future], 0.1).done:
            failure = self._ranks.failure()
            if failure is not None:
                raise failure.at_start()
        return future.result()

    def _expect(self, event: str) -> list[dict[str, Any]]:
        reports: list[dict[str, Any]] | Failure = self._ranks.expect(event)
        if isinstance(reports, Failure):
            raise reports.at_start()
        return reports

    def execute_model(self, request: ExecuteModelRequest, *, sampling_follows: bool = False) -> SubmittedStep:
        self._look()
        return super().execute_model(request, sampling_follows=sampling_follows)

    def sample(self, handle: SubmittedStep, columns: Mapping[str, Any]) -> None:
        self._look()
        super().sample(handle, columns)

    def health(self) -> HalError | None:
        failure = None if self._closed else self._ranks.failure()
        return super().health() if failure is None else failure.in_step()

    def _look(self) -> None:
        """Raises WorkerError: a rank has failed meanwhile."""
        failure = None if self._closed else self._ranks.failure()
        if failure is not None:
            self._fail(failure, None)

    def _taking(self, request: ExecuteModelRequest, output: Any) -> Take:
        if output is not None:
            return self._worker.fetch(output)
        receive = self._worker.receive_output()
        return lambda: self.output_type.from_buffer(receive())

    def shutdown(self) -> None:
        if not self._closed:
            self._ranks.ending = True
            with contextlib.suppress(WorkerError), self._torch:  # a rank is gone or hangs, and end() ends it
                self._plane.broadcast([])
            self._close(PATIENCE)

    def _blame(self, error: BaseException) -> Failure:
        own = Failure.of(0, error, self._worker.describe_step(), self._losses)
        return (self._ranks.failure(_BLAME) if own.lost else None) or own

    def _end(self, patience: float) -> None:
        self._ranks.end(patience)
        self._worker.shutdown()
        self._finalizer.detach()

    def disown(self) -> None:
        super().disown()
        self._finalizer.detach()
