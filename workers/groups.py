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
LOOPBACK = "127.0.0.1"
CONNECT = timedelta(seconds=60)
# Waiting is no error: an engine may be idle for days. That a rank died is seen at its closed connection.
_FOREVER = timedelta(days=3650)
# NCCL's groups read this when they are made. By default PyTorch's threads end the process, which may be the user's, if
# an operation fails or takes long, and if the device fails or is slow to answer them. Lifelines see to all that.
_NCCL = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "2", "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0", "TORCH_NCCL_BLOCKING_WAIT": "0",
         "TORCH_NCCL_ENABLE_MONITORING": "0", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}


def serve_store(world_size: int, host: str = LOOPBACK) -> tuple[Store, str]:
    """The meeting place, on a free port of this host's address `host`; and where that is, "host:port"."""
    listener = socket.create_server((host, 0))
    port: int = listener.getsockname()[1]
    store = dist.TCPStore(host, port, world_size, True, timeout=CONNECT, wait_for_workers=False,
                          master_listen_fd=listener.detach())
    return store, f"{host}:{port}"


def join_store(address: str, world_size: int) -> Store:
    """The store at "host:port". Raises WorkerError: nobody serves it."""
    host, _, port = address.rpartition(":")
    try:
        return dist.TCPStore(host, int(port), world_size, False, timeout=CONNECT, wait_for_workers=False)
    except RuntimeError as error:
        raise lost("connecting", error) from error


def local_address(store: Store) -> str:
    """This host's address on the way to the store, where other ranks reach it too; no packet is sent."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if not isinstance(store, dist.TCPStore):
        return LOOPBACK
    family = socket.getaddrinfo(store.host, store.port, type=socket.SOCK_DGRAM)[0][0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((store.host, store.port))
        address: str = probe.getsockname()[0]
    return address


def make_group(kind: str, store: Store, name: str, rank: int, size: int, small: bool = False) -> Any:
    """A backend object of torch.distributed ("gloo", "nccl") over ranks 0 to size - 1, which all call this.

    Args:
        small: of NCCL, a group for small messages beside a step: they take less of the device, and come first.

    Raises:
        BackendError: this PyTorch has no such collectives.
        WorkerError: not all ranks came.
    """
    prefixed = dist.PrefixStore(name, store)
    try:
        if kind == "gloo":
            gloo = dist.ProcessGroupGloo
            options = gloo._Options()
            options._devices, options._timeout = [gloo.create_device(hostname=local_address(store))], CONNECT
            with _stdout_to_stderr():
                group = gloo(prefixed, rank, size, options)
            group._set_default_timeout(_FOREVER)
            return group
        if kind == "nccl" and dist.is_nccl_available():
            options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=small)
            options._timeout = _FOREVER
            if small:
                options.config.max_ctas = 1
            with _environment(_NCCL):
                return dist.ProcessGroupNCCL(prefixed, rank, size, options)
    except RuntimeError as error:
        raise lost("connecting", error) from error
    raise BackendError("this PyTorch has no such collectives", got=kind, expected="gloo or nccl",
                       hint="set the backend's `collectives`, or install another PyTorch")


def lost(what: str, error: Exception) -> WorkerError:
    """What a rank raises that finds others gone. It does not know which: rank -1."""
    return WorkerError(f"{what} with the other ranks failed: {str(error).splitlines()[0]}", rank=-1,
                       cause=type(error).__name__)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    saved = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in saved.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value


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
