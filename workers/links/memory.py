"""Memory shared by the ranks of one host. It is private to the user and has no name; ranks wait on it by futex.

It is a memfd, which other ranks open through the driver's /proc entry. So no file is left behind, /dev/shm sets no
limit, and the kernel frees it when the last rank has ended in any way. A launcher's store, where ranks may meet, takes
entries from everybody who reaches it. Therefore a rank checks the owner and the kind of the memory that it maps.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import platform
import re
import select
import stat
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import numpy as np

from hal.errors import BackendError, HalError, WireError, WorkerError
from hal.schema.packed import Buffer
from workers.links.groups import Store, lost

_FUTEX = {"x86_64": 202, "aarch64": 98, "riscv64": 98, "ppc64le": 221, "s390x": 238}.get(platform.machine())
_WAIT, _WAKE, _ALL = 0, 1, 2**31 - 1
_LINE = 64  # bytes: a cache line, so that no two ranks' counters share one
_COUNTERS = 512
_MASK = 2**32 - 1
START = 2**32 - 3  # the first value of counters: so near the end that they wrap in every test
LIMIT = 1800.0  # seconds; longer than any step
_SLICE = 0.1  # seconds between checks that the awaited rank lives
_SPIN = 300e-6  # seconds: the usual pause between the steps of a small model, or within a collective


# The answers of ranks. The driver tells its process, descriptor, secret and host. Another rank tells its process when
# it has mapped the memory. A rank that cannot take part tells the reason, or the fault of the driver's answer.
_MADE = re.compile(r"([1-9][0-9]{0,8}) ([0-9]{1,9}) ([0-9a-f]{32}) ([0-9a-f-]{36} pid:\[[0-9]{1,20}\])")
_MAPPED = re.compile(r"([1-9][0-9]{0,8})")
_REFUSED, _FOREIGN = "refused: ", "foreign: "
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class _Time(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


_FIRST = _LINE * (1 + _COUNTERS)
_slice = _Time(0, int(_SLICE * 1e9))
_slice_at = ctypes.addressof(_slice)
_syscall = ctypes.CDLL(None).syscall  # releases the GIL
_syscall.argtypes = [ctypes.c_long, ctypes.c_void_p, ctypes.c_long, ctypes.c_long, ctypes.c_void_p]
_syscall.restype = ctypes.c_long


class Segment:
    """One segment of shared memory and the processes that share it. All ranks make it at the same time, and then take
    the same parts of it in the same order.

    One rank at a time writes a part. Its bytes become visible with a counter: the writer calls `post`, and the readers
    call `wait`. A counter has 32 bits and wraps; ranks count with plain integers from START.

    Attributes:
        spin: seconds that a wait looks at the counter before it sleeps; at most `spin_most`.

    Raises:
        BackendError: on every rank, when one of them cannot take part (another host, another system).
        WireError: on every rank, when an answer is not a rank's, or the memory is not the driver's.
        WorkerError: not all ranks joined.
    """

    def __init__(self, name: str, rank: int, world_size: int, store: Store, size: int) -> None:
        self.rank = rank
        self._counters, self._taken = 0, _FIRST
        self._peers: dict[int, select.poll] = {}
        self._pidfds: list[int] = []
        self._close_pidfds = weakref.finalize(self, _close, self._pidfds)  # when nobody calls close()
        self._fence = threading.Lock()
        self.spin_most = _SPIN if len(os.sched_getaffinity(0)) >= world_size else 0.0
        self.spin = self.spin_most
        self._memory: Buffer | None = None
        self._words: memoryview | None = None
        size += _FIRST
        fd = -1
        try:
            try:
                fd, answer = _create(name, size) if rank == 0 else _open(_answer(store, name, 0), size)
                self._map(fd, size)
            except (OSError, AttributeError) as error:
                answer = f"{_REFUSED}rank {rank}: {error}"
            except WireError as error:
                answer = f"{_FOREIGN}rank {rank}: {error.what}: {error.got}"
            store.set(f"{name}/{rank}", answer)
            answers = [_answer(store, name, r) for r in range(world_size)]
            peers = _peers(answers, rank, answer)
        except RuntimeError as error:
            raise lost("connecting", error) from error
        except HalError:
            self.close()
            raise
        finally:
            if fd >= 0:
                os.close(fd)  # the driver's, when all have mapped it
        for peer, pid in peers.items():
            self._watch(peer, pid)

    def _map(self, fd: int, size: int) -> None:
        memory = mmap.mmap(fd, size)
        self._memory = np.frombuffer(memory, np.uint8)
        self._address: int = self._memory.__array_interface__["data"][0]
        self._words = memoryview(memory).cast("I")

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

    def address(self, counter: int) -> int:
        return self._address + 4 * counter

    def post(self, counter: int, value: int) -> None:
        """Make the bytes that this rank wrote visible to the others, and wake the ranks that wait for them."""
        if self._words is None:
            raise _closed()
        self.order()
        self._words[counter] = value & _MASK
        self._wake(counter)

    def call(self, counter: int) -> None:
        """Wake the ranks that wait for a counter shortly before it is posted, so that they are awake then."""
        if self.spin_most and self._words is not None:
            self._wake(counter)

    def wait(self, counter: int, value: int, peer: int, limit: float | None = LIMIT,
             waiting: Callable[[int], None] | None = None) -> None:
        """Wait until `peer` has posted `value` or more. The wait sleeps, unless recent waits were short, there is a
        core for each rank, and no other process wants this core. `waiting(peer)` is called now and then.

        Raises:
            WorkerError: with rank -1, when the peer is gone, or after `limit` seconds.
        """
        words = self._words
        if words is None:
            raise _closed()
        if _behind(words[counter], value):
            self._wait(words, counter, value, peer, limit, waiting)
        self.order()

    def _wait(self, words: memoryview, counter: int, value: int, peer: int, limit: float | None,
              waiting: Callable[[int], None] | None) -> None:
        start, spin = perf_counter(), self.spin
        while not _spin_until(words, counter, value, spin):
            seen = words[counter]
            self._check_peer(words, counter, seen, peer, start, limit)
            if waiting is not None and perf_counter() > start + _SLICE and _behind(words[counter], value):
                waiting(peer)
            woken = self._sleep(counter, seen)
            spin = self.spin_most if woken else 0.0  # a `call` wakes before the post
        self.spin = self.spin_most if perf_counter() < start + _SPIN else self.spin / 2

    def _check_peer(self, words: memoryview, counter: int, seen: int, peer: int, start: float, limit: float | None,
                    ) -> None:
        """Raises WorkerError: the awaited rank is gone, or has been waited for too long since `start`."""
        if not self.lives(peer) and words[counter] == seen:  # what it posted before counts
            raise _lost(f"rank {peer} is gone")
        if limit is not None and perf_counter() > start + limit:
            raise _lost(f"rank {peer} was waited for {limit:.0f} s")

    def _sleep(self, counter: int, seen: int) -> bool:
        """Sleep until another rank wakes those that wait for the counter, unless its value is no longer `seen`; at most
        for _SLICE. Whether this rank was woken."""
        return bool(_syscall(_FUTEX, self.address(counter), _WAIT, seen, _slice_at) == 0)

    def _wake(self, counter: int) -> None:
        _syscall(_FUTEX, self.address(counter), _WAKE, _ALL, None)

    def lives(self, peer: int) -> bool:
        return not self._peers[peer].poll(0)

    def order(self) -> None:
        """A memory barrier between this thread's earlier and later reads and writes. Releasing a lock and then
        acquiring it is a barrier on every processor."""
        with self._fence:
            pass
        with self._fence:
            pass

    def close(self) -> None:
        """Release the memory. It is freed when no views of it are left. Idempotent."""
        self._memory = self._words = None
        self._peers = {}
        self._close_pidfds()


def _spin_until(words: memoryview, counter: int, value: int, seconds: float) -> bool:
    """Look at a counter for some time, giving the core to any process that wants it. Whether the value was posted."""
    if seconds > 0:
        end = perf_counter() + seconds
        while _behind(words[counter], value) and perf_counter() < end:
            os.sched_yield()
    return not _behind(words[counter], value)


def _create(name: str, size: int) -> tuple[int, str]:
    """A new segment and its place: process, descriptor, a secret that identifies it, and the host."""
    if _FUTEX is None:
        raise OSError(f"no futex known on {platform.machine()}")
    os.close(os.pidfd_open(os.getpid()))  # of Linux 5.3
    fd = os.memfd_create(f"hal-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    secret = os.urandom(16)
    os.fchmod(fd, 0o600)
    os.ftruncate(fd, size)
    os.pwrite(fd, secret.ljust(_LINE, b"\0") + np.full(_FIRST // 4, START, np.uint32).tobytes()[_LINE:], 0)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    return fd, f"{os.getpid()} {fd} {secret.hex()} {_host()}"


def _open(where: str, size: int) -> tuple[int, str]:
    """Raises OSError: this rank cannot share memory with the driver. WireError: that is not the driver's memory."""
    if where.startswith(_REFUSED):
        raise OSError("the driver made none")
    found = _MADE.fullmatch(where)
    if found is None:
        raise WireError("the driver's answer about its memory is none", got=repr(where[:100]))
    pid, theirs, secret, host = found.groups()
    if host != _host():
        raise OSError("it runs on another host, or in another container, than the driver")
    path = f"/proc/{int(pid)}/fd/{int(theirs)}"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)  # opening a pipe would wait
    except PermissionError:  # as where /proc is restricted
        raise
    except OSError as error:
        raise WireError("the driver's memory is not there", got=str(error)) from error
    wrong = _foreign(fd, size, secret)
    if wrong is not None:
        os.close(fd)
        raise WireError(f"{path} is not the driver's memory", got=wrong)
    return fd, str(os.getpid())


