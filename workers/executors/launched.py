"""One rank of an engine whose ranks torchrun started (wire="none"). Each rank runs the same program with a scheduler of
its own, and makes the same requests. Only outputs travel, so that all schedulers see the same tokens."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import numpy as np

from hal import guard
from hal.config import EngineConfig, Topology, WorkerConfig
from hal.contracts import backend as backends
from hal.contracts.backend import Backend
from hal.contracts.request import ExecuteModelRequest
from hal.contracts.runner import Progress
from hal.errors import ConfigError, StateError
from hal.model_config import ModelConfig
from hal.profiling import span
from hal.schema import Declared
from hal.schema.packed import Buffer
from workers.executors.base import ExecutorBase, Take, fewest
from workers.executors.connections import connect
from workers.links.groups import Store, dist, lost
from workers.links.reports import Failure
from workers.worker.base import make_worker
from workers.worker.consistency import agree, facts_of

_START = timedelta(hours=1)  # another rank may take so much longer to load; a rank that fails says so
_BLAME = timedelta(seconds=2)  # that the cause may take to arrive after a connection broke
_STAGES = "up", "sized", "ready", "stepping"
_engines = itertools.count()  # the same on all ranks, since they run the same program


class LaunchedExecutor(ExecutorBase):
    """This process's rank (see hal.contracts.executor.Executor). Rank 0 sends the sampled tokens to the other ranks.

    Raises:
        ConfigError: the environment is not a launcher's (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), or the launcher
            has started another number of ranks.
    """

    def __init__(self, engine: EngineConfig, model: ModelConfig, backend: Backend, progress: Progress,
                 worker: str) -> None:
        mesh = backends.mesh(backend, engine)
        super().__init__(mesh.world_size)
        self._topology = topology = dataclasses.replace(mesh, rank=launched_rank(mesh.world_size))
        guard.install()
        config = WorkerConfig(engine, model, topology)
        self._stage = iter(_STAGES)
        self._store = meet(topology)
        self._worker = make_worker(worker, config, backend)
        self.num_cpu_blocks = engine.num_cpu_blocks
        self.start(partial(self._start, config, progress))

    def _start(self, config: WorkerConfig, progress: Progress) -> int:
        worker = self._worker
        device = worker.init_device()
        self._agree(facts=facts_of(config))
        self._plane, communicator = connect(config, worker.backend, device, self._store)
        worker.connect(self._plane, communicator)
        worker.load_model(progress)
        self.take_types(worker)
        reports = self._agree(facts=worker.facts(), blocks=worker.determine_num_blocks(),
                              block=worker.kv_bytes_per_block)
        self.kv_bytes_per_block = max(report["block"] for report in reports)
        blocks = fewest([report["blocks"] for report in reports])
        worker.initialize_cache(blocks)
        worker.warmup(progress)
        # Each rank has an engine, and all of them must schedule alike: by the times of the first.
        self.round_times = self._agree(facts={}, times=worker.round_times)[0]["times"]
        next(self._stage)
        return blocks

    def _agree(self, **content: Any) -> list[dict[str, Any]]:
        """Publish this rank's content for a stage of the start, and return that of all ranks, in their order. Raises
        the first failure of a rank."""
        stage, rank = next(self._stage), self._topology.rank
        self._store.set(f"{stage}{rank}", json.dumps({"rank": rank, **content}))
        reports = []
        for other in range(self._topology.world_size):
            self._store.wait([f"{stage}{other}"], _START)
            report = json.loads(self._store.get(f"{stage}{other}"))
            if "cause" in report:
                raise Failure(**report).at_start()
            reports.append(report)
        agree(reports[0]["facts"], reports)
        return reports

    def _taking(self, request: ExecuteModelRequest, output: Any) -> Take:
        digest = np.array([request.step, request.chain()], np.int64)
        if not self._topology.is_driver:
            return partial(self._told, digest)
        fetch = self._worker.receive_output() if output is None else self._worker.fetch(output)
        return partial(self._tell, fetch, digest)

    def _tell(self, fetch: Callable[[], Declared | Buffer], digest: np.ndarray) -> Declared:
        output = fetch()
        packed = output.to_buffer() if isinstance(output, Declared) else output
        with span("broadcast"):
            self._plane.broadcast([packed, digest.view(np.uint8)])
        return output if isinstance(output, Declared) else self.output_type.from_buffer(packed)

    def _told(self, digest: np.ndarray) -> Declared:
        with span("receive"):
            packed, theirs = self._plane.receive()
        step, crc = theirs.view(np.int64)
        if [step, crc] != digest.tolist():
            raise StateError("this rank's scheduler and rank 0's went different ways",
                             got=f"step {digest[0]}, digest {digest[1]:08x}", expected=f"step {step}, digest {crc:08x}",
                             hint="give all ranks the same requests, in the same order")
        return self.output_type.from_buffer(packed.copy())

    def _blame(self, error: BaseException) -> Failure:
        """What failed here is told to the others, in the place where they look next; unless it was told from there."""
        own = Failure.of(self._topology.rank, error, self._worker.describe_step())
        key = f"failed in {_STAGES[-1]}"
        try:
            if own.lost:
                self._store.wait([key], _BLAME)
                return Failure(**json.loads(self._store.get(key)))
            told = json.dumps({name: getattr(own, name) for name in Failure.__slots__})
            for stage in [*self._stage, key]:
                self._store.set(stage if stage == key else f"{stage}{own.rank}", told)
        except RuntimeError:
            pass  # no rank has said why, or the launcher is gone too
        return own

    def shutdown(self) -> None:
        if not self._closed:
            self._close(0)

    def _end(self, patience: float) -> None:
        self._worker.shutdown()


def launched_rank(world: int) -> int:
    """The rank of this process among `world`, from the launcher's variables."""
    names = "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
    missing = [name for name in names if name not in os.environ]
    hint = f"start the program with: torchrun --nproc-per-node {world} ... (or choose another wire)"
    if missing:
        raise ConfigError("wire='none' runs the same program on every rank, and no launcher started this one",
                          got=f"no {', '.join(missing)} in the environment", expected="torchrun's", hint=hint)
    if int(os.environ["WORLD_SIZE"]) != world:
        raise ConfigError("the launcher started another number of ranks", got=f"WORLD_SIZE={os.environ['WORLD_SIZE']}",
                          expected=f"tp * pp = {world}", hint=hint)
    return int(os.environ["RANK"])


def meet(topology: Topology) -> Store:
    """The store where the ranks meet: the launcher's, or one that rank 0 serves. Its keys belong to this engine alone.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = topology.is_driver and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = dist.TCPStore(host, port, None, serves, wait_for_workers=False, multi_tenant=True)
    except RuntimeError as error:
        raise lost("connecting", error) from error
    return dist.PrefixStore(f"hal/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{next(_engines)}", store)
