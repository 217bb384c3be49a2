"""The control plane of one host: rings of slots in shared memory."""

from __future__ import annotations

from collections.abc import Sequence

from hal.config import Topology
from hal.contracts.control_plane import ControlPlane
from hal.guard import check
from hal.schema.packed import Buffer
from workers.control.message import END_LIMIT, IN_FLIGHT
from workers.links.groups import Store
from workers.links.memory import LIMIT, Segment
from workers.links.ring import Ring

_STEP = 1 << 20  # bytes of a slot; only the pages that messages fill take up memory
_OUTPUTS = IN_FLIGHT, 1 << 18


class ShmPlane(ControlPlane):
    """The control plane of ranks that share memory. Raises BackendError on all ranks if one of them cannot."""

    def __init__(self, topology: Topology, store: Store, *_: object) -> None:
        # Room for the steps in flight, each of which may come as two messages; not more, since slots that are used
        # again soon are still in the caches.
        steps = max(topology.pp + 2, 2 * topology.pp), _STEP
        size = sum(slots * slot_bytes for slots, slot_bytes in (steps, _OUTPUTS))
        self._segment = Segment("control", topology.rank, topology.world_size, store, size)
        self._steps = Ring(self._segment, 0, range(1, topology.world_size), *steps)
        self._outputs = Ring(self._segment, topology.sampling_rank, [0], *_OUTPUTS)

    def broadcast(self, parts: Sequence[Buffer]) -> None:
        check("ShmPlane.broadcast")
        self._steps.send(parts, LIMIT if parts else END_LIMIT)

    def receive(self) -> list[Buffer]:
        check("ShmPlane.receive")
        return self._steps.receive(limit=None)  # no limit: an engine may be idle for days

    def send_output(self, part: Buffer) -> None:
        check("ShmPlane.send_output")
        self._outputs.send([part])

    def receive_output(self) -> Buffer:
        check("ShmPlane.receive_output")
        return self._outputs.receive()[0]

    def close(self) -> None:
        self._segment.close()
        self._steps.close()
        self._outputs.close()
