"""The control plane: it brings a step's message to the other ranks, and the step's output back to the driver."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from hal.schema.packed import Buffer


class ControlPlane(Protocol):
    """A message is a list of parts. A part is a packed buffer (uint8, see `hal.schema`) that begins at a
    64-byte-aligned address at the receiver. The worker uses the control plane in phase `worker` only.

    Raises (all methods):
        WorkerError: a rank at the other end is gone, or the wait outlasted the deadline.
    """

    def broadcast(self, parts: Sequence[Buffer]) -> None:
        """Driver: send the parts to every other rank. Returns when the parts may be changed."""

    def receive(self) -> list[Buffer]:
        """Other ranks: the next message; its parts are valid until the next call. An empty list ends the loop."""

    def send_output(self, part: Buffer) -> None:
        """The sampling rank, if it is not the driver: send an output to the driver."""

    def receive_output(self) -> Buffer:
        """Driver: the next output, in the order of the steps. It is valid until the next call."""

    def close(self) -> None:
        """Release sockets, files and shared memory. Idempotent."""
