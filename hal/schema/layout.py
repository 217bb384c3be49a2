"""The place of each field of an instance in one packed buffer, and the header before them.

    [ header | symbol values | scalars | pad ][ replicated arrays, each 64-byte aligned ][ texts ][ local arrays ]

Everything up to and including the texts is the message; local arrays (scope "driver" or "rank") lie behind it.
Offsets follow from the symbol values and the presence bits alone, so no per-field metadata travels.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hal.errors import InputError, WireError
from hal.schema.fields import DTYPES, Field

ALIGN = 64
MAGIC = b"HAL1"
_HEADER = struct.Struct("<4sIQQQQ")  # magic, crc32, fingerprint, message size, presence, texts size
HEAD_SIZE = _HEADER.size
_CRC = struct.Struct("<I")
_CRC_FROM = 8
# The largest symbol of a message. Arrays with elements are bounded by the message's own size; an empty one, such as
# [0, max_blocks], would let the sender claim any size for its other dimensions.
MOST = 2**31 - 1
_LARGEST = 2**62  # bytes that the dimensions of an empty array may span without its zero: numpy counts them in int64
# numpy has no bfloat16: on the host its bits are held as uint16.
NP_DTYPES = {name: np.dtype("uint16" if name == "bfloat16" else name) for name in DTYPES}

View = tuple[str, tuple[int, ...], "np.dtype[Any]", int]  # name, shape, dtype, byte offset


def align(offset: int) -> int:
    return -(-offset // ALIGN) * ALIGN


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Byte offsets for one combination of symbol values and present fields.

    Attributes:
        replicated, local: the views of each part.
        key: the presence bits of the fields that travel, then the size of each symbol, 0 for a symbol that no array of
            the message has. A message with another key is refused.
        dims: the size of each symbol; 0 for one that no present array has.
        texts_at: offset of the texts, and so the message size of an instance without any.
        local_size: bytes of the local part. The offsets in it count from its own start.
    """

    replicated: tuple[View, ...]
    local: tuple[View, ...]
    key: tuple[int, ...]
    dims: dict[str, int]
    texts_at: int
    local_size: int


def place(fields: Sequence[Field], start: int, dims: dict[str, int]) -> tuple[tuple[View, ...], int]:
    """The views of array fields laid out from `start` on, and where the last one ends.

    Raises:
        InputError: an array without elements has dimensions that numpy cannot count.
    """
    views: list[View] = []
    end = start
    for field in fields:
        assert field.array is not None
        shape = tuple(dim.size(dims) for dim in field.array.dims)
        dtype = NP_DTYPES[field.array.dtype]
        at = align(end)
        count = 1
        for size in shape:
            count *= size
        if not count and math.prod(size or 1 for size in shape) * dtype.itemsize > _LARGEST:
            raise InputError(f"{field.name} has no elements, and dimensions that are out of range", got=list(shape),
                             expected="a product that int64 can hold", fields=(field.name,))
        end = at + count * dtype.itemsize
        views.append((field.name, shape, dtype, at))
    return tuple(views), end


def aligned_bytes(size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """An uninitialised uint8 array whose first byte lies at a multiple of 64."""
    raw = np.empty(size + ALIGN, np.uint8)
    skip = -raw.__array_interface__["data"][0] % ALIGN
    return raw[skip:skip + size]


def bfloat16_bits(values: Any) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """The bfloat16 bits of numbers, rounded towards zero."""
    return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def symbols_of(fields: Sequence[Field]) -> set[str]:
    """The symbols in the shapes of array fields."""
    return {dim.symbol for field in fields if field.array for dim in field.array.dims}


def write_head(buffer: Any, head: struct.Struct, fingerprint: int, size: int, present: int, texts: bytes,
               values: Sequence[int | float]) -> None:
    """Write header, symbol values, scalars and, at the end of the message, its texts; `head` is the schema's struct for
    symbol values and scalars. The CRC covers all of them but not the arrays."""
    head.pack_into(buffer, HEAD_SIZE, *values)
    _HEADER.pack_into(buffer, 0, MAGIC, 0, fingerprint, size, present, len(texts))
    crc = zlib.crc32(buffer[_CRC_FROM:HEAD_SIZE + head.size])
    if texts:
        buffer[size - len(texts):size] = np.frombuffer(texts, np.uint8)
        crc = zlib.crc32(texts, crc)
    _CRC.pack_into(buffer, 4, crc)


def read_head(buffer: Any, head: struct.Struct, fingerprint: int, name: str) -> tuple[int, int, int, tuple[Any, ...]]:
    """Check a message's head and return (message size, presence bits, texts size, symbol values and scalars).

    Raises:
        WireError: the message is too short, foreign, of another schema, or its head or texts are damaged, or the buffer
            goes on behind it.
    """
    view = memoryview(buffer)
    if view.nbytes < HEAD_SIZE + head.size:
        raise WireError(f"a {name} message is truncated in its head", got=f"{view.nbytes} bytes",
                        expected=f"at least {HEAD_SIZE + head.size}")
    magic, crc, theirs, size, present, texts_size = _HEADER.unpack_from(view)
    if magic != MAGIC:
        raise WireError(f"not a {name} message", got=bytes(magic), expected=MAGIC)
    if theirs != fingerprint:
        raise WireError(f"a message of another schema arrived where {name} was expected",
                        got=f"fingerprint {theirs:016x}", expected=f"{fingerprint:016x}",
                        hint="run the same release and configuration on every rank")
    if view.nbytes != size:
        raise WireError(f"a {name} message is truncated" if view.nbytes < size else f"bytes follow a {name} message",
                        got=f"{view.nbytes} bytes", expected=f"{size} bytes")
    found = zlib.crc32(view[_CRC_FROM:HEAD_SIZE + head.size])
    if texts_size:
        found = zlib.crc32(view[max(size - texts_size, HEAD_SIZE + head.size):], found)
    if crc != found:
        raise WireError(f"the head or the texts of a {name} message are corrupt",
                        hint="report it, with the control plane in use")
    return size, present, texts_size, head.unpack_from(view, HEAD_SIZE)
