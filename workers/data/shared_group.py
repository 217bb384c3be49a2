"""Collectives of the ranks of one axis, through memory that they share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from hal.config import Axis
from hal.contracts.fingerprint import FIELDS, SEAL, Fingerprint
from workers.data.axes import as_bytes, check_received
from workers.links.memory import START, Segment

_PIECE = 1 << 20  # bytes that a rank shows the others at a time
_TWO_STEPS = 1 << 18  # tensors of so many bytes are added by all ranks, a share each
_LINE = 64
BYTES_PER_RANK = 2 * (_PIECE + _LINE)  # of the segment


class SharedGroup:
    """The ranks of one axis. Every sum is computed in the order of their coordinates, so its bits are the same on each.

    A rank has two places for a tensor that it shows the others, and uses them in turn. When all ranks have shown their
    next tensor, no rank still reads the last one.

    Args:
        segment: of which every rank of the mesh takes the same parts, those of all groups of this axis.
        world_size: ranks of the mesh.
        fingerprint: compared in every collective, field by field of `fields`.
        waiting: called now and then with the rank that this one waits for, and raises if that one never comes.

    Attributes:
        count: collectives of the group, from START. in_one_step: bytes of the largest tensor whose sum takes one
            exchange. addresses: of all ranks' places in both turns, of their lines in both, and of their counters.
    """

    def __init__(self, segment: Segment, axis: Axis, world_size: int, fingerprint: Fingerprint,
                 fields: tuple[str, ...] = FIELDS, waiting: Callable[[int], None] | None = None) -> None:
        self.rank, self.size, self._ranks = axis.rank, axis.size, axis.ranks
        self.segment, self.count = segment, START
        self.fingerprint, self._fields, self._waiting = fingerprint, fields, waiting
        places = [[torch.from_numpy(segment.take(_PIECE)) for _ in range(2)] for _ in range(world_size)]
        counters = [segment.counter() for _ in range(world_size)]
        self._places = {torch.uint8: [[places[rank][turn] for rank in axis.ranks] for turn in range(2)]}
        # Each rank's fingerprint, in two places like its tensors.
        lines = [[segment.take(_LINE) for _ in range(2)] for _ in range(world_size)]
        own = axis.ranks[axis.rank]
        self._counter, self._line = counters[own], [line.data for line in lines[own]]
        self._peers = [(counters[rank], rank, [line.data for line in lines[rank]])
                       for rank in axis.ranks if rank != own]
        self.in_one_step = _PIECE if axis.size == 2 else _TWO_STEPS - 1
        self.addresses = ([place.data_ptr() for turn in self._places[torch.uint8] for place in turn],
                          [lines[rank][turn].ctypes.data for turn in range(2) for rank in axis.ranks],
                          [segment.address(counters[rank]) for rank in axis.ranks])

    def all_reduce(self, x: torch.Tensor) -> None:
        """x is contiguous, and becomes the sum."""
        for piece in _pieces(x):
            if piece.nbytes > self.in_one_step:
                self._reduce_shared(piece)
            else:
                _add(self._show(piece), piece)

    def finish(self, x: torch.Tensor) -> None:
        """As all_reduce, of a tensor that fits into one exchange and that sums.c has shown."""
        flat = x.view(-1)
        self._await(self.fingerprint.pack())
        _add(self._next(flat, -1), flat)

    def all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """x is contiguous."""
        pieces = list(_pieces(x))
        if len(pieces) == 1:
            return torch.cat([shown.view(x.shape) for shown in self._show(pieces[0])], dim)
        gathered, at = x.new_empty(self.size, x.numel()), 0
        for piece in pieces:
            for row, shown in zip(gathered, self._show(piece), strict=True):
                row[at:at + len(piece)] = shown
            at += len(piece)
        return torch.cat(gathered.view(self.size, *x.shape).unbind(), dim)

    def reduce_scatter(self, parts: torch.Tensor) -> torch.Tensor:
        """[size, ...], contiguous -> [...]: the sum of what all ranks have at this rank's index."""
        result, at = torch.empty_like(parts[0]), 0
        flat = result.view(-1)
        first = self.rank * len(flat)
        for piece in _pieces(parts):
            begin, end = max(first, at), min(first + len(flat), at + len(piece))
            shown = self._show(piece)
            if begin < end:
                _add([s[begin - at:end - at] for s in shown], flat[begin - first:end - first])
            at += len(piece)
        return result

    def broadcast(self, x: torch.Tensor, source: int) -> None:
        """x is contiguous, and becomes that of `source`."""
        for piece in _pieces(as_bytes(x)):
            places = self._next(piece)
            if self.rank == source:
                places[source].copy_(piece)
            self._publish()
            if self.rank != source:
                piece.copy_(places[source])

    def all_to_all(self, sent: torch.Tensor, sends: Sequence[int], receives: Sequence[int]) -> torch.Tensor:
        """uint8, of which `sends` bytes go to each rank -> the `receives` bytes that come from each.

        A place begins with the numbers of bytes for each rank, and has a lane for each rank behind them. So one
        exchange is enough where the lanes hold everything, and ranks know by it how many more are needed."""
        result = sent.new_empty(sum(receives))
        outgoing, incoming = (torch.split(*whole) for whole in ((sent, list(sends)), (result, list(receives))))
        head = -(-8 * self.size // _LINE) * _LINE
        lane, at, most = (_PIECE - head) // self.size // _LINE * _LINE, 0, 1
        while at < most:
            places = self._whole()
            own = places[self.rank]
            if at == 0:
                own[:8 * self.size].view(torch.int64).copy_(torch.tensor(sends))
            for peer, data in enumerate(outgoing):
                part = data[at:at + lane]
                own[head + peer * lane:][:len(part)] = part
            self._publish()
            if at == 0:
                table = [place[:8 * self.size].view(torch.int64).tolist() for place in places]
                for peer, found in enumerate(table):
                    check_received(self._ranks[peer], found[self.rank], receives[peer])
                most = max(map(max, table))
            for peer, data in enumerate(incoming):
                part = data[at:at + lane]
                part.copy_(places[peer][head + self.rank * lane:][:len(part)])
            at += lane
        return result

    def _show(self, piece: torch.Tensor) -> list[torch.Tensor]:
        """Tensors like the piece, one of each rank. They are valid until the next call but one."""
        places = self._next(piece)
        places[self.rank].copy_(piece)
        self._publish()
        return places

    def _reduce_shared(self, piece: torch.Tensor) -> None:
        """The sum of a piece, of which each rank adds up a share and shows it to the others."""
        shown, sums = self._show(piece), self._next(piece)
        share = -(-len(piece) // self.size)
        mine = slice(share * self.rank, share * (self.rank + 1))
        _add([s[mine] for s in shown], sums[self.rank][mine])
        self._publish()
        for rank, shared in enumerate(sums):
            piece[share * rank:share * (rank + 1)] = shared[share * rank:share * (rank + 1)]

    def _next(self, piece: torch.Tensor, further: int = 0) -> list[torch.Tensor]:
        """A place for each rank of the piece's size and dtype. This rank may write its own place. `further`: -1 for the
        places of the collective before."""
        places = self._places.get(piece.dtype)
        if places is None:
            places = [[p.view(piece.dtype) for p in turn] for turn in self._places[torch.uint8]]
            self._places[piece.dtype] = places
        return [place[:len(piece)] for place in places[self.count + further & 1]]

    def _whole(self) -> list[torch.Tensor]:
        return self._places[torch.uint8][self.count & 1]

    def _publish(self) -> None:
        """Show the other ranks what this rank wrote. Returns when all ranks have done so in the same collective."""
        turn, own = self.count & 1, self.fingerprint.pack()
        self._line[turn][:SEAL] = own
        self.count += 1
        self.segment.post(self._counter, self.count)
        self._await(own)

    def _await(self, own: bytes) -> None:
        """Returns when all ranks have begun this rank's last collective, of the fingerprint `own`."""
        turn = self.count - 1 & 1
        for counter, rank, lines in self._peers:
            self.segment.wait(counter, self.count, rank, waiting=self._waiting)
            theirs = lines[turn][:SEAL]
            if theirs != own:
                self.fingerprint.compare(theirs, f"rank {rank}", self._fields)


def _pieces(x: torch.Tensor) -> Iterator[torch.Tensor]:
    flat, step = x.view(-1), _PIECE // x.itemsize
    return (flat[at:at + step] for at in range(0, len(flat), step))


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
