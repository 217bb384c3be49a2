"""The strict tier: the dispatcher, sockets, pipes, queues, Ray, torch_xla, and threads started inside a phase."""

from __future__ import annotations

import functools
import multiprocessing.connection
import multiprocessing.queues
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any, Final

from hal.guard.patch import Patches
from hal.guard.state import ORIGIN, STATE, caller, current, refuse

_SOCKET: Final = (
    "send", "sendall", "sendto", "sendmsg", "sendfile", "recv", "recv_into", "recvfrom", "recvfrom_into", "recvmsg",
    "recvmsg_into", "connect", "connect_ex", "accept",
)  # fmt: skip
_CONNECTION: Final = ("send", "recv", "send_bytes", "recv_bytes", "recv_bytes_into", "poll")

# Modules that are patched if, and when, somebody imports them.
_LATE: Final[dict[str, tuple[str, ...]]] = {
    "ssl": tuple(f"SSLSocket.{name}" for name in (*_SOCKET, "read", "write", "do_handshake")),
    "ray": ("get", "put", "wait"),
    "ray.actor": ("ActorMethod._remote",),
    "ray.remote_function": ("RemoteFunction._remote",),
    "torch_xla.core.xla_model": (
        "all_reduce", "all_gather", "all_gather_bucketized", "all_to_all", "collective_permute", "collective_broadcast",
        "send", "recv", "reduce_scatter", "reduce_scatter_bucketized", "all_reduce_bucketized_gradients",
        "reduce_gradients", "xla_rendezvous", "rendezvous", "do_on_ordinals", "mesh_reduce", "broadcast_master_param",
    ),
}  # fmt: skip

_NAMESPACES: Final = frozenset({"c10d", "_c10d_functional", "c10d_functional", "_c10d_functional_autograd", "symm_mem"})
# Waiting is allowed: a result of the data plane that is waited for lazily is waited for outside `data_plane`.
_LOCAL_OPS: Final = frozenset({"wait_tensor", "_wrap_tensor_autograd", "check_for_nan"})


def patch_strict(patches: Patches) -> None:
    patches.guard(socket.socket, _SOCKET, "socket")
    patches.guard(multiprocessing.connection._ConnectionBase, _CONNECTION, "Connection")
    for name in ("Queue", "JoinableQueue", "SimpleQueue"):
        cls: type = getattr(multiprocessing.queues, name)
        patches.guard(cls, [method for method in ("put", "get") if method in vars(cls)], f"multiprocessing.{name}")
    for module, names in _LATE.items():
        patches.after_import(module, functools.partial(_patch_late, patches, names))
    _patch_threads(patches)
    try:
        import torch.distributed as dist
    except ImportError:
        return
    if dist.is_available():
        _patch_dispatcher(patches)


def _patch_late(patches: Patches, names: tuple[str, ...], module: ModuleType) -> None:
    for name in names:
        cls_name, _, method = name.rpartition(".")
        owner = getattr(module, cls_name, None) if cls_name else module
        if owner is not None and (owner is module or method in vars(owner)):
            patches.guard(owner, (method,), f"{module.__name__}.{cls_name}".removesuffix("."))


def _patch_threads(patches: Patches) -> None:
    start = threading.Thread.start
    submit: Any = ThreadPoolExecutor.submit

    @functools.wraps(start)
    def carry_and_start(self: threading.Thread) -> None:
        region = current()
        if region is not None and not region.open:
            # Past __setattr__, which a subclass may have made refuse.
            self.__dict__["run"] = _carried(self.run)
        start(self)

    @functools.wraps(submit)
    def carry_and_submit(self: ThreadPoolExecutor, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        # In any case, since the pool's thread may have been started inside another phase.
        return submit(self, _carried(fn), *args, **kwargs)

    patches.replace(threading.Thread, "start", carry_and_start)
    patches.replace(ThreadPoolExecutor, "submit", carry_and_submit)


def _carried(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that runs `function` in another thread, under the phase of this thread.

    An open region is not carried over: it may end long before the thread does, and a thread that an open region has
    started may communicate.
    """
    region = current()
    if region is not None and region.open:
        region = None
    origin = caller()[0] if region is not None else None

    def run(*args: Any, **kwargs: Any) -> Any:
        tokens = STATE.set(region), ORIGIN.set(origin)
        try:
            return function(*args, **kwargs)
        finally:
            STATE.reset(tokens[0])
            ORIGIN.reset(tokens[1])

    return run


def _patch_dispatcher(patches: Patches) -> None:
    """Guard the operators at the dispatch key BackendSelect. Every call passes it on its way to a device: eager or
    compiled, from Python or C++."""
    import torch
    import torch.distributed._functional_collectives  # defines its operators

    library_type: Any = torch.library.Library
    libraries: dict[str, Any] = {}
    done: set[str] = set()

    def scan(module: ModuleType | None = None) -> None:
        for full in torch._C._dispatch_get_all_op_names():
            namespace, _, rest = full.partition("::")
            name, _, overload = rest.partition(".")
            if namespace not in _NAMESPACES or name in _LOCAL_OPS or full in done:
                continue
            done.add(full)
            if namespace not in libraries:
                libraries[namespace] = library_type(namespace, "IMPL")
                patches.on_restore(libraries[namespace]._destroy)
            op = getattr(getattr(getattr(torch.ops, namespace), name), overload or "default")
            libraries[namespace].impl(op, _kernel(f"{namespace}::{name}", op), "BackendSelect", with_keyset=True)

    scan()
    patches.after_import("torch.distributed._symmetric_memory", scan)  # defines more


def _kernel(operation: str, op: Any) -> Callable[..., Any]:
    import torch

    below = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.BackendSelect)
    meta = torch._C.DispatchKey.Meta

    def call(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        region = STATE.get()
        # A compiler traces with the device Meta, which moves no data. The compiled call passes here again.
        if region is not None and not region.open and not keyset.has(meta):
            refuse(operation)
        return op.redispatch(keyset & below, *args, **kwargs)

    return call
