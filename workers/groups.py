"""Process groups made one by one, without torch.distributed's process-wide default group: several engines, and a user's
own groups, live in one process side by side."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed

from hal.errors import BackendError, WorkerError

dist: Any = torch.distributed  # its stubs leave out what its documentation has
Store = Any
_HOST = "127.0.0.1"
_CONNECT = timedelta(seconds=60)
# Waiting is no error: an engine may be idle for days. That a rank died is seen at its closed connection.
_FOREVER = timedelta(days=3650)


def serve_store(world_size: int) -> tuple[Store, int]:
    """The meeting place, on a free port of the loopback interface; and the port."""
    listener = socket.create_server((_HOST, 0))
    port: int = listener.getsockname()[1]
    store = dist.TCPStore(_HOST, port, world_size, True, timeout=_CONNECT, wait_for_workers=False,
                          master_listen_fd=listener.detach())
    return store, port


def join_store(port: int, world_size: int) -> Store:
    return dist.TCPStore(_HOST, port, world_size, False, timeout=_CONNECT, wait_for_workers=False)


def make_group(kind: str, store: Store, name: str, rank: int, size: int) -> Any:
    """A backend object of torch.distributed ("gloo", "nccl") over ranks 0 to size - 1, which all call this.

    Raises:
        BackendError: this PyTorch has no such collectives.
        WorkerError: not all ranks came.
    """
    prefixed = dist.PrefixStore(name, store)
    try:
        if kind == "gloo":
            gloo = dist.ProcessGroupGloo
            options = gloo._Options()
            options._devices, options._timeout = [gloo.create_device(hostname=_HOST)], _CONNECT
            with _stdout_to_stderr():
                group = gloo(prefixed, rank, size, options)
            group._set_default_timeout(_FOREVER)
            return group
        if kind == "nccl" and dist.is_nccl_available():
            return dist.ProcessGroupNCCL(prefixed, rank, size, dist.ProcessGroupNCCL.Options())
    except RuntimeError as error:
        raise lost("connecting", error) from error
    raise BackendError("this PyTorch has no such collectives", got=kind, expected="gloo or nccl",
                       hint="set the backend's `collectives`, or install another PyTorch")


def lost(what: str, error: Exception) -> WorkerError:
    """What a rank raises that finds others gone. It does not know which: rank -1."""
    return WorkerError(f"{what} with the other ranks failed: {str(error).splitlines()[0]}", rank=-1,
                       cause=type(error).__name__)


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Gloo of some releases reports connections on the standard output, where a program's results belong."""
    sys.stdout.flush()
    saved = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
