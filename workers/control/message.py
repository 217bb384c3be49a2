"""A control plane's message in one buffer: a head, then each part at a multiple of 64 bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hal.errors import WireError, WorkerError
from hal.schema.layout import align
from hal.schema.packed import Buffer

HEAD = 64  # bytes, of int64: bytes of the message, head included; number of parts; bytes of each
_MOST = HEAD // 8 - 2
# Limits shared by control planes that hold a message until every receiver has read it.
IN_FLIGHT = 32  # messages on their way; a driver submits far fewer steps ahead
END_LIMIT = 5.0  # seconds that the last message waits for ranks that hang


def total(parts: Sequence[Buffer]) -> int:
    """Bytes of the message. Raises WireError: it has too many parts."""
    if len(parts) > _MOST:
        raise WireError("a message has too many parts", got=len(parts), expected=f"at most {_MOST}")
    return HEAD + sum(align(part.size) for part in parts)


def write(parts: Sequence[Buffer], into: Buffer) -> None:
    """The message, into the first `total(parts)` bytes of a buffer."""
    head, at = into[:HEAD].view(np.int64), HEAD
    head[:2] = total(parts), len(parts)
    for i, part in enumerate(parts):
        head[2 + i] = part.size
        into[at:at + part.size] = part
        at += align(part.size)


def pack(parts: Sequence[Buffer]) -> bytes:
    """The message, in a new buffer."""
    into = np.empty(total(parts), np.uint8)
    write(parts, into)
    return into.tobytes()


def read(message: Buffer) -> list[Buffer]:
    """The parts, as views of the message, which begins at a multiple of 64."""
    _, count, *sizes = message[:HEAD].view(np.int64).tolist()
    at, parts = HEAD, []
    for size in sizes[:count]:
        parts.append(message[at:at + size])
        at += align(size)
    return parts


def closed() -> WorkerError:
    return WorkerError("the control plane is closed", rank=-1, cause="closed")
