"""Ranks on the nodes of a Ray cluster. Each rank has an actor that keeps the rank's process; a placement group places
the actors.

Ray places, starts and ends ranks. It carries configuration and reports as JSON, but nothing of a step: the control
plane carries steps.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Sequence
from typing import Any

from hal.config import WorkerConfig
from hal.contracts.backend import load
from hal.errors import CapacityError
from workers.executors.processes import RankProcess, Ranks
from workers.links.ray_cluster import join_cluster, runtime_env
from workers.links.reports import FailureListeners

_PLACED = 60.0  # seconds that the cluster may take to find room
_CARRIED = ("HAL_", "OMP_")  # environment variables that go from the driver to other hosts


class Keeper:
    """The actor of a rank. It holds no model: the rank is a process of its own, which ends when the actor ends."""

    def __init__(self, config: str, worker: str, host: str, environment: str) -> None:
        self._rank = RankProcess(WorkerConfig.from_json(config), worker, host,
                                 {**os.environ, **json.loads(environment)})

    def pids(self) -> list[int]:
        return [os.getpid(), self._rank.process.pid]

    def send(self, content: str) -> None:
        self._rank.send(**json.loads(content))

    def read(self) -> bytes:
        """The reports that have arrived, or b"" at their end."""
        return os.read(self._rank.reports, 1 << 16)

    def status(self) -> int | str | None:
        return self._rank.status()

    def hang_up(self) -> None:
        self._rank.hang_up()


class RayRank(RankProcess):
    """A rank kept by an actor. A thread writes its reports to a pipe, so the driver listens to it like to a process."""

    def __init__(self, ray: Any, actor: Any, config: WorkerConfig) -> None:
        self.rank, self.heartbeat = config.topology.rank, config.engine.heartbeat
        self.buffer, self.missed = b"", 0
        self.reports, self._writing = os.pipe()
        self._ray, self._actor = ray, actor
        self._status: int | str | None = None
        self._pump = threading.Thread(target=self._bring, name=f"hal-ray-{self.rank}", daemon=True)
        self._pump.start()

    def send(self, **content: Any) -> None:
        self._actor.send.remote(json.dumps(content))

    def status(self) -> int | str | None:
        return self._status

    def kill(self) -> None:
        self._ray.kill(self._actor)

    def hang_up(self) -> None:
        with contextlib.suppress(self._ray.exceptions.RayError):  # it died
            self._actor.hang_up.remote()

    def wait(self, seconds: float) -> None:
        self._pump.join(seconds)
        self.kill()
        self._pump.join()

    def _bring(self) -> None:
        try:
            while data := self._ray.get(self._actor.read.remote()):
                os.write(self._writing, data)
            self._status = self._ray.get(self._actor.status.remote())
        except self._ray.exceptions.RayError as error:
            self._status = f"its Ray actor is gone: {str(error).splitlines()[0]}"
        finally:
            os.close(self._writing)


class RayRanks(Ranks):
    """Ranks kept by Ray: a Ray that runs (initialised, or at RAY_ADDRESS), or one that this starts and that ends with
    this process.

    Raises:
        BackendError: Ray is not installed.
        CapacityError: the cluster has no room for the ranks.
    """

    def __init__(self, listeners: FailureListeners) -> None:
        super().__init__(listeners)
        self._ray = join_cluster("executor 'ray'")
        self._group: Any = None

    def host(self) -> str:
        address: str = self._ray.util.get_node_ip_address()
        return address

    def launch(self, configs: Sequence[WorkerConfig], worker: str, host: str, environment: dict[str, str]) -> None:
        ray, device = self._ray, load(configs[0].engine.device).capabilities.ray_resource
        taken = {f"num_{device.lower()}s": 1} if device in ("CPU", "GPU") else {"num_cpus": 0, "resources": {device: 1}}
        self._group = ray.util.placement_group([{device: 1}] * len(configs), strategy="SPREAD")
        if not self._group.wait(_PLACED):
            raise CapacityError("the Ray cluster has no room for the ranks", got=str(ray.available_resources()),
                                expected=f"{len(configs)} bundles of 1 {device}", hint="add nodes, or use fewer ranks")
        carried = json.dumps({k: v for k, v in environment.items() if k.startswith(_CARRIED)})
        for i, config in enumerate(configs):
            place = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(self._group, i)
            # Four threads: one waits in read() while the others send, hang up and ask.
            actor = ray.remote(Keeper).options(
                **taken, max_concurrency=4, max_restarts=0, scheduling_strategy=place,
                runtime_env=runtime_env(),
            ).remote(config.to_json(), worker, host, carried)
            self.processes.append(RayRank(ray, actor, config))

    def end(self, patience: float = 3.0) -> None:
        super().end(patience)
        group, self._group = self._group, None
        if group is not None and self._ray.is_initialized():
            self._ray.util.remove_placement_group(group)
