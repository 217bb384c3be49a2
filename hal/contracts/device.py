"""The parts of a backend that workers/ use: streams, events and host memory (DeviceRuntime), and the process groups of
its collectives (Collectives). So workers/ name no device's library. Importing this loads no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hal.errors import BackendError

if TYPE_CHECKING:
    import torch


class Event(Protocol):
    """A place in the order of a device's work."""

    def query(self) -> bool:
        """Whether the device has reached this place."""

    def synchronize(self) -> None:
        """Wait until the device has reached this place."""


class DeviceRuntime:
    """Streams, events and host memory of a device. The default asks torch's module of the device's type
    (torch.get_device_module: torch.cpu, torch.xpu, or what a vendor registered)."""

    def synchronize(self, device: torch.device) -> None:
        """Wait for all work that was issued to the device."""
        self._module(device).synchronize()

    def stream(self, device: torch.device) -> Any:
        """A new stream, whose work runs beside that of the current one."""
        return self._module(device).Stream(device)

    def on_stream(self, device: torch.device, stream: Any) -> AbstractContextManager[Any]:
        """In the block `stream` is the current stream."""
        context: AbstractContextManager[Any] = self._module(device).stream(stream)
        return context

    def record(self, device: torch.device) -> Event:
        """An event behind the work that was issued to the current stream."""
        event: Any = self._module(device).Event()
        event.record(self._module(device).current_stream(device))
        return event  # type: ignore[no-any-return]

    def capturing(self, device: torch.device) -> bool:
        """Whether the current stream is being captured into a graph."""
        asked = getattr(self._module(device), "is_current_stream_capturing", None)
        return asked is not None and bool(asked())

    def program_folders(self) -> Mapping[str, Path]:
        """The folders in which the device's compilers keep programs between starts, by what is in each; empty where it
        keeps none. `hal compile` fills them ahead of time."""
        return {}

    def host_memory(self, device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A zeroed tensor on the host. The device copies from and to its memory while the host goes on, so the memory
        is page-locked, for instance. The default is ordinary memory."""
        import torch

        return torch.zeros(shape, dtype=dtype)

    @staticmethod
    def _module(device: torch.device) -> Any:
        import torch

        return torch.get_device_module(device)


class PeerSums(Protocol):
    """all_reduce of small tensors by another way than the group's, for instance over memory that the devices of one
    host read of each other. It runs in the order of the current stream, and may be captured."""

    def settle(self, other: Callable[[torch.Tensor], object]) -> None:
        """Called once by all ranks, before the first sum. Measure this way beside `other`, which is the group's own
        all_reduce, in place, and decide which sizes `takes` accepts: the same ones on all ranks."""

    def takes(self, x: torch.Tensor) -> bool:
        """Whether this way is the faster one for a tensor of x's size and dtype."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' tensors, a new tensor; the same bits on all ranks. x is contiguous."""

    def abort(self) -> None:
        """End the waiting for a rank that is gone, on the device too. Another thread calls this."""

    def close(self) -> None:
        """Give memory back; no rank uses it any more. Idempotent."""


class Collectives:
    """The process groups by which the ranks of a device reach each other.

    Args:
        kind: "gloo", which workers/ make themselves, or the name of a backend of torch.distributed that was registered
            with torch.distributed.Backend.register_backend. A subclass may make groups of any other kind.
        on_device: operations read and write the device's memory, in the order of its current stream, and may be
            captured into its graphs. They never end when a rank is gone. So workers/ watch connections to the other
            ranks, and abort the groups. If False, operations read and write the host's memory, and fail by themselves.
    """

    def __init__(self, kind: str = "gloo", on_device: bool = False) -> None:
        self.kind, self.on_device = kind, on_device

    def process_group(self, store: Any, rank: int, size: int, timeout: timedelta, control: bool = False) -> Any:
        """A backend object of torch.distributed over ranks 0 to size - 1, which all call this.

        Args:
            store: the store where the ranks of this group meet; no other group uses it.
            control: the group carries small messages of the control plane beside a step. They have priority, and use
                little of the device.

        Raises:
            BackendError: this PyTorch has no such collectives.
            RuntimeError: not all ranks joined.
        """
        import torch.distributed

        dist: Any = torch.distributed  # its stubs leave out what its documentation has
        plugin = dist.Backend._plugins.get(self.kind.upper())
        if plugin is None:
            raise BackendError("this PyTorch has no such collectives", got=self.kind,
                               expected=" or ".join(["gloo", *map(str.lower, dist.Backend._plugins)]),
                               hint="set the backend's `collectives`, import the package that registers them, or "
                                    "install another PyTorch")
        if not plugin.extended_api:
            return plugin.creator_fn(store, rank, size, timeout)
        options = torch._C._distributed_c10d._DistributedBackendOptions()
        options.store, options.group_rank, options.group_size, options.timeout = store, rank, size, timeout
        options.group_id, options.global_ranks_in_group = "", []
        return plugin.creator_fn(options, None)

    def sums(self, store: Any, rank: int, size: int, device: torch.device) -> PeerSums | None:
        """A faster way to add small tensors up over ranks 0 to size - 1, which all call this; None for all of them if
        there is none. `store`: as for process_group."""
        return None

    def failed(self, group: Any) -> bool:
        """Whether a group's library has found an error by itself. Called once a second if `on_device`."""
        from torch._C._distributed_c10d import ErrorType

        return bool(group.get_error() != ErrorType.SUCCESS)

    def abort(self, group: Any) -> None:
        """End the operations of a group, also those on the device. Calls that wait for them return."""
        group.abort()


GLOO = Collectives()
