"""Copies from the host to the device and back that do not wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from hal.contracts.runner import OutputT
from hal.schema.packed import Packed

_SLOTS = 4  # more than steps in flight
_streams: dict[tuple[int, int], torch.cuda.Stream] = {}  # by device and handle


def current_stream() -> torch.cuda.Stream:
    """The current stream, kept by device and handle. torch.cuda makes a new object in every call, which takes longer
    than recording an event."""
    device = torch.cuda.current_device()
    key = device, torch._C._cuda_getCurrentRawStream(device)
    if key not in _streams:
        _streams[key] = torch.cuda.current_stream()
    return _streams[key]


class PinnedRing:
    """Page-locked buffers, used in turn. The device copies from them while the host goes on."""

    def __init__(self, size: int) -> None:
        self._buffers = [_pinned(size) for _ in range(_SLOTS)]
        self._copied = [torch.cuda.Event() for _ in range(_SLOTS)]
        self._next = 0

    def copy(self, source: np.ndarray[Any, np.dtype[np.uint8]], into: torch.Tensor) -> None:
        """Copy `source` to the beginning of `into` (uint8, on the device), in the order of the current stream. `source`
        may be changed at once."""
        slot, size = self._next, source.size
        self._next = (slot + 1) % _SLOTS
        self._copied[slot].synchronize()  # it ended long ago, unless the device is _SLOTS steps behind
        if self._buffers[slot][1].size < size:
            self._buffers[slot] = _pinned(size + size // 2)
        pinned, array = self._buffers[slot]
        array[:size] = source
        into[:size].copy_(pinned[:size], non_blocking=True)
        self._copied[slot].record(current_stream())


def _pinned(size: int) -> tuple[torch.Tensor, np.ndarray[Any, Any]]:
    tensor = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    return tensor, tensor.numpy()


def end_of(packed: Packed[Any], name: str) -> int:
    """The offset behind an array."""
    array = packed.arrays[name]
    begin: int = array.__array_interface__["data"][0] - packed.buffer.__array_interface__["data"][0]
    return begin + array.nbytes


class Fetcher:
    """Copies outputs to the host. Page-locked tensors are kept by shape and used in turn."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, tuple[int, ...], torch.dtype], list[torch.Tensor]] = {}
        self._events: list[torch.cuda.Event] = []

    def __call__(self, output: OutputT) -> Callable[[], OutputT]:
        """Start the copies. The returned function waits for them, but not for a step that was submitted later."""
        schema, copies = type(output).schema, {}
        others = {field.name: output[field.name] for field in schema.unshaped}
        for field in schema.replicated:
            tensor = output[field.name]
            if tensor is not None:
                key = field.name, tuple(tensor.shape), tensor.dtype
                kept = self._kept.setdefault(key, [])
                host = kept.pop() if kept else torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                copies[field.name] = key, host.copy_(tensor, non_blocking=True)
        event = self._events.pop() if self._events else torch.cuda.Event()
        event.record(current_stream())

        def result() -> OutputT:
            event.synchronize()
            self._events.append(event)
            found = type(output)(**{name: host.clone() for name, (_, host) in copies.items()}, **others)
            for key, host in copies.values():
                self._kept[key].append(host)
            return found

        return result
