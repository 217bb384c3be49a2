"""The data plane: the only communication of a runner while it executes. The worker passes it to the runner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

from hal.config import Topology
from hal.contracts.fingerprint import Fingerprint

if TYPE_CHECKING:
    import torch

    from hal.contracts.inputs import IntermediateTensors

I = TypeVar("I", bound="IntermediateTensors")  # noqa: E741
AxisName = Literal["tp", "pp", "ep"]  # of hal.config.AXES


class NativeSums(Protocol):
    """The all-reduce over "tp" for a runner whose step is compiled code: a C function that this code calls, and nothing
    else of the communicator.

        int32_t function(void *state, void *x, int64_t n, int32_t bf16);

    x, n contiguous values of bfloat16 or float in host memory, becomes the sum. It has the bits of
    Communicator.all_reduce, but for those of a NaN. If the function returns other than 0, the code returns to Python at
    once, leaves the context, calls `finish(x)`, and goes on after this sum. One thread at a time calls it, and only
    within the context:

        with native_sums: ...

    Raises: as collectives; the function itself never waits long.

    Attributes:
        function, state: addresses.
    """

    function: int
    state: int

    def __enter__(self) -> object:
        """Raises GuardError: the phase allows no collectives."""

    def __exit__(self, *_: object) -> None: ...

    def finish(self, x: torch.Tensor) -> None:
        """Wait for the ranks that the function did not wait for; x becomes the sum."""


class Communicator(Protocol):
    """Collectives over the ranks of one axis of the mesh (hal.config.Topology.axis), and transfers between pipeline
    stages. Along an axis of size 1 every collective is the identity.

    All ranks of the axis call the same collective, with tensors of the same dtype and, unless a method says otherwise,
    of the same shape. The methods after `end_step` run inside `hal.guard.data_plane`, so the guard lets them pass in
    `execute`.

    Attributes:
        topology: this rank's place in the mesh.
        capturable: whether collectives may be captured into a graph of the device.
        fingerprint: the fingerprint of the running step. The worker begins it; collectives count in it and compare it.
        native_sums: None where sums can be called from Python only.

    Raises (collectives):
        ConfigError: the mesh has no such axis.
        InputError: the tensor cannot be cut in this way.
        StateError: another rank is in another step, or at another place of it.
        WorkerError: another rank is gone.
    """

    topology: Topology
    capturable: bool
    fingerprint: Fingerprint
    native_sums: NativeSums | None

    def check(self) -> None:
        """Called by the worker when it has fetched a result. Raises WorkerError: another rank is gone, so collectives
        may have ended with a wrong result."""

    def end_step(self) -> None:
        """Called by the worker when this rank has executed its part of the step. Raises StateError, as collectives do.
        """

    def all_reduce(self, x: torch.Tensor, axis: AxisName = "tp") -> torch.Tensor:
        """The sum over the ranks, in place where possible; the result has x's shape and dtype."""

    def all_gather(self, x: torch.Tensor, axis: AxisName = "tp", dim: int = -1) -> torch.Tensor:
        """The ranks' tensors side by side along dimension `dim`, in the order of their coordinates."""

    def reduce_scatter(self, x: torch.Tensor, axis: AxisName = "tp", dim: int = -1) -> torch.Tensor:
        """This rank's part of the sum over the ranks. The sum is cut into equal parts along dimension `dim`, which the
        axis's size must divide."""

    def all_to_all(self, x: torch.Tensor, axis: AxisName = "tp", send_sizes: Sequence[int] | None = None,
                   recv_sizes: Sequence[int] | None = None) -> torch.Tensor:
        """Send rows of x to each rank, and receive rows from each.

        Args:
            x: [n, ...]; n and the sizes may differ between ranks.
            send_sizes: how many rows go to each rank, in the order of x and of the coordinates; their sum is n. None:
                equal parts.
            recv_sizes: how many rows come from each rank; None: as many as go to it.

        Returns:
            [sum of recv_sizes, ...], in the order of the coordinates of the ranks that sent them.
        """

    def broadcast(self, x: torch.Tensor, axis: AxisName = "tp", source: int = 0) -> torch.Tensor:
        """The tensor of the rank whose coordinate is `source`, in place where possible."""

    def send(self, tensors: IntermediateTensors) -> None:
        """Send to the next rank along the axis "pp". Called by the worker, between phases."""

    def recv(self, kind: type[I], dims: dict[str, int]) -> I:
        """Receive from the rank before this one along "pp". The shapes do not travel: they follow from the declaration
        and this step's dims."""

    def close(self) -> None:
        """Leave all groups. Idempotent."""


class LocalCommunicator:
    """The communicator of a single rank: collectives are the identity, and there is no other stage."""

    topology, capturable = Topology(), True
    fingerprint = Fingerprint()  # there is nobody to differ from
    native_sums: NativeSums | None = None

    def check(self) -> None:
        pass

    def end_step(self) -> None:
        pass

    def all_reduce(self, x: torch.Tensor, axis: AxisName = "tp") -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor, axis: AxisName = "tp", dim: int = -1) -> torch.Tensor:
        return x

    def reduce_scatter(self, x: torch.Tensor, axis: AxisName = "tp", dim: int = -1) -> torch.Tensor:
        return x

    def all_to_all(self, x: torch.Tensor, axis: AxisName = "tp", send_sizes: Sequence[int] | None = None,
                   recv_sizes: Sequence[int] | None = None) -> torch.Tensor:
        return x

    def broadcast(self, x: torch.Tensor, axis: AxisName = "tp", source: int = 0) -> torch.Tensor:
        return x

    def send(self, tensors: IntermediateTensors) -> None:
        raise AssertionError("there is no next stage in a world of one")

    def recv(self, kind: type[I], dims: dict[str, int]) -> I:
        raise AssertionError("there is no previous stage in a world of one")

    def close(self) -> None:
        pass
