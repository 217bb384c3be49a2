"""A Communicator for ranks that are threads of one process."""

from __future__ import annotations

import threading

import torch

from hal.config import Topology
from hal.contracts.communicator import AxisName, LocalCommunicator


class LockstepCommunicator(LocalCommunicator):
    """Ranks that are threads of one process: each puts its tensor down, and takes the sum or all of them."""

    def __init__(self, topology: Topology, shelf: list[torch.Tensor | None], barrier: threading.Barrier) -> None:
        self.topology, self.shelf, self.barrier = topology, shelf, barrier

    def _exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        self.shelf[self.topology.tp_rank] = x
        self.barrier.wait(30)
        found = [t.clone() for t in self.shelf if t is not None]
        self.barrier.wait(30)
        return found

    def all_reduce(self, x: torch.Tensor, axis: AxisName = "tp") -> torch.Tensor:
        return torch.stack(self._exchange(x)).sum(0)

    def all_gather(self, x: torch.Tensor, axis: AxisName = "tp", dim: int = -1) -> torch.Tensor:
        return torch.cat(self._exchange(x), -1)
