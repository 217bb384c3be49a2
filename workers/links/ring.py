"""A ring of slots in shared memory. One rank writes a message once, and the others read it in place."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

from hal.errors import WireError
from hal.schema.layout import align, aligned_bytes
from hal.schema.packed import Buffer
from workers.links.memory import LIMIT, START, Segment

_MAGIC = b"HALr"
_MAX_PARTS = 6
_SLOT = struct.Struct(f"<4sIIHH{_MAX_PARTS}Q")  # magic, crc32 of the rest, slot's count, piece, parts, bytes of each
_NONE = (0,) * _MAX_PARTS
_CRC = struct.Struct("<I")


class Ring:
    """Messages from one rank to others, each of which takes all of them.

    A message's parts, each at a multiple of 64 bytes, are cut into as many slots as they need; the common case is one,
    which the readers see without copying it.
    """

    def __init__(self, segment: Segment, writer: int, readers: Sequence[int], slots: int, slot_bytes: int) -> None:
        self.segment, self.writer = segment, writer
        taken = [segment.take(slot_bytes) for _ in range(slots)]
        self._slots: list[tuple[memoryview, Buffer]] = [(slot.data[:_SLOT.size], slot[_SLOT.size:]) for slot in taken]
        self._room = slot_bytes - _SLOT.size
        self._parts: list[tuple[list[int], list[Buffer]]] = [([], [])] * slots  # for each slot, the views last made
        self._head = segment.counter()
        self._done = {reader: segment.counter() for reader in readers}
        self._count = START  # of slots that this rank wrote, or took
        self._held = False  # the last of them is still being read

    def send(self, parts: Sequence[Buffer], limit: float = LIMIT) -> None:
        """Returns when the parts may be changed. Raises WorkerError, as Segment.wait."""
        if len(parts) > _MAX_PARTS:
            raise WireError("a message has too many parts", got=len(parts), expected=f"at most {_MAX_PARTS}")
        self.segment.call(self._head)
        sizes = [part.size for part in parts]
        piece = at = 0
        slot = self._begin(piece, sizes, limit)
        for part in parts:
            sent = 0
            while sent < part.size:
                if at == self._room:
                    self._publish()
                    piece, at = piece + 1, 0
                    slot = self._begin(piece, sizes, limit)
                taken = min(part.size - sent, self._room - at)
                slot[at:at + taken] = part[sent:sent + taken]
                sent, at = sent + taken, at + taken
            at = align(at)
        self._publish()

    def receive(self, own: bool = False, limit: float | None = LIMIT) -> list[Buffer]:
        """The next message's parts: views that are valid until the next call, or, if `own`, for ever.

        Raises:
            WireError: the slot does not hold a message, or holds another one.
            WorkerError: as Segment.wait.
        """
        if self._held:
            self._release()
        data, sizes = self._take(0, limit)
        slot = self._count % len(self._slots)
        if not own and self._parts[slot][0] == sizes:
            self._held = True
            return self._parts[slot][1]
        total = sum(map(align, sizes))
        whole = total <= self._room and not own
        if not whole:
            message, at, piece = aligned_bytes(total), 0, 0
            while True:
                taken = min(self._room, total - at)
                message[at:at + taken] = data[:taken]
                at += taken
                self._release()
                if at == total:
                    break
                piece += 1
                data, _ = self._take(piece, limit)
            data = message
        at, parts = 0, []
        for size in sizes:
            parts.append(data[at:at + size])
            at += align(size)
        if whole:
            self._held, self._parts[slot] = True, (sizes, parts)
        return parts

    def close(self) -> None:
        self._slots, self._parts = [], []

    def _begin(self, piece: int, sizes: list[int], limit: float) -> Buffer:
        """The next slot's data, free and with its head written."""
        for reader, done in self._done.items():
            self.segment.wait(done, self._count + 1 - len(self._slots), reader, limit)
        head, data = self._slots[self._count % len(self._slots)]
        _SLOT.pack_into(head, 0, _MAGIC, 0, self._count & 0xFFFFFFFF, piece, len(sizes), *sizes,
                        *_NONE[len(sizes):])
        _CRC.pack_into(head, 4, zlib.crc32(head[8:]))
        return data

    def _publish(self) -> None:
        self._count += 1
        self.segment.post(self._head, self._count)

    def _take(self, piece: int, limit: float | None) -> tuple[Buffer, list[int]]:
        """The next slot's data, and the sizes of the message's parts."""
        self.segment.wait(self._head, self._count + 1, self.writer, limit)
        head, data = self._slots[self._count % len(self._slots)]
        magic, crc, count, of, parts, *sizes = _SLOT.unpack(head)
        expected = _MAGIC, self._count & 0xFFFFFFFF, piece
        if (magic, count, of) != expected or crc != zlib.crc32(head[8:]):
            raise WireError("what arrived through shared memory is no message, or not the next one",
                            got=(magic, count, of), expected=expected, hint="something else wrote to the ring")
        return data, sizes[:parts]

    def _release(self) -> None:
        self._count += 1
        self._held = False
        self.segment.post(self._done[self.segment.rank], self._count)
