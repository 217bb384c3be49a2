"""The worker of an engine that starts slowly (see foreign.py)."""

from __future__ import annotations

from foreign import slow_down

from hal.config import WorkerConfig
from hal.contracts.backend import Backend
from workers.worker.generic import Worker


class PausingWorker(Worker):
    def __init__(self, config: WorkerConfig, backend: Backend) -> None:
        super().__init__(config, backend)
        slow_down(config.topology.rank)
