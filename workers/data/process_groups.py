"""The data plane over torch.distributed's process groups."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch._C._distributed_c10d import (
    AllgatherOptions,
    AllreduceOptions,
    AllToAllOptions,
    BroadcastOptions,
    ReduceScatterOptions,
)

from hal.config import Axis, Topology
from hal.contracts.communicator import AxisName, NativeSums
from hal.contracts.device import GLOO, Collectives, DeviceRuntime, PeerSums
from hal.contracts.fingerprint import STEP, Fingerprint
from hal.contracts.inputs import IntermediateTensors
from hal.guard import data_plane
from workers.data.axes import ByAxis, all_tensors, as_bytes, check_received, cut, row_bytes, rows
from workers.links.groups import lost
from workers.links.liveness import LINGER, PeerWatch

I = TypeVar("I", bound=IntermediateTensors)  # noqa: E741
R = TypeVar("R")
HOST = torch.device("cpu")


class TorchCommunicator:
    """A hal.contracts.communicator.Communicator.

    Args:
        groups: the process group of each axis.
        collectives: the collectives of the groups. If they are not `on_device`, tensors of a device go through the
            host.
        runtime: the runtime of the device.
        sums: for an axis a faster way to add small tensors up.
        checks: for an axis a gloo group of the same ranks, which compare fingerprints over it before each collective
            and, along "tp", at the end of a step. On the data plane's own group a check would meet another's
            collective.
        strict: stages compare theirs too. Gloo ends a process that is sent another size than it expects.
        peers: where operations run on the device, which is then told at once that a rank is gone. Closed with the
            rest.

    Raises (all methods):
        WorkerError: with rank -1, when another rank is gone.
        StateError: another rank is at another place of the step (see checks).
    """

    native_sums: NativeSums | None = None

    def __init__(self, topology: Topology, device: torch.device, groups: ByAxis[Any], collectives: Collectives = GLOO,
                 runtime: DeviceRuntime | None = None, *, sums: Mapping[str, PeerSums | None] | None = None,
                 checks: Mapping[str, Any] | None = None, strict: bool = False, peers: PeerWatch | None = None) -> None:
        self.topology, self.device, self.fingerprint = topology, device, Fingerprint()
        self._groups, self._runtime = groups, runtime or DeviceRuntime()
        self._pp: Any = groups["pp"]
        self._axes = {name: topology.axis(name) for name in groups}
        self._stages = self._axes["pp"]
        on_device = collectives.on_device
        self._carrier = device if on_device else HOST
        self._checks, self._strict, self._peers = checks or {}, strict, peers
        self._faster = {name: way for name, way in (sums or {}).items() if way is not None}
        self.capturable = self._on_device = on_device
        # On a device operations then run on the current stream, in order with all else there, captured or not; nothing
        # is waited for.
        self._sums, self._gathers, self._parts = AllreduceOptions(), AllgatherOptions(), ReduceScatterOptions()
        self._exchanges, self._source = AllToAllOptions(), BroadcastOptions()
        for options in (self._sums, self._gathers, self._parts, self._exchanges, self._source):
            options.asyncOp = False
        if peers is not None:
            try:
                peers.guard(groups.groups(), collectives, [way.abort for way in set(self._faster.values())])
                self._meet()
            except BaseException:
                self.close()
                raise

    def check(self) -> None:
        if self._peers is not None:
            self._peers.check()

    def end_step(self) -> None:
        self.check()
        self._compare("tp")

    def all_reduce(self, x: torch.Tensor, axis: AxisName = "tp") -> torch.Tensor:
        with data_plane("all_reduce"):
            group = self._groups[axis]
            if group is not None:
                self._begin("all_reduce", axis, x.nbytes)
                x = x.contiguous()
                faster = self._faster.get(axis)
                if faster is not None and faster.takes(x):
                    return self._issue(lambda: faster(x))
                carried = self._carried(x)
                self._all_reduce(group, carried)
                if carried is not x:
                    x.copy_(carried)
            return x

    def all_gather(self, x: torch.Tensor, axis: AxisName = "tp", dim: int = -1) -> torch.Tensor:
        with data_plane("all_gather"):
            group = self._groups[axis]
            if group is None:
                return x
            self._begin("all_gather", axis, x.nbytes)
            carried = x.reshape(-1) if self._on_device else self._carried(as_bytes(x))  # gloo lacks some dtypes
            size = self._axes[axis].size
            flat = carried.new_empty(size * len(carried))
            self._run("all_gather", lambda: [group._allgather_base(flat, carried, self._gathers)])
            return torch.cat(flat.view(x.dtype).view(size, *x.shape).unbind(), dim).to(x.device)

    def reduce_scatter(self, x: torch.Tensor, axis: AxisName = "tp", dim: int = -1) -> torch.Tensor:
        with data_plane("reduce_scatter"):
            group = self._groups[axis]
            if group is None:
                return x
            place = self._axes[axis]
            parts = self._carried(cut(x, dim, place.size))
            self._begin("reduce_scatter", axis, x.nbytes)
            if self._on_device:
                part = torch.empty_like(parts[0])
                self._run("reduce_scatter", lambda: [group._reduce_scatter_base(part, parts, self._parts)])
            else:  # gloo adds the whole up anyway
                parts = parts.clone() if parts.data_ptr() == x.data_ptr() else parts
                self._run("reduce_scatter", lambda: [group.allreduce([parts], self._sums)])
                part = parts[place.rank]
            return part.movedim(0, dim).to(x.device)

    def all_to_all(self, x: torch.Tensor, axis: AxisName = "tp", send_sizes: Sequence[int] | None = None,
                   recv_sizes: Sequence[int] | None = None) -> torch.Tensor:
        with data_plane("all_to_all"):
            group = self._groups[axis]
            if group is None:
                return x
            sends, receives = rows(x, self._axes[axis].size, send_sizes, recv_sizes)
            each = row_bytes(x)
            self._begin("all_to_all", axis, each)
            sent, received = [n * each for n in sends], [n * each for n in receives]
            self._compare_sizes(self._axes[axis], sent, received)
            carried = self._carried(as_bytes(x))
            came = carried.new_empty(sum(received))
            self._run("all_to_all",
                      lambda: [group.alltoall_base(came, carried, received, sent, self._exchanges)])
            return came.view(x.dtype).view(sum(receives), *x.shape[1:]).to(x.device)

    def broadcast(self, x: torch.Tensor, axis: AxisName = "tp", source: int = 0) -> torch.Tensor:
        with data_plane("broadcast"):
            group = self._groups[axis]
            if group is not None:
                self._begin("broadcast", axis, x.nbytes)
                x = x.contiguous()
                carried = self._carried(as_bytes(x))
                self._source.rootRank = source
                self._run("broadcast", lambda: [group.broadcast([carried], self._source)])
                if carried.device != x.device:
                    as_bytes(x).copy_(carried)
            return x

    def send(self, tensors: IntermediateTensors) -> None:
        with data_plane("send"):
            to = self._stages.rank + 1
            sent = [*([self._seal()] if self._strict else []), *all_tensors(tensors)]
            # On a device the current stream waits until they have gone: a replay that writes them again comes after.
            self._run("send", lambda: [self._pp.send([t.to(self._carrier)], to, 0) for t in sent])

    def recv(self, kind: type[I], dims: dict[str, int]) -> I:
        with data_plane("recv"):
            source = self._stages.rank - 1
            if self._strict:
                theirs = torch.empty_like(self._seal(), device=self._carrier)
                self._run("recv", lambda: [self._pp.recv([theirs], source, 0)])
                arrived = theirs.cpu().numpy()
                self.check()
                self.fingerprint.compare(arrived, f"rank {self._stages.ranks[source]}", STEP)
            found: dict[str, torch.Tensor] = {}
            for field in kind.schema.fields:
                assert field.array is not None  # `declare` takes arrays only
                shape = tuple(d.size(dims) for d in field.array.dims)
                found[field.name] = torch.empty(shape, dtype=getattr(torch, field.array.dtype), device=self._carrier)
            self._run("recv", lambda: [self._pp.recv([t], source, 0) for t in found.values()])
            return kind(**{name: tensor.to(self.device) for name, tensor in found.items()})

    def _seal(self) -> torch.Tensor:
        return torch.frombuffer(bytearray(self.fingerprint.pack()), dtype=torch.uint8)

    def close(self) -> None:
        peers, self._peers = self._peers, None
        if peers is not None:
            with contextlib.suppress(RuntimeError):  # the device has failed
                issued, end = self._runtime.record(self.device), time.monotonic() + LINGER
                while not (issued.query() or peers.lost or time.monotonic() > end):
                    time.sleep(1e-3)  # others need this rank's part, and their kernels may still use its memory
        self._groups.clear()
        self._pp, self._checks = None, {}
        if peers is not None:
            peers.close()
        for way in set(self._faster.values()):
            way.close()
        self._faster.clear()

    def _meet(self) -> None:
        """Groups of a device connect at the first operation, and wait there for their ranks: here, where all come, from
        the first stage to the last, and not in a step or while a graph is captured. Collectives along "pp", which no
        step needs, connect when they are first called."""
        tensor, stages = torch.zeros(1, device=self.device), self._stages
        self.all_reduce(tensor)
        if self._groups["ep"] is not self._groups["tp"]:
            self.all_reduce(tensor, "ep")
        for way, group in {way: self._groups[name] for name, way in self._faster.items()}.items():
            way.settle(partial(self._all_reduce, group))
        if stages.rank > 0:
            self._run("connecting", lambda: [self._pp.recv([tensor], stages.rank - 1, 0)])
        if stages.rank < stages.size - 1:
            self._run("connecting", lambda: [self._pp.send([tensor], stages.rank + 1, 0)])

    def _all_reduce(self, group: Any, x: torch.Tensor) -> None:
        self._run("all_reduce", lambda: [group.allreduce([x], self._sums)])

    def _carried(self, x: torch.Tensor) -> torch.Tensor:
        """x where operations read and write it."""
        return x if self._on_device else x.to(HOST)

    def _begin(self, operation: str, axis: str, nbytes: int) -> None:
        self.fingerprint.count(operation, axis, nbytes)
        self._compare(axis)

    def _compare(self, axis: str) -> None:
        """If ranks check, find out whether all are at the same collective, or at the end of the step. The collectives
        of a graph are not checked, and no rank counts them."""
        checks = self._checking(axis)
        if checks is not None:
            place = self._axes[axis]
            for rank, theirs in zip(place.ranks, self._exchange(checks, place, self._seal()), strict=True):
                self.fingerprint.compare(theirs.numpy(), f"rank {rank}")

    def _compare_sizes(self, place: Axis, sent: list[int], received: list[int]) -> None:
        """Likewise, whether the others send what this rank receives."""
        checks = self._checking(place.name)
        if checks is not None:
            theirs = self._exchange(checks, place, torch.tensor(sent)).tolist()
            for rank, sizes, expected in zip(place.ranks, theirs, received, strict=True):
                check_received(rank, sizes[place.rank], expected)

    def _checking(self, axis: str) -> Any:
        """The group over which ranks compare now; None where they do not."""
        checks = self._checks.get(axis)
        return None if checks is None or (self._on_device and self._runtime.capturing(self.device)) else checks

    def _exchange(self, checks: Any, place: Axis, own: torch.Tensor) -> torch.Tensor:
        """[ranks of the axis, numbers in `own`]."""
        found = own.new_empty(place.size * len(own))
        self._run("check", lambda: [checks._allgather_base(found, own)])
        return found.view(place.size, -1)

    def _run(self, what: str, launch: Callable[[], list[Any]]) -> None:
        try:
            for work in self._issue(launch):
                if work is not None:
                    work.wait()
        except RuntimeError as error:
            raise lost(what, error) from error

    def _issue(self, launch: Callable[[], R]) -> R:
        return launch() if self._peers is None else self._peers.issue(launch)