def _foreign(fd: int, size: int, secret: str) -> str | None:
    """The reason why an open file is not the memory that `_create` made with this secret, if there is one."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        return "not a regular file"
    if status.st_uid != os.geteuid():
        return f"a file of user {status.st_uid}, not of user {os.geteuid()}"
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        seals = 0
    if seals & _SEALS != _SEALS:
        return "a file that may change its size, not a sealed memfd"
    if status.st_size != size:
        return f"{status.st_size} bytes, not {size}"
    return None if os.pread(fd, 16, 0).hex() == secret else "another secret"


def _answer(store: Store, name: str, rank: int) -> str:
    return bytes(store.get(f"{name}/{rank}")).decode(errors="replace")


def _peers(answers: list[str], rank: int, own: str) -> dict[int, int]:
    """The other ranks' processes, if all answers are in order. Raises BackendError, WireError as Segment."""
    if answers[rank] != own:
        raise WireError(f"another process answered for rank {rank}", got=repr(answers[rank][:100]), expected=repr(own))
    foreign = [answer.removeprefix(_FOREIGN) for answer in answers if answer.startswith(_FOREIGN)]
    if foreign:
        raise WireError("the ranks were given memory that is not the driver's", got="; ".join(foreign),
                        hint="find out which program writes to the store where ranks meet")
    refusals = [answer.removeprefix(_REFUSED) for answer in answers if answer.startswith(_REFUSED)]
    if refusals:
        raise BackendError("the ranks cannot share memory", got="; ".join(refusals), expected="ranks on one host",
                           hint="control_plane='gloo' needs none")
    peers = {}
    for peer, answer in enumerate(answers):
        found = (_MAPPED if peer else _MADE).fullmatch(answer)
        if found is None:
            raise WireError(f"rank {peer}'s answer about the shared memory is none", got=repr(answer[:100]))
        if peer != rank:
            peers[peer] = int(found[1])
    return peers


def _host() -> str:
    """This host since it was booted, and the namespace of its process ids, which a container has for itself."""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def _behind(seen: int, value: int) -> bool:
    return (seen - value) & _MASK > _MASK >> 1


def _closed() -> WorkerError:
    return WorkerError("the shared memory is closed", rank=-1, cause="closed")


def _lost(what: str) -> WorkerError:
    return WorkerError(what, rank=-1, cause="lost")
