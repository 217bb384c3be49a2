"""The control plane and the communicator of a rank, which all ranks make together."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch

from hal.config import Axis, Topology, WorkerConfig
from hal.contracts.backend import Backend
from hal.contracts.communicator import Communicator, LocalCommunicator
from hal.contracts.control_plane import ControlPlane
from hal.contracts.device import GLOO, Collectives, PeerSums
from hal.errors import BackendError
from workers.control.collectives import CollectivePlane
from workers.control.planes import log_without_memory, make_plane
from workers.data.axes import ByAxis
from workers.data.process_groups import TorchCommunicator
from workers.data.shared_memory import ShmCommunicator
from workers.links.groups import Store, dist, make_group
from workers.links.liveness import PeerWatch


def connect(config: WorkerConfig, backend: Backend, device: torch.device,
            store: Store | None) -> tuple[ControlPlane, Communicator]:
    """Make a rank's control plane and communicator. All ranks call it at the same time, and meet at `store`."""
    topology = config.topology
    plane = make_plane(config.engine.control_plane, topology, store, backend, device)
    try:
        return plane, _data_plane(config, backend, device, store, isinstance(plane, CollectivePlane))
    except BaseException:
        plane.close()  # nobody else will close it
        raise


def _data_plane(config: WorkerConfig, backend: Backend, device: torch.device, store: Store | None,
                in_groups: bool) -> Communicator:
    """`in_groups`: the control plane needs no shared memory, because that was asked for or there is none."""
    topology = config.topology
    if store is None:
        return LocalCommunicator()
    if device.type == "cpu" and not in_groups and backend.collectives is GLOO:  # else a vendor's own are meant
        try:
            return ShmCommunicator(topology, device, store)
        except BackendError as error:  # on all ranks
            log_without_memory(topology, "the data plane", error)
    return over_groups(topology, backend, device, store, os.environ.get("HAL_STRICT") == "1")


def over_groups(topology: Topology, backend: Backend, device: torch.device, store: Store,
                strict: bool) -> TorchCommunicator:
    """The data plane over process groups of the backend's collectives; `strict` ranks compare fingerprints."""
    collectives = backend.collectives

    def make(what: str, kind: Collectives, axis: Axis) -> Any:
        return make_group(kind, store, f"{what} {axis.name}{axis.ranks[0]}", axis.rank, axis.size)

    def make_sums(axis: Axis) -> PeerSums | None:
        own = dist.PrefixStore(f"sums {axis.name}{axis.ranks[0]}", store)
        return None if axis.name == "pp" else collectives.sums(own, axis.rank, axis.size, device)

    # Stages compare with each message that they send, and need no group for that.
    checks = ByAxis(topology, lambda axis: make("checks", GLOO, axis) if strict and axis.name != "pp" else None)
    groups = ByAxis(topology, partial(make, "data", collectives))
    peers = PeerWatch(topology, store, "the data plane") if collectives.on_device else None
    return TorchCommunicator(topology, device, groups, collectives, backend.runtime, sums=ByAxis(topology, make_sums),
                             checks=checks, strict=strict, peers=peers)
