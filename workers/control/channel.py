"""Messages over transfers whose size both ends must know beforehand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from hal.schema.layout import aligned_bytes
from hal.schema.packed import Buffer
from workers.control import message

_STEP = 4096
Transfer = Callable[[torch.Tensor], None]


class Channel:
    """One end of a stream of messages over transfers whose size both ends must know beforehand.

    Both ends expect a message to be as long as the one before, rounded up. So decoding steps, whose messages hardly
    grow, take one transfer each. The rest of a longer message follows in a second transfer. The buffer is kept.
    """

    def __init__(self, allocate: Callable[[int], Buffer] = aligned_bytes) -> None:
        self._allocate = allocate
        self.buffer = allocate(_STEP)
        self.expected = _STEP

    def send(self, parts: Sequence[Buffer], transfer: Transfer) -> None:
        total = message.total(parts)
        self._reserve(total, 0)
        message.write(parts, self.buffer)
        self._move(total, transfer, 0)

    def receive(self, transfer: Transfer) -> list[Buffer]:
        """The parts, as views of the buffer."""
        transfer(torch.from_numpy(self.buffer[:self.expected]))
        total = int(self.buffer[:8].view(np.int64)[0])
        self._reserve(total, self.expected)
        self._move(total, transfer, self.expected)
        return message.read(self.buffer)

    def _move(self, total: int, transfer: Transfer, done: int) -> None:
        if not done:
            transfer(torch.from_numpy(self.buffer[:self.expected]))
        if total > self.expected:
            transfer(torch.from_numpy(self.buffer[self.expected:total]))
        self.expected = -(-total // _STEP) * _STEP

    def _reserve(self, total: int, keep: int) -> None:
        size = max(-(-total // _STEP) * _STEP, self.expected)
        if self.buffer.size < size:
            larger = self._allocate(size + size // 2)
            larger[:keep] = self.buffer[:keep]
            self.buffer = larger
