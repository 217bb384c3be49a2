"""Process groups made one by one, without torch.distributed's process-wide default group: several engines, and a user's
own groups, live in one process side by side."""

from __future__ import annotations

import hmac
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from hal.contracts.device import Collectives
from hal.errors import WireError, WorkerError
from workers.links import rendezvous
from workers.links.rendezvous import Rendezvous

dist: Any = torch.distributed  # its stubs leave out what its documentation has
Store = Any
LOOPBACK = "127.0.0.1"
CONNECT = timedelta(seconds=rendezvous.CONNECT)
_ANY_PORT = 9
_SECRET = 16  # bytes
# No limit: an engine may be idle for days. The closed connection shows that a rank has died.
_FOREVER = timedelta(days=3650)
_redirecting, _saved = threading.Lock(), list[int]()


class RendezvousStore(dist.Store):  # type: ignore[misc]
    """A Rendezvous in the form that process groups need. Its owner must keep it as long as the groups live, since
    PyTorch does not keep it."""

    def __init__(self, rendezvous: Rendezvous) -> None:
        super().__init__()
        self._rendezvous, self.host = rendezvous, rendezvous.host

    def set(self, key: str, value: bytes | str) -> None:
        self._rendezvous.set(key, value.encode() if isinstance(value, str) else value)

    def get(self, key: str) -> bytes:
        return self._rendezvous.get(key)

    def clone(self) -> RendezvousStore:
        return self

    def check(self, keys: list[str]) -> bool:
        return all(self._rendezvous.has(key) for key in keys)

    def wait(self, keys: list[str], timeout: timedelta = CONNECT) -> None:
        for key in keys:
            self._rendezvous.get(key, timeout.total_seconds())


def local_address(store: Store) -> str:
    """This host's address on the way to the driver, where other ranks reach it too; no packet is sent."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    host = getattr(store, "host", LOOPBACK)
    if host == LOOPBACK:
        return LOOPBACK
    family = socket.getaddrinfo(host, _ANY_PORT, type=socket.SOCK_DGRAM)[0][0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, _ANY_PORT))
        address: str = probe.getsockname()[0]
    return address


def make_group(collectives: Collectives, store: Store, name: str, rank: int, size: int, control: bool = False) -> Any:
    """A process group of a backend's collectives over ranks 0 to size - 1, which all call this.

    Args:
        name: of the group; each once for a store.
        control: see Collectives.process_group.

    Raises:
        BackendError: this PyTorch has no such collectives.
        WorkerError: not all ranks joined.
        WireError: over gloo, another process took a rank's place.
    """
    prefixed = dist.PrefixStore(name, store)
    try:
        if collectives.kind != "gloo":
            return collectives.process_group(prefixed, rank, size, _FOREVER, control)
        gloo = dist.ProcessGroupGloo
        options = gloo._Options()
        options._devices, options._timeout = [gloo.create_device(hostname=local_address(store))], CONNECT
        with _stdout_to_stderr():
            group = gloo(prefixed, rank, size, options)
        _prove(group, prefixed, rank, size)
        group._set_default_timeout(_FOREVER)
        return group
    except RuntimeError as error:
        raise lost("connecting", error) from error


def _prove(group: Any, store: Store, rank: int, size: int) -> None:
    """Check that every connection leads to a rank. Each rank shows every other rank a secret that the store has told to
    that rank alone. Gloo's own handshake accepts whoever connects first to a rank's port, which any user of the host
    can do."""
    others = [peer for peer in range(size) if peer != rank]
    sent = [torch.frombuffer(bytearray(os.urandom(_SECRET)), dtype=torch.uint8) for _ in others]
    for peer, secret in zip(others, sent, strict=True):
        store.set(f"secret of {rank} for {peer}", secret.numpy().tobytes())
    works = [group.send([secret], peer, 0) for peer, secret in zip(others, sent, strict=True)]
    for peer in others:
        shown = torch.zeros(_SECRET, dtype=torch.uint8)
        group.recv([shown], peer, 0).wait()
        if not hmac.compare_digest(shown.numpy().tobytes(), bytes(store.get(f"secret of {peer} for {rank}"))):
            raise WireError(f"a process that is not rank {peer} answered in its place", got="another secret",
                            expected="the secret that the rank told through the store",
                            hint="find out which program of this host connected to a port of the engine")
    for work in works:
        work.wait()


def lost(what: str, error: Exception) -> WorkerError:
    """The error of a rank that finds another rank gone. It does not know which one, so the error has rank -1."""
    return WorkerError(f"{what} with the other ranks failed: {str(error).splitlines()[0]}", rank=-1,
                       cause=type(error).__name__)


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Gloo of some releases reports connections on the standard output, where a program's results belong. Several
    threads may be in here: the last one to leave puts back what the first one found, in whatever order they leave."""
    sys.stdout.flush()
    with _redirecting:
        _saved.append(os.dup(1))
        os.dup2(2, 1)
    try:
        yield
    finally:
        with _redirecting:
            os.dup2(_saved[-1], 1)
            os.close(_saved.pop())
