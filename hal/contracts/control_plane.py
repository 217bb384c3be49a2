"""The control plane: how a step's one message reaches the other ranks, and how its output comes back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from hal.schema.packed import Buffer


class ControlPlane(Protocol):
    """Messages are packed buffers (uint8, see `hal.schema`). A step's message is several of them, one after another;
    each begins at a 64-byte-aligned address at the receiver. Used in phase `worker` only.

    Raises (all methods):
        WorkerError: a rank at the other end is gone, or the wait outlasted the deadline.
    """

    def broadcast(self, parts: Sequence[Buffer]) -> None:
        """Driver: hand the parts to every other rank. Returns when the parts may be changed."""

    def receive(self) -> list[Buffer]:
        """Other ranks: the next message; its parts are valid until the next call. An empty list ends the loop."""

    def send_output(self, part: Buffer) -> None:
        """The sampling rank, when it is not the driver: hand an output to the driver."""

    def receive_output(self) -> Buffer:
        """Driver: the next output, in order of the steps; valid until the next call."""

    def close(self) -> None:
        """Release sockets, files and shared memory. Idempotent."""
