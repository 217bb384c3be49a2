"""The control plane through Ray, for clusters whose nodes may talk through Ray only: an actor keeps each message until
all have taken it. A message is one bytes object, which Ray carries as it is. No torch here: the actor needs none.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hal.config import Topology
from hal.contracts.control_plane import ControlPlane
from hal.errors import BackendError, WorkerError
from hal.guard import check
from hal.schema.layout import aligned_bytes
from hal.schema.packed import Buffer
from workers.control import message
from workers.links.ray_cluster import join_cluster, runtime_env, whereabouts

_NAMESPACE = "hal"
_CONNECT = 60.0  # seconds that the other ranks may take to join
_LARGE = 1 << 20  # a message of so many bytes goes from node to node, not through the actor
_STEPS, _OUTPUTS = "steps", "outputs"


class Life:
    """An actor that each rank but the driver owns. Ray ends it when the rank's process ends, and reports this at once.
    """

    async def last(self) -> None:
        await asyncio.Event().wait()


class Mailbox:
    """The driver's actor, which ends with the driver. Its methods return None, or a message (bytes, or a list with a
    reference to them). They return a str when a rank is gone, which the str names, so that the wait is in vain."""

    def __init__(self, world_size: int) -> None:
        self._others = world_size - 1
        readers = {_STEPS: range(1, world_size), _OUTPUTS: [0]}
        self._asked = {stream: dict.fromkeys(ranks, 0) for stream, ranks in readers.items()}
        self._messages: dict[str, dict[int, Any]] = {stream: {} for stream in readers}
        self._changed = asyncio.Condition()
        self._watches: list[asyncio.Task[None]] = []
        self._gone: str | None = None

    async def join(self, rank: int, life: Any) -> str | None:
        """Returns when all ranks have joined."""
        if life is not None:
            self._watches.append(asyncio.create_task(self._watch(rank, life)))
        return await self._until(lambda: len(self._watches) == self._others)

    async def put(self, stream: str, number: int, content: Any) -> str | None:
        """Returns when all ranks have taken the message."""
        self._messages[stream][number] = content
        return await self._until(lambda: min(self._asked[stream].values()) > number)

    async def take(self, stream: str, number: int, rank: int) -> Any:
        """Returns when the message is there. The rank has all messages before it."""
        messages, asked = self._messages[stream], self._asked[stream]
        asked[rank] = number
        for taken in [n for n in messages if n < min(asked.values())]:
            del messages[taken]
        return await self._until(lambda: number in messages) or messages[number]

    async def _until(self, ready: Callable[[], bool]) -> str | None:
        async with self._changed:
            self._changed.notify_all()
            await self._changed.wait_for(lambda: ready() or self._gone)
            return None if ready() else self._gone

    async def _watch(self, rank: int, life: Any) -> None:
        try:
            await life.last.remote()
        except Exception as error:  # of Ray
            self._gone = self._gone or f"rank {rank} is gone ({str(error).splitlines()[0]})"
        async with self._changed:
            self._changed.notify_all()


class RayPlane(ControlPlane):
    """The driver makes the mailbox on its own node. The other ranks find the mailbox and the cluster through the store.
    Ranks join the cluster as drivers of Ray, so their hosts must be nodes of it.

    Raises:
        BackendError: Ray is not installed.
        WorkerError: not all ranks joined.
    """

    def __init__(self, topology: Topology, store: Any, *_: object) -> None:
        self._rank = topology.rank
        self._mailbox: Any = None
        self._numbers = {_STEPS: 0, _OUTPUTS: 0}  # the number of the next message, sent or received
        self._puts: deque[Any] = deque()
        self._asked: dict[str, Any] = {}
        self._buffer = aligned_bytes(message.HEAD)
        if topology.is_driver:
            where = ""
            try:
                where = self._make(topology.world_size)
            finally:
                store.set("ray", where)  # so that the other ranks do not wait for this one
        else:
            try:
                name, _, cluster = store.get("ray").decode().partition(" ")
                if not name:
                    raise BackendError("the driver could not make control_plane 'ray'", hint="its own error says why")
                self._ray = join_cluster("control_plane 'ray'", cluster)
                self._mailbox = self._ray.get_actor(name, _NAMESPACE)
            except (RuntimeError, ValueError) as error:
                raise _failed(error) from error
            self._own = self._actor(Life)
        self._get(self._mailbox.join.remote(self._rank, None if topology.is_driver else self._own), _CONNECT)

    def _make(self, world_size: int) -> str:
        self._ray, name = join_cluster("control_plane 'ray'"), f"control-{uuid.uuid4().hex}"
        self._mailbox = self._own = self._actor(Mailbox, world_size, name=name, namespace=_NAMESPACE)
        return f"{name} {whereabouts(self._ray)}"

    def _actor(self, kind: type, *arguments: Any, **options: Any) -> Any:
        """Make an actor on this rank's node. It ends with this process."""
        ray, node = self._ray, self._ray.get_runtime_context().get_node_id()
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=True)
        made = ray.remote(kind).options(num_cpus=0, scheduling_strategy=here, runtime_env=runtime_env(), **options)
        return made.remote(*arguments)

    def broadcast(self, parts: Sequence[Buffer]) -> None:
        check("RayPlane.broadcast")
        self._send(_STEPS, parts, None if parts else message.END_LIMIT)

    def receive(self) -> list[Buffer]:
        check("RayPlane.receive")
        return self._receive(_STEPS)

    def send_output(self, part: Buffer) -> None:
        check("RayPlane.send_output")
        self._send(_OUTPUTS, [part], None)

    def receive_output(self) -> Buffer:
        check("RayPlane.receive_output")
        return self._receive(_OUTPUTS)[0]

    def close(self) -> None:
        if self._mailbox is not None and self._ray.is_initialized():
            if self._puts and self._rank == 0:  # not all ranks have said that they took everything
                self._ray.wait(list(self._puts), num_returns=len(self._puts), timeout=message.END_LIMIT)
            self._ray.kill(self._own)
        self._mailbox = None
        self._puts.clear()
        self._asked.clear()

    def _send(self, stream: str, parts: Sequence[Buffer], limit: float | None) -> None:
        self._open()
        while len(self._puts) >= message.IN_FLIGHT:
            self._get(self._puts.popleft(), limit)
        sent: Any = message.pack(parts)
        if len(sent) >= _LARGE:
            sent = [self._ray.put(sent)]
        self._puts.append(self._mailbox.put.remote(stream, self._numbers[stream], sent))
        self._numbers[stream] += 1

    def _receive(self, stream: str) -> list[Buffer]:
        self._open()
        found = self._get(self._asked.pop(stream, None) or self._ask(stream))
        self._numbers[stream] += 1
        self._asked[stream] = self._ask(stream)  # confirms this message, and waits there for the next one
        if isinstance(found, list):
            found = self._get(found[0])
        if self._buffer.size < len(found):
            self._buffer = aligned_bytes(len(found) + len(found) // 2)
        self._buffer[:len(found)] = np.frombuffer(found, np.uint8)
        return message.read(self._buffer)

    def _ask(self, stream: str) -> Any:
        return self._mailbox.take.remote(stream, self._numbers[stream], self._rank)

    def _get(self, reference: Any, limit: float | None = None) -> Any:
        try:
            found = self._ray.get(reference, timeout=limit)
        except self._ray.exceptions.RayError as error:
            raise _failed(error) from error
        if isinstance(found, str):
            raise _failed(found)
        return found

    def _open(self) -> None:
        if self._mailbox is None:
            raise message.closed()


def _failed(why: Exception | str) -> WorkerError:
    return WorkerError(f"the control plane with the other ranks failed: {str(why).splitlines()[0]}", rank=-1,
                       cause="lost" if isinstance(why, str) else type(why).__name__)
