"""A rank's links to the others, made by all ranks together."""

from __future__ import annotations

import os

import torch

from hal.config import WorkerConfig
from hal.contracts.backend import Backend
from hal.contracts.communicator import Communicator, LocalCommunicator
from hal.contracts.control_plane import ControlPlane
from hal.errors import BackendError
from workers.control.collectives import CollectivePlane
from workers.control.planes import log_without_memory, make_plane
from workers.data.process_groups import TorchCommunicator
from workers.data.shared_memory import ShmCommunicator
from workers.links.groups import Store, make_group
from workers.links.liveness import Lifelines


def connect(config: WorkerConfig, backend: Backend, device: torch.device,
            store: Store | None) -> tuple[ControlPlane, Communicator]:
    """A rank's links. All ranks call it at the same time; `store` is where they meet."""
    topology = config.topology
    plane = make_plane(config.engine.control_plane, topology, store, backend.collectives, device)
    try:
        return plane, _data_plane(config, backend, device, store, isinstance(plane, CollectivePlane))
    except BaseException:
        plane.close()  # nobody else has it yet
        raise


def _data_plane(config: WorkerConfig, backend: Backend, device: torch.device, store: Store | None,
                in_groups: bool) -> Communicator:
    """`in_groups`: the control plane needs no shared memory, because that was asked for or there is none."""
    topology = config.topology
    if store is None:
        return LocalCommunicator()
    if device.type == "cpu" and not in_groups:
        try:
            return ShmCommunicator(topology, device, store)
        except BackendError as error:  # on all ranks
            log_without_memory(topology, "the data plane", error)
    tp_group = world_group = check_group = None
    strict = os.environ.get("HAL_STRICT") == "1"
    if topology.tp > 1:
        if strict:
            check_group = make_group("gloo", store, f"check{topology.pp_rank}", topology.tp_rank, topology.tp)
        tp_group = make_group(backend.collectives, store, f"tp{topology.pp_rank}", topology.tp_rank, topology.tp)
    if topology.pp > 1:
        world_group = make_group(backend.collectives, store, "world", topology.rank, topology.world_size)
    # Gloo reduces tensors of a GPU, but sends the host's memory alone: given another's, it ends the process.
    on_device = backend.collectives == "nccl"
    carrier = device if on_device else torch.device("cpu")
    lifelines = Lifelines(topology, store, "the data plane") if on_device else None
    return TorchCommunicator(topology, device, tp_group, world_group, carrier, check_group, strict, lifelines)
