"""The choice of a control plane, and the control plane of a single rank."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import cast

import torch

from hal.config import Topology
from hal.contracts.backend import Backend
from hal.contracts.control_plane import ControlPlane
from hal.errors import BackendError, ConfigError
from hal.schema.packed import Buffer
from hal.values import imported
from workers.links.groups import Store

_log = logging.getLogger("hal")
# A factory takes a Topology, the store that all ranks have joined, the backend and the rank's device.
PLANES = {"local": "workers.control.planes:LocalPlane", "shm": "workers.control.shared_memory:ShmPlane",
          "gloo": "workers.control.collectives:GlooPlane", "collectives": "workers.control.collectives:CollectivePlane",
          "ray": "workers.control.ray_mailbox:RayPlane"}


def make_plane(name: str, topology: Topology, store: Store | None, backend: Backend,
               device: torch.device) -> ControlPlane:
    """Make a rank's control plane. Raises ConfigError: there is no such plane, or it cannot reach all ranks."""
    if topology.world_size == 1 and name in ("auto", *PLANES):
        name = "local"
    if name == "auto":
        try:
            return make_plane("shm", topology, store, backend, device)
        except BackendError as error:  # on all ranks
            log_without_memory(topology, "the control plane", error)
            name = "gloo"
    if name not in PLANES:
        raise ConfigError("unknown control_plane", got=repr(name), expected=", ".join(["auto", *PLANES]))
    return cast(ControlPlane, imported(PLANES[name])(topology, store, backend, device))


def log_without_memory(topology: Topology, what: str, error: BackendError) -> None:
    if topology.is_driver:
        _log.warning("%s uses process groups, since %s: %s", what, error.what, error.got)


class LocalPlane:
    """The control plane of a single rank, which has no other rank to tell."""

    def __init__(self, topology: Topology, *_: object) -> None:
        if topology.world_size > 1:
            raise ConfigError("control_plane 'local' reaches one rank only", got=f"{topology.world_size} ranks",
                              expected=", ".join(name for name in PLANES if name != "local"))

    def broadcast(self, parts: Sequence[Buffer]) -> None:
        pass

    def receive(self) -> list[Buffer]:
        return []

    def send_output(self, part: Buffer) -> None:
        raise AssertionError("the driver of a world of one samples itself")

    def receive_output(self) -> Buffer:
        raise AssertionError("the driver of a world of one samples itself")

    def close(self) -> None:
        pass
