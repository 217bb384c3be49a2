"""What the operations under test operate on, all of it made before install(): real groups, stores, sockets, queues.

`pair` is rank 0 of a gloo group of two whose rank 1 lives in this process as `peer`, so that send and recv are real.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import ssl
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from multiprocessing.pool import ThreadPool
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch.distributed import all_reduce as saved_all_reduce
from torch.distributed import destroy_process_group as saved_destroy
from torch.distributed import distributed_c10d
from torch.distributed import new_group as saved_new_group

TIMEOUT = timedelta(seconds=20)
TAG = 1  # of tensors; torch sends objects with tag 0, and gloo aborts when sizes under one tag differ


class Env:
    """Attributes are plain `Any`: the operations include wrong uses on purpose."""

    def __init__(self) -> None:
        directory = tempfile.TemporaryDirectory()
        self._closers: list[Callable[[], object]] = [directory.cleanup]
        self._kept: list[object] = []  # gloo cancels a send or recv whose Work is collected
        self.spare: Any = None  # a group to be destroyed
        self.ending: Any = None  # a socket to be shut down
        self.work: Any = None  # a collective launched before the phase

        self.store = dist.HashStore()
        self.file_store = dist.FileStore(f"{directory.name}/store", 1)
        self.tcp_store = dist.TCPStore("127.0.0.1", 0, 1, True, TIMEOUT)
        self.prefix_store = dist.PrefixStore("prefix", self.store)
        self.file = os.open(__file__, os.O_RDONLY)
        self._closers.append(lambda: os.close(self.file))
        self.control: Any = torch._C._distributed_c10d._StoreCollectives(dist.PrefixStore("control", self.store), 0, 1)

        dist.init_process_group("gloo", store=self.store, rank=0, world_size=1)
        self._closers.append(saved_destroy)
        self.world: Any = dist.group.WORLD
        self.backend: Any = self.world._get_backend(torch.device("cpu"))
        self.pair, self.peer = self._make_pair()
        self.saved_all_reduce, self.saved_new_group = saved_all_reduce, saved_new_group
        self.saved_destroy = saved_destroy

        self.near, self.far = self._closing(*socket.socketpair())
        self.saved_send = self.near.send
        self.datagram, self.far_datagram = self._closing(*(socket.socket(type=socket.SOCK_DGRAM) for _ in range(2)))
        self.datagram.bind(("127.0.0.1", 0))
        self.far_datagram.bind(("127.0.0.1", 0))
        (self.listener,) = self._closing(socket.create_server(("127.0.0.1", 0), backlog=128))
        self.tls = self._make_tls()

        self.conn, self.far_conn = self._closing(*multiprocessing.Pipe())
        self.queue, self.joinable, self.simple = (
            multiprocessing.Queue(),
            multiprocessing.JoinableQueue(),
            multiprocessing.SimpleQueue(),
        )
        self._closers += [self.queue.close, self.joinable.close, self.simple.close]
        self.executor, self.thread_pool = ThreadPoolExecutor(1), ThreadPool(1)
        self.executor.submit(int).result()  # so that its thread exists before any phase
        self._closers += [self.executor.shutdown, self.thread_pool.terminate]

        self.ray, self.actor, self.xm = self._fake_modules()
        self.compiled_functional, self.compiled_all_reduce = self._compile()

    def _make_pair(self) -> tuple[Any, Any]:
        ends: dict[int, Any] = {}

        def make(rank: int) -> None:
            ends[rank] = dist.ProcessGroupGloo(dist.PrefixStore("pair", self.store), rank, 2, TIMEOUT)

        other = threading.Thread(target=make, args=(1,))
        other.start()
        make(0)
        other.join()
        pair: Any = dist.ProcessGroup(self.store, 0, 2)
        gloo: Any = dist.ProcessGroup.BackendType.GLOO
        pair._set_default_backend(gloo)
        pair._register_backend(torch.device("cpu"), gloo, ends[0])
        pair._set_group_name("pair")
        world: Any = distributed_c10d._world
        world.pg_map[pair] = ("gloo", self.store)
        world.pg_names[pair] = "pair"
        world.pg_group_ranks[pair] = {0: 0, 1: 1}
        world.pg_backend_config[pair] = "cpu:gloo"
        return pair, ends[1]

    def _make_tls(self) -> ssl.SSLSocket:
        near, _ = self._closing(*socket.socketpair())
        near.setblocking(False)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        tls = context.wrap_socket(near, do_handshake_on_connect=False)
        self._closing(tls)
        return tls

    def _fake_modules(self) -> list[Any]:
        """Modules that the guard knows by name. Neither is needed to test that its functions are refused."""
        modules = [ModuleType(name) for name in ("ray", "ray.actor", "torch_xla.core.xla_model")]
        ray, actor, xm = modules
        vars(ray).update(get=lambda ref: ref, put=lambda value: value, wait=lambda refs: (refs, []))
        vars(actor)["ActorMethod"] = type("ActorMethod", (), {"_remote": lambda self: self})
        vars(xm).update(all_reduce=lambda kind, tensors: tensors, rendezvous=lambda tag: tag)
        for module in modules:
            assert module.__name__ not in sys.modules, f"{module.__name__} is loaded: run in a fresh process"
            sys.modules[module.__name__] = module
            self._closers.append(lambda name=module.__name__: sys.modules.pop(name))  # type: ignore[misc]
        return list(modules)

    def _compile(self) -> list[Any]:
        def functional(x: torch.Tensor) -> torch.Tensor:
            return funcol.all_reduce(x, "sum", self.world)

        def in_place(x: torch.Tensor) -> torch.Tensor:
            dist.all_reduce(x)
            return x

        compiled: list[Any] = [torch.compile(f, backend="aot_eager", fullgraph=True) for f in (functional, in_place)]
        for function in compiled:
            function(self.t())
        return compiled

    def _closing(self, *items: Any) -> Any:
        self._closers.extend(item.close for item in items)
        return items

    def t(self, n: int = 4) -> torch.Tensor:
        return torch.ones(n)

    def peer_sends(self, tag: int, *tensors: torch.Tensor) -> None:
        for tensor in tensors:
            self._kept += [tensor, self.peer.send([tensor], 0, tag)]

    def peer_sends_object(self, obj: object) -> None:
        data, size = distributed_c10d._object_to_tensor(obj, torch.device("cpu"), self.pair)
        self.peer_sends(0, size, data)

    def peer_receives(self, tag: int, *buffers: torch.Tensor) -> None:
        for buffer in buffers:
            self._kept += [buffer, self.peer.recv([buffer], 0, tag)]

    def peer_receives_object(self, obj: object) -> None:
        data, size = distributed_c10d._object_to_tensor(obj, torch.device("cpu"), self.pair)
        self.peer_receives(0, torch.empty_like(size), torch.empty_like(data))

    def close(self) -> None:
        while self._closers:
            self._closers.pop()()
        self._kept.clear()


def in_thread(start: Callable[[Callable[[], None]], object], function: Callable[[], object]) -> None:
    """Run `function` in the thread that `start` starts or finds; raise here what it raised there."""
    done = threading.Event()
    errors: list[BaseException] = []

    def body() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    start(body)
    assert done.wait(20), "the thread did not finish"
    if errors:
        raise errors[0]
