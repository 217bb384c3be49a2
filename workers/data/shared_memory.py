"""The data plane of ranks on one host's CPU: collectives through shared memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch

from hal.config import AXES, Axis, Topology
from hal.contracts.communicator import AxisName, NativeSums
from hal.contracts.fingerprint import FIELDS, STEP, Fingerprint
from hal.contracts.inputs import IntermediateTensors
from hal.errors import StateError, WireError
from hal.guard import data_plane
from workers.data import native_sums
from workers.data.axes import ByAxis, all_tensors, as_bytes, cut, row_bytes, rows
from workers.data.shared_group import BYTES_PER_RANK, SharedGroup
from workers.links.groups import Store
from workers.links.memory import Segment
from workers.links.ring import Ring

_STAGE = 16, 1 << 20  # slots, and bytes of each, between two pipeline stages
# Stages of different numbers of layers differ in how many collectives they have begun.
_BETWEEN_STAGES = tuple(field for field in FIELDS if field != "number of collectives")
I = TypeVar("I", bound=IntermediateTensors)  # noqa: E741


class ShmCommunicator:
    """A Communicator. Every sum is computed in the order of ranks, so its bits are the same on each rank.

    Raises:
        BackendError: the ranks cannot share memory; raised on all of them.
        WorkerError (all methods): with rank -1, when another rank is gone.
        StateError (all methods): another rank is in another step, has another input, is in another collective, or has
            ended the step without this collective.
    """

    capturable = False

    def __init__(self, topology: Topology, device: torch.device, store: Store) -> None:
        self.topology, self.device, self.fingerprint = topology, device, Fingerprint()
        world = topology.world_size
        links = {place.rank: place.axis("pp").ranks[place.pp_rank + 1] for place in topology.every_rank()
                 if not place.is_last_stage}
        size = world * (len(AXES) * BYTES_PER_RANK + 64) + len(links) * _STAGE[0] * _STAGE[1]
        self._segment = segment = Segment("data", topology.rank, world, store, size)
        # Each rank's step and number of collectives when its last step ended.
        self._ended = [segment.take(64).data.cast("q") for _ in range(world)]
        self._groups: ByAxis[SharedGroup] = ByAxis(topology, self._group)
        library = native_sums.load() if topology.tp > 1 else None
        self.native_sums: NativeSums | None = library and native_sums.SharedSums(library, self._groups)
        rings = {rank: Ring(segment, rank, [to], *_STAGE) for rank, to in links.items()}
        self._to = rings.get(topology.rank)
        self._source = None if topology.is_first_stage else rings[topology.axis("pp").ranks[topology.pp_rank - 1]]

    def _group(self, axis: Axis) -> SharedGroup:
        between = axis.name == "pp"
        return SharedGroup(self._segment, axis, self.topology.world_size, self.fingerprint,
                           _BETWEEN_STAGES if between else FIELDS, None if between else self._still_in_step)

    def check(self) -> None:
        pass  # a wait for a rank that is gone raises, so no result can be wrong

    def end_step(self) -> None:
        if self.topology.tp > 1:
            ended, own = self._ended[self.topology.rank], self.fingerprint
            ended[1] = own.collectives
            self._segment.order()
            ended[0] = own.step

    def all_reduce(self, x: torch.Tensor, axis: AxisName = "tp") -> torch.Tensor:
        with data_plane("all_reduce"):
            group = self._groups[axis]
            if group is not None:
                self.fingerprint.count("all_reduce", axis, x.nbytes)
                x = x.contiguous()
                group.all_reduce(x)
            return x

    def all_gather(self, x: torch.Tensor, axis: AxisName = "tp", dim: int = -1) -> torch.Tensor:
        with data_plane("all_gather"):
            group = self._groups[axis]
            if group is None:
                return x
            self.fingerprint.count("all_gather", axis, x.nbytes)
            return group.all_gather(x.contiguous(), dim)

    def reduce_scatter(self, x: torch.Tensor, axis: AxisName = "tp", dim: int = -1) -> torch.Tensor:
        with data_plane("reduce_scatter"):
            group = self._groups[axis]
            if group is None:
                return x
            parts = cut(x, dim, group.size)
            self.fingerprint.count("reduce_scatter", axis, x.nbytes)
            return group.reduce_scatter(parts).movedim(0, dim)

    def all_to_all(self, x: torch.Tensor, axis: AxisName = "tp", send_sizes: Sequence[int] | None = None,
                   recv_sizes: Sequence[int] | None = None) -> torch.Tensor:
        with data_plane("all_to_all"):
            group = self._groups[axis]
            if group is None:
                return x
            sends, receives = rows(x, group.size, send_sizes, recv_sizes)
            each = row_bytes(x)
            self.fingerprint.count("all_to_all", axis, each)
            came = group.all_to_all(as_bytes(x), [n * each for n in sends],
                                    [n * each for n in receives])
            return came.view(x.dtype).view(sum(receives), *x.shape[1:])

    def broadcast(self, x: torch.Tensor, axis: AxisName = "tp", source: int = 0) -> torch.Tensor:
        with data_plane("broadcast"):
            group = self._groups[axis]
            if group is not None:
                self.fingerprint.count("broadcast", axis, x.nbytes)
                x = x.contiguous()
                group.broadcast(x, source)
            return x

    def send(self, tensors: IntermediateTensors) -> None:
        with data_plane("send"):
            assert self._to is not None  # the worker sends only if there is a next stage
            seal = np.frombuffer(self.fingerprint.pack(), np.uint8)
            for tensor in all_tensors(tensors):
                self._to.send([tensor.reshape(-1).view(torch.uint8).numpy(), seal])

    def recv(self, kind: type[I], dims: dict[str, int]) -> I:
        with data_plane("recv"):
            assert self._source is not None
            found: dict[str, torch.Tensor] = {}
            for field in kind.schema.fields:
                assert field.array is not None  # `declare` takes arrays only
                shape, dtype = [d.size(dims) for d in field.array.dims], getattr(torch, field.array.dtype)
                data, seal = self._source.receive(own=True)
                self.fingerprint.compare(seal, f"rank {self._source.writer}", STEP)
                part = torch.from_numpy(data)
                wanted = dtype.itemsize * torch.Size(shape).numel()
                if len(part) != wanted:
                    raise WireError(f"{kind.__name__}.{field.name} arrived in another size", got=f"{len(part)} bytes",
                                    expected=f"{wanted} bytes: {field.array.dtype} {shape}")
                found[field.name] = part.view(dtype).view(shape)
            return kind(**found)

    def close(self) -> None:
        self._segment.close()
        self._groups.clear()
        self._ended, self._to, self._source = [], None, None

    def _still_in_step(self, rank: int) -> None:
        """Check a rank that this one waits for. Raises StateError: it has ended this step with fewer collectives."""
        ended, own = self._ended[rank], self.fingerprint
        if own.step and ended[0] == own.step:
            self._segment.order()
            if ended[1] < own.collectives:
                raise StateError(f"rank {rank} ended step {own.step} while rank {self.topology.rank} is in one more "
                                 "collective", got=f"{ended[1]} collectives", expected=f"{own.collectives}",
                                 hint="which collectives a runner calls must not depend on the rank")
