"""The data plane: what a runner may use of other ranks while it executes. The worker makes it and injects it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

from hal.config import Topology
from hal.contracts.fingerprint import Fingerprint

if TYPE_CHECKING:
    import torch

    from hal.contracts.inputs import IntermediateTensors

I = TypeVar("I", bound="IntermediateTensors")  # noqa: E741


class Communicator(Protocol):
    """The methods behind `end_step` run inside `hal.guard.data_plane`, so that the guard lets them pass in `execute`.

    Attributes:
        topology: of this rank.
        capturable: whether collectives may be captured into a graph of the device.
        fingerprint: of the step that runs; the worker begins it, collectives count in it, and compare it.
    """

    topology: Topology
    capturable: bool
    fingerprint: Fingerprint

    def check(self) -> None:
        """The worker, when it has fetched a result. Raises WorkerError: another rank is gone, and collectives may have
        ended without having done their work."""

    def end_step(self) -> None:
        """The worker: this rank has executed its part of the step. Raises StateError, as collectives may: another rank
        is in another step, or another place of it."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the tensor-parallel ranks, in place where possible; the result has x's shape and dtype."""

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """The tensor-parallel ranks' tensors side by side along the last dimension, in rank order."""

    def send(self, tensors: IntermediateTensors) -> None:
        """To the same tp_rank of the next pipeline stage. Called by the worker, between phases."""

    def recv(self, kind: type[I], dims: dict[str, int]) -> I:
        """From the previous stage: shapes follow from the declaration and this step's dims, so none travel."""

    def close(self) -> None:
        """Leave all groups. Idempotent."""


class LocalCommunicator:
    """A world of one: reductions are the identity, and there is no other stage."""

    topology, capturable = Topology(), True
    fingerprint = Fingerprint()  # there is nobody to differ from

    def check(self) -> None:
        pass

    def end_step(self) -> None:
        pass

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def send(self, tensors: IntermediateTensors) -> None:
        raise AssertionError("there is no next stage in a world of one")

    def recv(self, kind: type[I], dims: dict[str, int]) -> I:
        raise AssertionError("there is no previous stage in a world of one")

    def close(self) -> None:
        pass
