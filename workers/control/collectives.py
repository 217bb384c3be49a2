"""Control planes over torch.distributed's collectives: the device's own, or gloo."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch

from hal.config import Topology
from hal.contracts.backend import Backend
from hal.contracts.control_plane import ControlPlane
from hal.contracts.device import GLOO, Collectives, DeviceRuntime
from hal.guard import check
from hal.schema.layout import aligned_bytes
from hal.schema.packed import Buffer
from workers.control.channel import Channel
from workers.control.message import END_LIMIT, IN_FLIGHT, closed
from workers.links.groups import Store, dist, lost, make_group
from workers.links.liveness import PeerWatch

_NAP = 1e-3  # seconds between polls of a device, when the wait is already long
CPU = torch.device("cpu")


class CollectivePlane(ControlPlane):
    """A control plane that sends flat buffers: the driver broadcasts, and the sampling rank sends outputs back.

    The plane has process groups of its own, since the operations of a group run in the order in which a rank issues
    them. The driver announces a step while the data plane still runs the step before, and before the driver asks for
    the output of that step.

    With collectives of a device (Collectives.on_device) a message goes from the host to the device, over the devices'
    links, and back to memory of the host, on a stream of its own beside the step that runs. Such an operation waits on
    the device without a limit. Therefore the host polls whether it has ended, and whether the other ranks live.

    Args:
        backend, device: whose collectives carry messages.

    Raises:
        BackendError: this PyTorch has no such collectives.
        WorkerError: not all ranks came.
    """

    def __init__(self, topology: Topology, store: Store, backend: Backend, device: torch.device) -> None:
        self._connect(topology, store, backend.collectives, backend.runtime, device)

    def _connect(self, topology: Topology, store: Store, collectives: Collectives, runtime: DeviceRuntime,
                 device: torch.device) -> None:
        on_device, self._runtime = collectives.on_device, runtime
        rank, source = topology.rank, topology.sampling_rank
        self._is_driver = topology.is_driver
        self._carrier = device if on_device else CPU
        self._stream: Any = runtime.stream(device) if on_device else None
        self._peers = PeerWatch(topology, store, "the control plane") if on_device else None
        self._steps, self._outputs = (Channel(self._host_memory if on_device else aligned_bytes) for _ in range(2))
        self._sending: deque[tuple[Any, torch.Tensor]] = deque()
        self._closed = False
        self._all: Any = None
        self._pair: Any = None  # the driver and the source
        try:
            self._all = make_group(collectives, store, "control", rank, topology.world_size, control=True)
            if source and rank in (0, source):
                self._pair = make_group(collectives, store, "outputs", int(rank == source), 2, control=True)
            if self._peers is not None:
                self._peers.guard([group for group in (self._all, self._pair) if group is not None], collectives)
                self._meet()
        except BaseException:
            self.close()
            raise

    def broadcast(self, parts: Sequence[Buffer]) -> None:
        check("CollectivePlane.broadcast")
        self._open()
        # The wait of the last message is limited, since other ranks may hang.
        self._steps.send(parts, lambda tensor: self._announce(tensor, None if parts else timedelta(seconds=END_LIMIT)))

    def receive(self) -> list[Buffer]:
        check("CollectivePlane.receive")
        self._open()
        return self._steps.receive(lambda tensor: self._bring(self._broadcast, tensor))

    def send_output(self, part: Buffer) -> None:
        check("CollectivePlane.send_output")
        self._open()
        self._outputs.send([part], lambda tensor: self._queue(lambda kept: self._pair.send([kept], 0, 0), tensor))

    def receive_output(self) -> Buffer:
        check("CollectivePlane.receive_output")
        self._open()
        return self._outputs.receive(lambda tensor: self._bring(lambda t: self._pair.recv([t], 1, 0), tensor))[0]

    def close(self) -> None:
        self._closed, self._all, self._pair = True, None, None
        if self._peers is not None:
            self._peers.close()
        self._sending.clear()

    def _meet(self) -> None:
        """Connect a device's groups now, when all ranks are here. They connect in their first operation, and wait there
        for all ranks."""
        tensor = torch.zeros(1, dtype=torch.uint8)
        if self._is_driver:
            self._announce(tensor, None)
        else:
            self._bring(self._broadcast, tensor)
        if self._pair is not None and self._is_driver:
            self._bring(lambda t: self._pair.recv([t], 1, 0), tensor)
        elif self._pair is not None:
            self._queue(lambda kept: self._pair.send([kept], 0, 0), tensor)

    def _announce(self, tensor: torch.Tensor, timeout: timedelta | None) -> None:
        if self._stream is None:
            self._wait(lambda: self._broadcast(tensor, timeout))
        else:
            self._queue(self._broadcast, tensor)

    def _broadcast(self, tensor: torch.Tensor, timeout: timedelta | None = None) -> Any:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        if timeout is not None:
            options.timeout = timeout
        return self._all.broadcast([tensor], options)

    def _queue(self, launch: Callable[[torch.Tensor], Any], tensor: torch.Tensor) -> None:
        """Send a copy, and keep it until it is sent, which is when the receiver asks for it. Waiting here would be a
        deadlock: a driver announces the next step before it asks for the output of this one."""
        while self._sending and (len(self._sending) >= IN_FLIGHT or self._gone(self._sending[0][0])):
            self._wait(lambda: self._sending[0][0])
            self._sending.popleft()
        with self._on_stream():
            kept = tensor.to(self._carrier, copy=True)
            try:
                self._sending.append((self._issue(lambda: launch(kept)), kept))
            except RuntimeError as error:
                raise lost("the control plane", error) from error

    def _bring(self, launch: Callable[[torch.Tensor], Any], tensor: torch.Tensor) -> None:
        """Receive into a tensor of the host."""
        with self._on_stream():
            carried = tensor if self._stream is None else torch.empty_like(tensor, device=self._carrier)
            self._wait(lambda: launch(carried))
            if carried is not tensor:
                tensor.copy_(carried)

    def _wait(self, launch: Callable[[], Any]) -> None:
        try:
            work = self._issue(launch)
            if self._peers is not None:
                start = time.perf_counter()
                while not work.is_completed():
                    self._peers.check()
                    time.sleep(min((time.perf_counter() - start) / 100, _NAP))
                self._peers.check()  # an abort completes the operation too
            work.wait()
        except RuntimeError as error:
            raise lost("the control plane", error) from error

    def _issue(self, launch: Callable[[], Any]) -> Any:
        return launch() if self._peers is None else self._peers.issue(launch)

    def _gone(self, work: Any) -> bool:
        return self._stream is not None and work.is_completed()  # gloo's work cannot be polled

    def _on_stream(self) -> contextlib.AbstractContextManager[Any]:
        if self._stream is None:
            return contextlib.nullcontext()
        return self._runtime.on_stream(self._carrier, self._stream)

    def _host_memory(self, size: int) -> Buffer:
        buffer: Buffer = self._runtime.host_memory(self._carrier, (size,), torch.uint8).numpy()
        return buffer

    def _open(self) -> None:
        if self._closed:
            raise closed()


class GlooPlane(CollectivePlane):
    """A CollectivePlane over gloo, whatever collectives the device has."""

    def __init__(self, topology: Topology, store: Store, backend: Backend, device: torch.device) -> None:
        self._connect(topology, store, GLOO, backend.runtime, CPU)
