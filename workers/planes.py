"""Control planes: the one of a world of one, the one over gloo, and how one is chosen."""

from __future__ import annotations

import importlib
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, cast

import numpy as np
import torch

from hal.config import Topology
from hal.control import ControlPlane
from hal.errors import BackendError, ConfigError, WorkerError
from hal.schema.layout import align, aligned_bytes
from hal.schema.packed import Buffer
from workers.groups import Store, dist, lost, make_group

_HEADER = 64  # int64: bytes of the message, header included; number of parts; bytes of each part
_MAX_PARTS = _HEADER // 8 - 2
_STEP = 4096
_IN_FLIGHT = 32  # outputs on their way; far more than steps that a driver submits ahead
_END_TIMEOUT = timedelta(seconds=5)
Transfer = Callable[[torch.Tensor], None]

# A factory takes a Topology and the store that all ranks have joined.
PLANES = {"local": "workers.planes:LocalPlane", "shm": "workers.shm_plane:ShmPlane", "gloo": "workers.planes:GlooPlane"}


def make_plane(name: str, topology: Topology, store: Store | None) -> ControlPlane:
    """Raises ConfigError: there is no such control plane, or it does not reach that far."""
    if topology.world_size == 1 and name in ("auto", *PLANES):
        name = "local"
    if name == "auto":
        try:
            return make_plane("shm", topology, store)
        except BackendError:  # on all ranks
            name = "gloo"
    if name not in PLANES:
        raise ConfigError("unknown control_plane", got=repr(name), expected=", ".join(["auto", *PLANES]))
    module, _, attribute = PLANES[name].partition(":")
    return cast(ControlPlane, getattr(importlib.import_module(module), attribute)(topology, store))


class LocalPlane:
    """There is nobody to tell."""

    def __init__(self, topology: Topology, store: object = None) -> None:
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


class Channel:
    """One end of a stream of messages over transfers whose size both ends must know beforehand.

    Both expect a message to be as long as the one before, rounded up: so decoding, whose messages hardly grow, takes
    one transfer a step. A longer one is followed by its rest. The buffer is kept.
    """

    def __init__(self) -> None:
        self.buffer = aligned_bytes(_STEP)
        self.expected = _STEP

    def send(self, parts: Sequence[Buffer], transfer: Transfer) -> None:
        assert len(parts) <= _MAX_PARTS
        total = _HEADER + sum(align(part.size) for part in parts)
        self._reserve(total, 0)
        header = self.buffer[:_HEADER].view(np.int64)
        header[:2] = total, len(parts)
        at = _HEADER
        for i, part in enumerate(parts):
            header[2 + i] = part.size
            self.buffer[at:at + part.size] = part
            at += align(part.size)
        self._move(total, transfer, 0)

    def receive(self, transfer: Transfer) -> list[Buffer]:
        """The parts, as views of the buffer."""
        transfer(torch.from_numpy(self.buffer[:self.expected]))
        total, count, *sizes = self.buffer[:_HEADER].view(np.int64).tolist()
        self._reserve(total, self.expected)
        self._move(total, transfer, self.expected)
        at, parts = _HEADER, []
        for size in sizes[:count]:
            parts.append(self.buffer[at:at + size])
            at += align(size)
        return parts

    def _move(self, total: int, transfer: Transfer, done: int) -> None:
        if not done:
            transfer(torch.from_numpy(self.buffer[:self.expected]))
        if total > self.expected:
            transfer(torch.from_numpy(self.buffer[self.expected:total]))
        self.expected = -(-total // _STEP) * _STEP

    def _reserve(self, total: int, keep: int) -> None:
        size = max(-(-total // _STEP) * _STEP, self.expected)
        if self.buffer.size < size:
            larger = aligned_bytes(size + size // 2)
            larger[:keep] = self.buffer[:keep]
            self.buffer = larger


class GlooPlane:
    """Flat buffers over a gloo group of its own: a broadcast from the driver, and sends back to it."""

    def __init__(self, topology: Topology, store: Store) -> None:
        self._group: Any = make_group("gloo", store, "control", topology.rank, topology.world_size)
        self._steps, self._outputs = Channel(), Channel()
        self._sending: deque[tuple[Any, torch.Tensor]] = deque()
        # The sampling rank: tp_rank 0 of the last stage.
        self._source = (topology.pp - 1) * topology.tp

    def broadcast(self, parts: Sequence[Buffer]) -> None:
        # The last message must not wait for ranks that hang.
        self._steps.send(parts, lambda tensor: self._broadcast(tensor, None if parts else _END_TIMEOUT))

    def receive(self) -> list[Buffer]:
        return self._steps.receive(lambda tensor: self._broadcast(tensor, None))

    def send_output(self, part: Buffer) -> None:
        # Gloo sends when the receiver asks. Waiting for that here would deadlock with a driver that announces the next
        # step before it asks for this one's output. A send cannot be asked whether it is done.
        while len(self._sending) >= _IN_FLIGHT:
            self._wait(lambda: self._sending[0][0])
            self._sending.popleft()
        self._outputs.send([part], self._send)

    def receive_output(self) -> Buffer:
        return self._outputs.receive(lambda tensor: self._wait(lambda: self._group.recv([tensor], self._source, 0)))[0]

    def close(self) -> None:
        self._group = None
        self._sending.clear()

    def _broadcast(self, tensor: torch.Tensor, timeout: timedelta | None) -> None:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        if timeout is not None:
            options.timeout = timeout
        self._wait(lambda: self._group.broadcast([tensor], options))

    def _send(self, tensor: torch.Tensor) -> None:
        kept = tensor.clone()
        try:
            self._sending.append((self._group.send([kept], 0, 0), kept))
        except RuntimeError as error:
            raise lost("the control plane", error) from error

    def _wait(self, launch: Callable[[], Any]) -> None:
        if self._group is None:
            raise WorkerError("the control plane is closed", rank=-1, cause="closed")
        try:
            launch().wait()
        except RuntimeError as error:
            raise lost("the control plane", error) from error
