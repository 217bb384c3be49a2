"""Memory shared by the ranks of one host: private to the user, without a name, waited on by futex.

It is a memfd, which other ranks open through the driver's /proc entry: no file to leave behind, no limit of /dev/shm,
and the kernel frees it when the last rank is gone, however it went.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import platform
import select
import threading
import weakref
from collections.abc import Callable
from time import perf_counter

import numpy as np

from hal.errors import BackendError, WorkerError
from hal.schema.packed import Buffer
from workers.groups import Store, lost

_FUTEX = {"x86_64": 202, "aarch64": 98, "riscv64": 98, "ppc64le": 221, "s390x": 238}.get(platform.machine())
_WAIT, _WAKE, _ALL = 0, 1, 2**31 - 1
_LINE = 64  # bytes: a cache line, so that counters of two ranks don't share one
_COUNTERS = 512
_MASK = 2**32 - 1
START = 2**32 - 3  # where counters begin: they wrap, and so they do in every test
LIMIT = 1800.0  # seconds; longer than any step
_SLICE = 0.1  # seconds between looks at whether the awaited rank lives
_SPIN = 300e-6  # seconds: the usual pause between the steps of a small model, or within a collective


class _Time(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


_FIRST = _LINE * (1 + _COUNTERS)
_slice = _Time(0, int(_SLICE * 1e9))
_slice_at = ctypes.addressof(_slice)
_syscall = ctypes.CDLL(None).syscall  # releases the GIL
_syscall.argtypes = [ctypes.c_long, ctypes.c_void_p, ctypes.c_long, ctypes.c_long, ctypes.c_void_p]
_syscall.restype = ctypes.c_long


class Segment:
    """One piece of shared memory and the processes that share it. All ranks make it at the same time, then take the
    same parts of it in the same order.

    A part is written by one rank at a time. What it wrote becomes visible with a counter: `post` by the writer, `wait`
    by the readers. A counter is 32 bits that wrap; ranks count with plain integers from START.

    Raises:
        BackendError: on every rank, when one of them cannot take part (another host, another system).
        WorkerError: not all ranks came.
    """

    def __init__(self, name: str, rank: int, world_size: int, store: Store, size: int) -> None:
        self.rank = rank
        self._counters, self._taken = 0, _FIRST
        self._peers: dict[int, select.poll] = {}
        self._pidfds: list[int] = []
        self._close_pidfds = weakref.finalize(self, _close, self._pidfds)  # when nobody calls close()
        self._fence = threading.Lock()
        self._spin_most = _SPIN if len(os.sched_getaffinity(0)) >= world_size else 0.0
        self._spin = self._spin_most
        size += _FIRST
        fd, answer = -1, ""
        try:
            try:
                if rank == 0:
                    fd, answer = _create(name, size)
                else:
                    fd, answer = _open(store.get(f"{name}/0").decode(), size)
                self._map(fd, size)
            except (OSError, AttributeError, ValueError) as error:
                answer = f"no: rank {rank}: {error}"
            store.set(f"{name}/{rank}", answer)
            answers = [store.get(f"{name}/{r}").decode() for r in range(world_size)]
        except RuntimeError as error:
            raise lost("connecting", error) from error
        finally:
            if fd >= 0:
                os.close(fd)  # the driver's, when all have mapped it
        refusals = [a for a in answers if a.startswith("no")]
        if refusals:
            self.close()
            raise BackendError("the ranks cannot share memory", got="; ".join(refusals), expected="ranks on one host",
                               hint="control_plane='gloo' needs none")
        for peer, answer in enumerate(answers):
            if peer != rank:
                self._watch(peer, int(answer.split()[0]))

    def _map(self, fd: int, size: int) -> None:
        memory = mmap.mmap(fd, size)
        self._memory: Buffer | None = np.frombuffer(memory, np.uint8)
        self._address: int = self._memory.__array_interface__["data"][0]
        self._words: memoryview | None = memoryview(memory).cast("I")

    def _watch(self, peer: int, pid: int) -> None:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError as error:
            raise lost("connecting", error) from error
        self._pidfds.append(pidfd)
        self._peers[peer] = select.poll()
        self._peers[peer].register(pidfd, select.POLLIN)

    def take(self, size: int) -> Buffer:
        """The next part, zero at first; `size` is a multiple of 64."""
        assert self._memory is not None and size % _LINE == 0 and self._taken + size <= self._memory.size
        self._taken += size
        return self._memory[self._taken - size:self._taken]

    def counter(self) -> int:
        """The next counter, to be named to `post` and `wait`."""
        self._counters += 1
        assert self._counters <= _COUNTERS
        return self._counters * _LINE // 4

    def post(self, counter: int, value: int) -> None:
        """Show the others what this rank wrote, and wake those that wait for it."""
        if self._words is None:
            raise _closed()
        self.order()
        self._words[counter] = value & _MASK
        _syscall(_FUTEX, self._address + 4 * counter, _WAKE, _ALL, None)

    def call(self, counter: int) -> None:
        """Wake those that wait for a counter which is about to be posted, so that they are awake when it is."""
        if self._spin_most and self._words is not None:
            _syscall(_FUTEX, self._address + 4 * counter, _WAKE, _ALL, None)

    def wait(self, counter: int, value: int, peer: int, limit: float | None = LIMIT,
             waiting: Callable[[int], None] | None = None) -> None:
        """Until `peer` has posted `value` or more: asleep, unless waits have lately been short, there is a core for
        each rank, and no other process wants this one. `waiting(peer)` is called now and then.

        Raises:
            WorkerError: of rank -1, when the peer is gone, or after `limit` seconds.
        """
        words = self._words
        if words is None:
            raise _closed()
        if _behind(words[counter], value):
            self._wait(words, counter, value, peer, limit, waiting)
        self.order()

    def _wait(self, words: memoryview, counter: int, value: int, peer: int, limit: float | None,
              waiting: Callable[[int], None] | None) -> None:
        start = now = perf_counter()
        spin = start + self._spin
        while _behind(seen := words[counter], value):
            now = perf_counter()
            if now < spin:
                os.sched_yield()
                continue
            if not self.lives(peer) and words[counter] == seen:  # what it posted before counts
                raise _lost(f"rank {peer} is gone")
            if limit is not None and now > start + limit:
                raise _lost(f"rank {peer} was waited for {limit:.0f} s")
            if waiting is not None and now > start + _SLICE and _behind(words[counter], value):
                waiting(peer)
            if _syscall(_FUTEX, self._address + 4 * counter, _WAIT, seen, _slice_at) == 0:
                spin = perf_counter() + self._spin_most  # it may be a `call`
        self._spin = self._spin_most if now < start + _SPIN else self._spin / 2

    def lives(self, peer: int) -> bool:
        return not self._peers[peer].poll(0)

    def order(self) -> None:
        """What this thread read and wrote before comes before what it will. To release a lock and then to acquire it
        is a barrier on every processor."""
        with self._fence:
            pass
        with self._fence:
            pass

    def close(self) -> None:
        """The memory goes when no views of it are left. Idempotent."""
        self._memory = self._words = None
        self._peers = {}
        self._close_pidfds()


def _create(name: str, size: int) -> tuple[int, str]:
    """A new segment, and where it is: process, descriptor, and a secret that tells it from another's."""
    if _FUTEX is None:
        raise OSError(f"no futex known on {platform.machine()}")
    os.close(os.pidfd_open(os.getpid()))  # of Linux 5.3
    fd = os.memfd_create(f"hal-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    secret = os.urandom(16)
    os.fchmod(fd, 0o600)
    os.ftruncate(fd, size)
    os.pwrite(fd, secret.ljust(_LINE, b"\0") + np.full(_FIRST // 4, START, np.uint32).tobytes()[_LINE:], 0)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd, f"{os.getpid()} {fd} {secret.hex()}"


def _open(where: str, size: int) -> tuple[int, str]:
    if where.startswith("no"):
        raise OSError("the driver has no segment")
    pid, theirs, secret = where.split()
    fd = os.open(f"/proc/{pid}/fd/{theirs}", os.O_RDWR | os.O_CLOEXEC)
    if os.fstat(fd).st_size != size or os.pread(fd, 16, 0).hex() != secret:
        os.close(fd)
        raise OSError("another host's or engine's segment")
    return fd, str(os.getpid())


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def _behind(seen: int, value: int) -> bool:
    return (seen - value) & _MASK > _MASK >> 1


def _closed() -> WorkerError:
    return WorkerError("the shared memory is closed", rank=-1, cause="closed")


def _lost(what: str) -> WorkerError:
    return WorkerError(what, rank=-1, cause="lost")
