"""Whether other ranks live, where nothing else would tell: a kernel of NCCL waits for ever for a rank that is gone."""

from __future__ import annotations

import select
import socket
import time

from hal.config import Topology
from hal.errors import WorkerError
from workers.groups import CONNECT, Store, local_address, lost


class Lifelines:
    """A connection between the driver and each other rank, over which nothing is sent. The system closes it when one of
    them ends, however that happens. All ranks make it at the same time.

    Raises:
        WorkerError: not all ranks came.
    """

    def __init__(self, topology: Topology, store: Store) -> None:
        self._poll = select.poll()
        self._sockets: list[socket.socket] = []
        try:
            if topology.is_driver:
                host = local_address(store)
                with socket.create_server((host, 0), backlog=topology.world_size) as server:
                    server.settimeout(CONNECT.total_seconds())
                    store.set("lifelines", f"{host}:{server.getsockname()[1]}")
                    for _ in range(topology.world_size - 1):
                        self._watch(server.accept()[0])
            else:
                host, _, port = store.get("lifelines").decode().rpartition(":")
                self._watch(socket.create_connection((host, int(port)), CONNECT.total_seconds()))
        except (OSError, RuntimeError) as error:
            self.close()
            raise lost("connecting", error) from error

    def _watch(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a host that is gone closes nothing
        self._sockets.append(connection)
        self._poll.register(connection, select.POLLIN)

    def check(self) -> None:
        """Raises WorkerError: a rank at the other end of one is gone."""
        if self._poll.poll(0):
            raise WorkerError("the control plane with the other ranks failed: one is gone", rank=-1, cause="lost")

    def outlast(self, seconds: float) -> None:
        """Wait until the others have closed theirs, or for so long."""
        end, left = time.monotonic() + seconds, len(self._sockets)
        while left and (rest := end - time.monotonic()) > 0:
            for connection, _ in self._poll.poll(1000 * rest):
                self._poll.unregister(connection)
                left -= 1

    def close(self) -> None:
        for connection in self._sockets:
            connection.close()
        self._sockets, self._poll = [], select.poll()
