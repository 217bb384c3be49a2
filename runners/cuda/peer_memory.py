"""Sums of small tensors over the memory of other GPUs of the same host, which NCCL takes twice as long for."""

from __future__ import annotations

import ctypes
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hal.errors import BackendError
from runners.cuda.kernels import sums

_SIZES = [4 << 10, 32 << 10, 128 << 10, 512 << 10, sums.LIMIT]  # bytes at which both ways are measured
_CALLS, _ROUNDS = 16, 5
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_LAZY_ENABLE_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS


class _Handle(ctypes.Structure):
    """CUipcMemHandle, which is passed by value."""

    _fields_ = (("data", ctypes.c_ubyte * 64),)


class NvlinkSums:
    """A hal.contracts.device.PeerSums over memory of the CUDA driver, which other processes open by its IPC handle.
    PyTorch's own ways to share memory leave files when a process is killed (torch.multiprocessing), or change with each
    release (symmetric memory).

    Attributes:
        limit: bytes up to which `takes` says yes; 0 until `settle` has measured.
        measured: by size in bytes, microseconds of this way and of the other, the mean of the ranks.
    """

    def __init__(self, rank: int, device: torch.device, own: int, handles: list[str]) -> None:
        self.rank, self.size, self.device, self.limit = rank, len(handles), device, 0
        self.measured: dict[int, tuple[float, float]] = {}
        self._own, self._opened = own, [_open(text) for peer, text in enumerate(handles) if peer != rank]
        places = [*self._opened[:rank], own, *self._opened[rank:]]
        addresses = torch.tensor(places, dtype=torch.int64)
        self._addresses, self._flags = addresses.to(device), (addresses + 2 * sums.HALF).to(device)
        self._epochs = torch.zeros(sums.PROGRAMS, dtype=torch.int32, device=device)
        self._aborted = torch.zeros(1, dtype=torch.int32, device=device)
        self._one = torch.ones(1, dtype=torch.int32).pin_memory()
        self._side = torch.cuda.Stream(device)
        torch.cuda.synchronize(device)

    def settle(self, other: Callable[[torch.Tensor], object]) -> None:
        """Measure both ways in graphs, as steps run them. The largest of the measured sizes up to which this one is
        faster is the limit. The ranks add their times up by `other`, so that they agree."""
        times = torch.zeros(2, len(_SIZES), device=self.device)
        for place, size in enumerate(_SIZES):
            x = torch.zeros(size // 2, dtype=torch.bfloat16, device=self.device)
            for way, call in enumerate((self, other)):
                times[way, place] = _microseconds(functools.partial(call, x))
        other(times)
        own, others = (times / self.size).tolist()
        self.measured = {size: (own[i], others[i]) for i, size in enumerate(_SIZES)}
        for size, (mine, theirs) in self.measured.items():
            if mine > theirs:
                break
            self.limit = size

    def takes(self, x: torch.Tensor) -> bool:
        return x.nbytes <= self.limit and x.dtype.is_floating_point and x.itemsize in (2, 4) and x.numel() > 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return sums.peer_sum(x, self._addresses, self._flags, self._epochs, self._aborted, self.rank, self.size)

    def abort(self) -> None:
        """By a copy, not a kernel: kernels that wait may have the whole device."""
        with torch.cuda.device(self.device), torch.cuda.stream(self._side):
            self._aborted.copy_(self._one, non_blocking=True)
            self._side.synchronize()


    def close(self) -> None:
        opened, own, self._opened, self._own = self._opened, self._own, [], 0
        for address in opened:
            _driver().cuIpcCloseMemHandle(ctypes.c_uint64(address))
        if own:
            _driver().cuMemFree_v2(ctypes.c_uint64(own))


def nvlink_sums(store: Any, rank: int, size: int, device: torch.device) -> NvlinkSums | None:
    """All ranks call this, and all get one or none: the GPUs must be those of one host, and each must reach all others'
    memory."""
    own, said = 0, {}
    torch.cuda.synchronize(device)  # the driver's calls need the context that this makes current
    try:
        own = _allocate(2 * sums.HALF + sums.PROGRAMS * size * 4)
        said = {"host": _BOOT.read_text(), "gpu": str(torch.cuda.get_device_properties(device).uuid),
                "handle": _handle(own)}
    except (BackendError, OSError):
        pass  # the driver shares no memory here
    found = _exchange(store, "offer", rank, size, said)
    reached = all(found) and _reaches(device, found)
    if all(_exchange(store, "reached", rank, size, reached)):
        return NvlinkSums(rank, device, own, [peer["handle"] for peer in found])
    if own:
        _driver().cuMemFree_v2(ctypes.c_uint64(own))
    return None


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, *arguments: Any) -> None:
    code = getattr(_driver(), name)(*arguments)
    if code:
        raise BackendError(f"the CUDA driver's {name} failed", got=f"error {code}")


def _allocate(nbytes: int) -> int:
    """Zeroed memory of the current device, which is at the start of its allocation, as a handle needs it."""
    address = ctypes.c_uint64()
    _call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(nbytes))
    _call("cuMemsetD8_v2", address, ctypes.c_ubyte(0), ctypes.c_size_t(nbytes))
    torch.cuda.synchronize()
    return address.value


def _handle(address: int) -> str:
    handle = _Handle()
    _call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(address))
    return bytes(handle.data).hex()


def _open(handle: str) -> int:
    address = ctypes.c_uint64()
    _call("cuIpcOpenMemHandle_v2", ctypes.byref(address), _Handle.from_buffer_copy(bytes.fromhex(handle)),
          ctypes.c_uint(_LAZY_ENABLE_PEER_ACCESS))
    return address.value


def _exchange(store: Any, what: str, rank: int, size: int, value: Any) -> list[Any]:
    store.set(f"peer memory: {what} {rank}", json.dumps(value))
    return [json.loads(bytes(store.get(f"peer memory: {what} {other}"))) for other in range(size)]


def _reaches(device: torch.device, found: list[dict[str, str]]) -> bool:
    here = {str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())}
    own = here[str(torch.cuda.get_device_properties(device).uuid)]
    return all(peer["host"] == found[0]["host"] and peer["gpu"] in here and (
        here[peer["gpu"]] == own or torch.cuda.can_device_access_peer(own, here[peer["gpu"]])) for peer in found)


def _microseconds(call: Callable[[], object]) -> float:
    """Of one call, in a graph of several; the least of some replays."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(_CALLS):
            call()
    spent = []
    for _ in range(_ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        spent.append(begin.elapsed_time(end) * 1e3 / _CALLS)
    return min(spent)
