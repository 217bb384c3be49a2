"""The sum over the ranks of one host as a C function (sums.c), for a runner whose decode step is one compiled call."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

from hal.contracts.fingerprint import KINDS, SEAL
from hal.guard import data_plane
from workers.data.shared_group import SharedGroup

ABI = 2


class State(ctypes.Structure):
    """As sums.c has it."""

    _fields_ = [("line", ctypes.c_int64 * 5),
                *((name, ctypes.c_int64) for name in ("operation", "rank", "size", "most")),
                *((name, ctypes.c_void_p) for name in ("places", "lines", "counters")),
                ("count", ctypes.c_uint32), ("spin", ctypes.c_uint32)]


@functools.cache
def load() -> Any:
    """The library; None where there was no compiler, or where it was compiled from another version of the source."""
    try:
        library = ctypes.CDLL(str(next(iter(sorted(Path(__file__).parent.glob("_sums*.so"))))))
        return library if library.hal_sums_abi() == ABI and library.hal_sum else None
    except (StopIteration, OSError, AttributeError):
        return None


class SharedSums:
    """A hal.contracts.communicator.NativeSums.

    The C function does what SharedGroup.all_reduce does while every rank comes in time. Otherwise it stops when it has
    shown its tensor, and `finish` waits as every collective does. So there is one place that notices a rank that is
    gone, late, or elsewhere in its step.
    """

    def __init__(self, library: Any, groups: Any) -> None:
        self._groups = groups  # ByAxis[SharedGroup]: a look-up raises WorkerError when the communicator is closed
        self._group: SharedGroup | None = None  # within the context, so that its memory stays while C runs
        group = groups["tp"]
        self._arrays = [(ctypes.c_void_p * len(found))(*found) for found in group.addresses]
        self._state = State((0,) * 5, KINDS.index("all_reduce over tp"), group.rank, group.size, group.in_one_step,
                            *map(ctypes.addressof, self._arrays))
        self.function: int = ctypes.cast(library.hal_sum, ctypes.c_void_p).value or 0
        self.state = ctypes.addressof(self._state)

    def __enter__(self) -> None:
        with data_plane("all_reduce"):
            self._group = group = self._groups["tp"]
            ctypes.memmove(self.state, group.fingerprint.pack(), SEAL)
            self._state.count, self._state.spin = group.count, int(1e6 * group.segment.spin)

    def __exit__(self, *_: object) -> None:
        group, self._group, line = self._group, None, self._state.line
        assert group is not None
        fingerprint = group.fingerprint
        shown = line[2] - fingerprint.collectives
        if shown:
            group.count += shown
            fingerprint.collectives, fingerprint.kind, fingerprint.nbytes = line[2:]
        if shown > 1:  # others came in time for all but the last, as Segment.wait would have noticed
            group.segment.spin = group.segment.spin_most

    def finish(self, x: torch.Tensor) -> None:
        with data_plane("all_reduce"):
            group = self._groups["tp"]
            if x.nbytes <= self._state.most:
                group.finish(x)
            else:
                group.fingerprint.count("all_reduce", "tp", x.nbytes)
                group.all_reduce(x)
