"""The data plane of ranks on one host's CPU: collectives through shared memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import numpy as np
import torch

from hal.config import Topology
from hal.contracts.fingerprint import SEAL, STEP, Fingerprint
from hal.contracts.inputs import IntermediateTensors
from hal.errors import InputError, StateError, WireError
from hal.guard import data_plane
from workers.links.groups import Store
from workers.links.memory import START, Segment
from workers.links.ring import Ring

_PIECE = 1 << 20  # bytes that a rank shows the others at a time
_TWO_STEPS = 1 << 18  # tensors of so many bytes are added by all ranks, a share each
_STAGE = 16, 1 << 20  # slots, and bytes of each, between two pipeline stages
I = TypeVar("I", bound=IntermediateTensors)  # noqa: E741


class ShmCommunicator:
    """A Communicator. Every sum is computed in the order of ranks, so its bits are the same on each rank.

    A rank has two places for a tensor that it shows the others, and uses them in turn. When all ranks have shown their
    next tensor, no rank still reads the last one.

    Raises:
        BackendError: the ranks cannot share memory; raised on all of them.
        WorkerError (all methods): with rank -1, when another rank is gone.
        StateError (all methods): another rank is in another step, has another input, is in another collective, or has
            ended the step without this collective.
    """

    capturable = False

    def __init__(self, topology: Topology, device: torch.device, store: Store) -> None:
        self.topology, self.device, self.fingerprint = topology, device, Fingerprint()
        tp, world = topology.tp, topology.world_size
        links = [Topology(tp, topology.pp, rank) for rank in range(world - tp)]
        size = world * (2 * _PIECE + 3 * 64) + len(links) * _STAGE[0] * _STAGE[1]
        segment = Segment("data", topology.rank, world, store, size)
        self._segment, self._count = segment, START
        places = [[torch.from_numpy(segment.take(_PIECE)) for _ in range(2)] for _ in range(world)]
        counters = [segment.counter() for _ in range(world)]
        stage = range(topology.rank - topology.tp_rank, topology.rank - topology.tp_rank + tp)
        self._places = {torch.uint8: [[places[rank][turn] for rank in stage] for turn in range(2)]}
        self._counter = counters[topology.rank]
        # Each rank's fingerprint, in two places like its tensors, and its fingerprint when its last step ended.
        self._lines = [[segment.take(64).data for _ in range(2)] for _ in range(world)]
        self._ended = [segment.take(64).data.cast("q") for _ in range(world)]
        self._peers = [(counters[rank], rank) for rank in stage if rank != topology.rank]
        rings = {link.rank: Ring(segment, link.rank, [link.rank + tp], *_STAGE) for link in links}
        self._to, self._source = rings.get(topology.rank), rings.get(topology.rank - tp)

    def check(self) -> None:
        pass  # a wait for a rank that is gone raises, so no result can be wrong

    def end_step(self) -> None:
        if self.topology.tp > 1:
            ended, own = self._ended[self.topology.rank], self.fingerprint
            ended[1] = own.collectives
            self._segment.order()
            ended[0] = own.step

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        with data_plane("all_reduce"):
            if self.topology.tp > 1:
                self.fingerprint.count("all_reduce", x.nbytes)
                x = x.contiguous()
                for piece in self._pieces(x):
                    if self.topology.tp > 2 and piece.nbytes >= _TWO_STEPS:
                        self._reduce_shared(piece)
                    else:
                        _add(self._show(piece), piece)
            return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        with data_plane("all_gather"):
            tp = self.topology.tp
            if tp == 1:
                return x
            self.fingerprint.count("all_gather", x.nbytes)
            pieces = list(self._pieces(x.contiguous()))
            if len(pieces) == 1:
                return torch.cat([shown.view(x.shape) for shown in self._show(pieces[0])], -1)
            gathered, at = x.new_empty(tp, x.numel()), 0
            for piece in pieces:
                for row, shown in zip(gathered, self._show(piece), strict=True):
                    row[at:at + len(piece)] = shown
                at += len(piece)
            return torch.cat(gathered.view(tp, *x.shape).unbind(), -1)

    def send(self, tensors: IntermediateTensors) -> None:
        with data_plane("send"):
            assert self._to is not None  # the worker sends only if there is a next stage
            seal = np.frombuffer(self.fingerprint.pack(), np.uint8)
            for field in type(tensors).schema.fields:
                tensor = tensors[field.name]
                if tensor is None:
                    raise InputError(f"{type(tensors).__name__}.{field.name} is missing", fields=(field.name,),
                                     expected="all tensors, since the next stage waits for each")
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
        self._places, self._lines, self._ended, self._to, self._source = {}, [], [], None, None

    def _pieces(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        flat, step = x.view(-1), _PIECE // x.itemsize
        return (flat[at:at + step] for at in range(0, len(flat), step))

    def _show(self, piece: torch.Tensor) -> list[torch.Tensor]:
        """[tp] tensors like the piece, one of each rank. They are valid until the next call but one."""
        places = self._next(piece)
        places[self.topology.tp_rank].copy_(piece)
        self._publish()
        return places

    def _reduce_shared(self, piece: torch.Tensor) -> None:
        """The sum of a piece, of which each rank adds up a share and shows it to the others."""
        shown, sums = self._show(piece), self._next(piece)
        share = -(-len(piece) // self.topology.tp)
        mine = slice(share * self.topology.tp_rank, share * (self.topology.tp_rank + 1))
        _add([s[mine] for s in shown], sums[self.topology.tp_rank][mine])
        self._publish()
        for rank, shared in enumerate(sums):
            piece[share * rank:share * (rank + 1)] = shared[share * rank:share * (rank + 1)]

    def _next(self, piece: torch.Tensor) -> list[torch.Tensor]:
        """[tp] places of the piece's size and dtype. This rank may write its own place."""
        places = self._places.get(piece.dtype)
        if places is None:
            places = [[p.view(piece.dtype) for p in turn] for turn in self._places[torch.uint8]]
            self._places[piece.dtype] = places
        return [place[:len(piece)] for place in places[self._count & 1]]

    def _publish(self) -> None:
        """Show the other ranks what this rank wrote. Returns when all ranks have done so in the same collective."""
        turn, own = self._count & 1, self.fingerprint.pack()
        self._lines[self.topology.rank][turn][:SEAL] = own
        self._count += 1
        self._segment.post(self._counter, self._count)
        for counter, rank in self._peers:
            self._segment.wait(counter, self._count, rank, waiting=self._still_in_step)
            theirs = self._lines[rank][turn][:SEAL]
            if theirs != own:
                self.fingerprint.compare(theirs, f"rank {rank}")

    def _still_in_step(self, rank: int) -> None:
        """Check a rank that this one waits for. Raises StateError: it has ended this step with fewer collectives."""
        ended, own = self._ended[rank], self.fingerprint
        if own.step and ended[0] == own.step:
            self._segment.order()
            if ended[1] < own.collectives:
                raise StateError(f"rank {rank} ended step {own.step} while rank {self.topology.rank} is in one more "
                                 "collective", got=f"{ended[1]} collectives", expected=f"{own.collectives}",
                                 hint="which collectives a runner calls must not depend on the rank")


def _add(shown: list[torch.Tensor], into: torch.Tensor) -> None:
    if len(shown) > 2 and into.dtype in (torch.bfloat16, torch.float16):  # rounded once
        total = shown[0].float()
        for tensor in shown[1:]:
            total += tensor
        into.copy_(total)
    else:
        torch.add(shown[0], shown[1], out=into)
        for tensor in shown[2:]:
            into += tensor
