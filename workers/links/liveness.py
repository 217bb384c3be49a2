"""Notices that a rank is gone, if nothing else would: an operation on a device waits for such a rank without a
limit."""

from __future__ import annotations

import contextlib
import hmac
import os
import select
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from hal.config import Topology
from hal.contracts.device import Collectives
from hal.errors import WorkerError
from workers.links.groups import CONNECT, Store, local_address, lost

R = TypeVar("R")
LINGER = 1.0  # seconds that the driver waits for the others to leave, and a rank for its own operations to end
_SECRET = 16  # bytes
_LEAVES = b"."
_LEFT = 0.5  # seconds after which a rank gets an error if it goes on when another has left
_ISSUE = 0.2  # seconds within which an operation is issued, unless the device's queue is full
_LOOK = 1.0  # seconds between checks for errors that the collectives' library has found


class PeerWatch:
    """A connection between the driver and each other rank. The system closes it when one of them ends in any way. A
    rank that leaves in order says so before. All ranks make it at the same time.

    Args:
        name: the name of the part that fails when a rank is gone, for the error; each name once for a store.

    Attributes:
        lost: whether a rank is gone. Then operations have ended without a right result.

    Raises:
        WorkerError: not all ranks joined.
    """

    def __init__(self, topology: Topology, store: Store, name: str) -> None:
        self.lost, self._closed, self._name, self._is_driver = False, False, name, topology.is_driver
        self._sockets: list[socket.socket] = []
        self._wake, self._woken = socket.socketpair()
        self._issuing, self._alone = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        try:
            if topology.is_driver:
                host = local_address(store)
                with socket.create_server((host, 0), backlog=topology.world_size) as server:
                    secret = os.urandom(_SECRET)
                    store.set(f"peers of {name}", f"{secret.hex()} {host} {server.getsockname()[1]}")
                    _admit(server, secret, topology.world_size - 1, self._sockets)
            else:
                shown, host, port = bytes(store.get(f"peers of {name}")).decode().split()
                self._sockets.append(socket.create_connection((host, int(port)), CONNECT.total_seconds()))
                self._sockets[0].sendall(bytes.fromhex(shown))
            for connection in self._sockets:  # a host that is gone closes nothing
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        except (OSError, RuntimeError) as error:
            self.close()
            raise lost("connecting", error) from error

    def guard(self, groups: list[Any], collectives: Collectives, before: Sequence[Callable[[], None]] = ()) -> None:
        """Abort these groups, in this order, as soon as a rank is gone, or else in `close`. This ends the kernels that
        wait for the rank, and the calls that wait for the kernels. The list is emptied. The functions in `before` end
        what else waits for a rank; they are called first. Do not call this within a phase, since it starts a thread."""
        self._thread = threading.Thread(target=self._watch, args=(groups, collectives, before), name="hal-peer-watch",
                                        daemon=True)
        self._thread.start()

    def issue(self, launch: Callable[[], R]) -> R:
        """Run a function that issues operations of the groups. It never runs beside their abort, which frees memory
        that it uses."""
        with self._issuing:
            self.check()
            return launch()

    def check(self) -> None:
        """Raises WorkerError: a rank is gone."""
        if self.lost:
            raise WorkerError(f"{self._name} with the other ranks failed: one is gone", rank=-1, cause="lost")

    def close(self) -> None:
        """Leave, the driver last, and abort the groups. If a graph lives that has captured one of their operations, the
        abort goes on after LINGER seconds. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for connection in self._sockets:
            with contextlib.suppress(OSError):
                connection.send(_LEAVES)
        if self._thread is not None:
            if self._is_driver:
                self._alone.wait(LINGER)  # they may be receiving its last message, out of its memory
            self._wake.close()
            self._thread.join(LINGER)
        for connection in (*self._sockets, self._wake, self._woken):
            connection.close()

    def _watch(self, groups: list[Any], collectives: Collectives, before: Sequence[Callable[[], None]]) -> None:
        """The thread: until a rank is gone or this one leaves, then the groups are aborted."""
        self._until_lost_or_closing(groups, collectives)
        if self._issuing.acquire(timeout=_ISSUE):
            self._issuing.release()
        for end in before:
            with contextlib.suppress(RuntimeError):  # the device has failed
                end()
        while groups:
            with contextlib.suppress(RuntimeError):
                # This ends kernels at once, and then waits for graphs that have captured any.
                collectives.abort(groups.pop(0))

    def _until_lost_or_closing(self, groups: list[Any], collectives: Collectives) -> None:
        """Return when `close` wakes this thread, or with `lost` set: a connection ended without a word, a rank left
        while this one goes on, or a group reports an error."""
        poll, there = select.poll(), {c.fileno(): c for c in self._sockets}
        woken = self._woken.fileno()  # `close` does not wait for ever, and may have closed it when this thread looks
        for fd in (*there, woken):
            poll.register(fd, select.POLLIN)
        left_at: float | None = None  # when the last of those that left in order did so
        closing = False
        while not closing and not self.lost:
            for fd, _ in poll.poll(1000 * (_LOOK if left_at is None else _LEFT / 5)):
                if fd == woken:
                    closing = True
                    continue
                poll.unregister(fd)
                left_at = time.monotonic()
                if not _leaves(there.pop(fd)):
                    self.lost = True
            if left_at is not None and time.monotonic() > left_at + _LEFT and not self._closed:
                self.lost = True
            if any(map(collectives.failed, groups)):
                self.lost = True
            if self.lost or not there:
                self._alone.set()


def _admit(server: socket.socket, secret: bytes, count: int, admitted: list[socket.socket]) -> None:
    """Accept until `count` connections have begun with the secret. Others are closed: any process that reaches the port
    may connect, and may then be silent."""
    deadline = time.monotonic() + CONNECT.total_seconds()
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as asking:
        selector.register(server, selectors.EVENT_READ)
        while len(admitted) < count:
            if not (events := selector.select(deadline - time.monotonic())) or time.monotonic() > deadline:
                raise TimeoutError(f"{count - len(admitted)} of {count} ranks did not connect")
            for key, _ in events:
                if key.fileobj is server:
                    connection = asking.enter_context(server.accept()[0])
                    selector.register(connection, selectors.EVENT_READ, connection)
                    continue
                connection = key.data
                selector.unregister(connection)
                with contextlib.suppress(OSError):
                    if hmac.compare_digest(connection.recv(_SECRET), secret):
                        admitted.append(connection.dup())


def _leaves(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == _LEAVES
    except OSError:
        return False
