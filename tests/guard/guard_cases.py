"""Every operation that the guard is tested with and the tier that must refuse it: docs/guard.md's table."""

from __future__ import annotations

import _thread
import asyncio
import ctypes
import itertools
import multiprocessing.connection
import os
import select
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from guard_env import TAG, TIMEOUT, Env, in_thread

Act = Callable[[Env], object]
Tier = Literal["always", "strict", "none"]


@dataclass(frozen=True)
class Case:
    family: str
    name: str
    tier: Tier  # the lowest tier that refuses it
    operation: str  # what GuardError.operation must say
    act: Act
    setup: Act | None = None  # runs outside any phase, before each attempt
    errors: tuple[type[Exception], ...] = ()  # what it may raise once let through (no such device, no peer, ...)

    @property
    def missing(self) -> str | None:
        """The public function this torch does not have, if any."""
        prefix, _, name = self.operation.rpartition(".")
        return self.operation if prefix == "torch.distributed" and not hasattr(dist, name) else None


def _wait(value: Any) -> Any:
    return torch.ops._c10d_functional.wait_tensor(value)


CASES: list[Case] = []
KEYS = itertools.count()  # a key serves once


def _family(title: str, tier: Tier, prefix: str = "") -> Callable[..., None]:
    def add(name: str, act: Act, setup: Act | None = None, *, operation: str | None = None,
            errors: tuple[type[Exception], ...] = ()) -> None:  # fmt: skip
        CASES.append(Case(title, name, tier, prefix + (operation or name.partition("(")[0]), act, setup, errors))

    return add


c10d = _family("torch.distributed", "always", "torch.distributed.")
c10d("all_reduce", lambda e: dist.all_reduce(e.t()))
c10d("all_reduce(async_op=True)", lambda e: dist.all_reduce(e.t(), async_op=True).wait())
c10d("all_reduce_coalesced", lambda e: dist.all_reduce_coalesced([e.t()]))
c10d("all_gather", lambda e: dist.all_gather([e.t()], e.t()))
c10d("all_gather_coalesced", lambda e: dist.all_gather_coalesced([[e.t()]], [e.t()]))
c10d("all_gather_into_tensor", lambda e: dist.all_gather_into_tensor(e.t(), e.t()))
c10d("all_gather_single", lambda e: dist.all_gather_single(e.t(), e.t()))
c10d("all_to_all", lambda e: dist.all_to_all([e.t()], [e.t()]), errors=(RuntimeError,))
c10d("all_to_all_single", lambda e: dist.all_to_all_single(e.t(), e.t()))
c10d("barrier", lambda e: dist.barrier())
c10d("barrier(async_op=True)", lambda e: dist.barrier(async_op=True).wait())
c10d("monitored_barrier", lambda e: dist.monitored_barrier())
c10d("broadcast", lambda e: dist.broadcast(e.t(), 0))
c10d("broadcast(async_op=True)", lambda e: dist.broadcast(e.t(), 0, async_op=True).wait())
c10d("gather", lambda e: dist.gather(e.t(), [e.t()]))
c10d("reduce", lambda e: dist.reduce(e.t(), 0))
c10d("reduce_scatter", lambda e: dist.reduce_scatter(e.t(), [e.t()]))
c10d("reduce_scatter_single", lambda e: dist.reduce_scatter_single(e.t(), e.t()))
c10d("reduce_scatter_tensor", lambda e: dist.reduce_scatter_tensor(e.t(), e.t()))
c10d("scatter", lambda e: dist.scatter(e.t(), [e.t()]))

objects = _family("torch.distributed, objects", "always", "torch.distributed.")
objects("all_gather_object", lambda e: dist.all_gather_object([None], "x"))
objects("broadcast_object_list", lambda e: dist.broadcast_object_list(["x"], 0))
objects("gather_object", lambda e: dist.gather_object("x", [None]))
objects("scatter_object_list", lambda e: dist.scatter_object_list([None], ["x"]))
objects("send_object_list", lambda e: dist.send_object_list(["x"], 1, e.pair), lambda e: e.peer_receives_object("x"))
objects("recv_object_list", lambda e: dist.recv_object_list([None], 1, e.pair), lambda e: e.peer_sends_object("x"))

p2p = _family("torch.distributed, point to point", "always", "torch.distributed.")
p2p("send", lambda e: dist.send(e.t(), 1, e.pair, TAG), lambda e: e.peer_receives(TAG, e.t()))
p2p("recv", lambda e: dist.recv(e.t(), 1, e.pair, TAG), lambda e: e.peer_sends(TAG, e.t()))
p2p("isend", lambda e: dist.isend(e.t(), 1, e.pair, TAG).wait(), lambda e: e.peer_receives(TAG, e.t()))
p2p("irecv", lambda e: dist.irecv(e.t(), 1, e.pair, TAG).wait(), lambda e: e.peer_sends(TAG, e.t()))
p2p("batch_isend_irecv(P2POp)",
    lambda e: dist.batch_isend_irecv([dist.P2POp(dist.isend, e.t(), 1, e.pair, TAG)])[0].wait(),
    lambda e: e.peer_receives(TAG, e.t()))  # fmt: skip

groups = _family("torch.distributed, groups", "always", "torch.distributed.")
groups("init_process_group", lambda e: dist.init_process_group("gloo", store=e.store, rank=0, world_size=1),
       errors=(ValueError,))  # fmt: skip
groups("new_group", lambda e: dist.new_group([0]))
groups("new_subgroups", lambda e: dist.new_subgroups(1))
groups("new_subgroups_by_enumeration", lambda e: dist.new_subgroups_by_enumeration([[0]]))
groups("split_group", lambda e: dist.split_group(e.world, [[0]]), errors=(RuntimeError,))
groups("shrink_group", lambda e: dist.shrink_group([]), errors=(ValueError,))
groups("destroy_process_group", lambda e: dist.destroy_process_group(e.spare),
       lambda e: setattr(e, "spare", dist.new_group([0])))  # fmt: skip
groups("_verify_params_across_processes", lambda e: dist._verify_params_across_processes(e.world, [e.t()], None))
groups("_broadcast_coalesced", lambda e: dist._broadcast_coalesced(e.world, [e.t()], 500, 0))

made = _family("constructors and copies that connect", "always")
made("TCPStore()", lambda e: dist.TCPStore("127.0.0.1", 0, 1, True, TIMEOUT), operation="TCPStore.__init__")
made("FileStore()", lambda e: dist.FileStore(e.file_store.path, 1), operation="FileStore.__init__")
made("TCPStore.clone", lambda e: e.tcp_store.clone(), operation="Store.clone")
made("PrefixStore.clone", lambda e: e.prefix_store.clone(), operation="Store.clone")
made("ProcessGroupGloo()",
     lambda e: dist.ProcessGroupGloo(dist.PrefixStore(f"new{next(KEYS)}", e.store), 0, 1, TIMEOUT),
     operation="ProcessGroupGloo.__init__")  # fmt: skip

saved = _family("references saved before install()", "always", "torch.distributed.")
saved("all_reduce", lambda e: e.saved_all_reduce(e.t()))
saved("all_reduce(async_op=True)", lambda e: e.saved_all_reduce(e.t(), async_op=True).wait())
saved("new_group", lambda e: e.saved_new_group([0]))

methods = _family("ProcessGroup and Backend methods", "always")
methods("ProcessGroup.allreduce", lambda e: e.world.allreduce([e.t()]).wait())
methods("ProcessGroup.broadcast", lambda e: e.world.broadcast(e.t(), 0).wait())
methods("ProcessGroup.barrier", lambda e: e.world.barrier().wait())
methods("ProcessGroup.send", lambda e: e.pair.send([e.t()], 1, TAG).wait(), lambda e: e.peer_receives(TAG, e.t()))
methods("ProcessGroup.recv", lambda e: e.pair.recv([e.t()], 1, TAG).wait(), lambda e: e.peer_sends(TAG, e.t()))
methods("Backend.allreduce", lambda e: e.backend.allreduce([e.t()]).wait())
methods("Backend.allgather", lambda e: e.backend.allgather([[e.t()]], [e.t()]).wait())
methods("Backend.barrier", lambda e: e.backend.barrier().wait())
methods("_StoreCollectives.barrier", lambda e: e.control.barrier(f"b{next(KEYS)}", TIMEOUT, True),
        operation="_ControlCollectives.barrier")  # fmt: skip

stores = _family("stores", "always")
stores("HashStore.set", lambda e: e.store.set("k", "v"), operation="Store.set")
stores("HashStore.get", lambda e: e.store.get("k"), lambda e: e.store.set("k", "v"), operation="Store.get")
stores("HashStore.add", lambda e: e.store.add("n", 1), operation="Store.add")
stores("HashStore.wait", lambda e: e.store.wait(["k"]), lambda e: e.store.set("k", "v"), operation="Store.wait")
stores("HashStore.check", lambda e: e.store.check(["k"]), operation="Store.check")
stores("HashStore.compare_set", lambda e: e.store.compare_set("c", "", "v"), operation="Store.compare_set")
stores("HashStore.delete_key", lambda e: e.store.delete_key("d"), operation="Store.delete_key")
stores("HashStore.num_keys", lambda e: e.store.num_keys(), operation="Store.num_keys")
stores("HashStore.append", lambda e: e.store.append("a", "v"), operation="Store.append")
stores("HashStore.multi_set", lambda e: e.store.multi_set(["k"], ["v"]), operation="Store.multi_set")
stores("HashStore.multi_get", lambda e: e.store.multi_get(["k"]), lambda e: e.store.set("k", "v"),
       operation="Store.multi_get")  # fmt: skip
stores("TCPStore.set", lambda e: e.tcp_store.set("k", "v"), operation="Store.set")
stores("TCPStore.get", lambda e: e.tcp_store.get("k"), lambda e: e.tcp_store.set("k", "v"), operation="Store.get")
stores("FileStore.set", lambda e: e.file_store.set("k", "v"), operation="Store.set")
stores("FileStore.add", lambda e: e.file_store.add("n", 1), operation="Store.add")
stores("PrefixStore.set", lambda e: e.prefix_store.set("k", "v"), operation="Store.set")
stores("PrefixStore.get", lambda e: e.prefix_store.get("k"), lambda e: e.prefix_store.set("k", "v"),
       operation="Store.get")  # fmt: skip

tasks = _family("asyncio, which copies contexts by itself", "always", "torch.distributed.")


async def _task(e: Env) -> None:
    await asyncio.create_task(_all_reduce(e))


async def _all_reduce(e: Env) -> None:
    dist.all_reduce(e.t())


tasks("a task: all_reduce", lambda e: asyncio.run(_task(e)), operation="all_reduce")
tasks("to_thread: all_reduce", lambda e: asyncio.run(asyncio.to_thread(lambda: dist.all_reduce(e.t()))),
      operation="all_reduce")

fn = "torch.distributed._functional_collectives."
functional = _family("functional collectives", "strict")
functional("all_reduce", lambda e: _wait(funcol.all_reduce(e.t(), "sum", e.world)), operation=fn + "all_reduce")
functional("all_gather_tensor", lambda e: _wait(funcol.all_gather_tensor(e.t(), 0, e.world)),
           operation=fn + "all_gather_tensor")  # fmt: skip
functional("reduce_scatter_tensor", lambda e: _wait(funcol.reduce_scatter_tensor(e.t(), "sum", 0, e.world)),
           operation=fn + "reduce_scatter_tensor")  # fmt: skip
functional("all_to_all_single", lambda e: _wait(funcol.all_to_all_single(e.t(), [4], [4], e.world)),
           operation=fn + "all_to_all_single")  # fmt: skip
functional("broadcast", lambda e: _wait(funcol.broadcast(e.t(), 0, e.world)), operation=fn + "broadcast")

ops = _family("operators", "strict")
ops("_c10d_functional::all_reduce",
    lambda e: _wait(torch.ops._c10d_functional.all_reduce(e.t(), "sum", e.world.group_name)))  # fmt: skip
ops("c10d::barrier", lambda e: torch.ops.c10d.barrier(e.t(), e.world.boxed(), [], timeout=20000))
ops("symm_mem::one_shot_all_reduce", lambda e: torch.ops.symm_mem.one_shot_all_reduce(e.t(), "sum", e.world.group_name),
    errors=(NotImplementedError,))  # fmt: skip

compiled = _family("inside torch.compile", "strict")
compiled("functional all_reduce", lambda e: e.compiled_functional(e.t()), operation="_c10d_functional::all_reduce")
compiled("all_reduce", lambda e: e.compiled_all_reduce(e.t()), operation="_c10d_functional::all_reduce")

sockets = _family("sockets, old and new", "strict", "socket.")
sockets("send", lambda e: e.near.send(b"x"))
sockets("sendall", lambda e: e.near.sendall(b"x"))
sockets("sendmsg", lambda e: e.near.sendmsg([b"x"]))
sockets("sendto", lambda e: e.datagram.sendto(b"x", e.far_datagram.getsockname()))
sockets("recv", lambda e: e.near.recv(1), lambda e: os.write(e.far.fileno(), b"x"))
sockets("recv_into", lambda e: e.near.recv_into(bytearray(1)), lambda e: os.write(e.far.fileno(), b"x"))
sockets("recvmsg", lambda e: e.near.recvmsg(1), lambda e: os.write(e.far.fileno(), b"x"))
sockets("recvfrom", lambda e: e.datagram.recvfrom(1), lambda e: e.far_datagram.sendto(b"x", e.datagram.getsockname()))
sockets("connect", lambda e: socket.create_connection(e.listener.getsockname()).close())
sockets("accept", lambda e: e.listener.accept()[0].close(),
        lambda e: socket.create_connection(e.listener.getsockname()).close())  # fmt: skip
tls = _family("TLS sockets", "strict", "ssl.")
tls("SSLSocket.send", lambda e: e.tls.send(b"x"), errors=(ssl.SSLError,))
tls("SSLSocket.recv", lambda e: e.tls.recv(1), errors=(ssl.SSLError,))

pipes = _family("multiprocessing pipes", "strict", "Connection.")
pipes("send", lambda e: e.conn.send("x"))
pipes("send_bytes", lambda e: e.conn.send_bytes(b"x"))
pipes("recv", lambda e: e.conn.recv(), lambda e: e.far_conn.send("x"))
pipes("recv_bytes", lambda e: e.conn.recv_bytes(), lambda e: e.far_conn.send("x"))
pipes("recv_bytes_into", lambda e: e.conn.recv_bytes_into(bytearray(64)), lambda e: e.far_conn.send("x"))
pipes("poll", lambda e: e.conn.poll())
queues = _family("multiprocessing queues", "strict", "multiprocessing.")
queues("Queue.put", lambda e: e.queue.put("x"))
queues("Queue.get", lambda e: e.queue.get(timeout=20), lambda e: e.queue.put("x"))
queues("JoinableQueue.put", lambda e: e.joinable.put("x"))
queues("SimpleQueue.put", lambda e: e.simple.put("x"))
queues("SimpleQueue.get", lambda e: e.simple.get(), lambda e: e.simple.put("x"))

ray = _family("Ray", "strict", "ray.")
ray("get", lambda e: e.ray.get("x"))
ray("put", lambda e: e.ray.put("x"))
ray("wait", lambda e: e.ray.wait(["x"]))
ray("actor.ActorMethod._remote", lambda e: e.actor.ActorMethod()._remote())
xla = _family("torch_xla.core.xla_model", "strict", "torch_xla.core.xla_model.")
xla("all_reduce", lambda e: e.xm.all_reduce("sum", [e.t()]))
xla("rendezvous", lambda e: e.xm.rendezvous("tag"))

threads = _family("threads", "strict", "torch.distributed.")
threads("started in the phase: all_reduce",
        lambda e: in_thread(lambda body: threading.Thread(target=body).start(), lambda: dist.all_reduce(e.t())),
        operation="all_reduce")  # fmt: skip
threads("ThreadPoolExecutor.submit: all_reduce", lambda e: e.executor.submit(dist.all_reduce, e.t()).result(),
        operation="all_reduce")  # fmt: skip

unseen = _family("not seen", "none")


def _exit_code(code: int) -> None:
    """Through a process of its own, which inherits this process by fork."""
    child = multiprocessing.get_context("fork").Process(target=os._exit, args=(code,))
    child.start()
    child.join()
    assert child.exitcode == code


libc = ctypes.CDLL(None)
unseen("os.write on a socket's descriptor", lambda e: os.write(e.near.fileno(), b"x"))
unseen("write through ctypes", lambda e: libc.write(e.near.fileno(), b"x", 1))
unseen("os.writev on a socket's descriptor", lambda e: os.writev(e.near.fileno(), [b"x"]))
unseen("os.sendfile to a socket's descriptor", lambda e: os.sendfile(e.near.fileno(), e.file, 0, 1))
unseen("socket.SocketType.send", lambda e: socket.SocketType.send(e.near, b"x"))
unseen("super(socket.socket, s).send", lambda e: super(socket.socket, e.near).send(b"x"))
unseen("a bound socket method saved before install()", lambda e: e.saved_send(b"x"))
unseen("Work.wait on work launched before the phase", lambda e: e.work.wait(),
       lambda e: setattr(e, "work", dist.all_reduce(e.t(), async_op=True)))  # fmt: skip
unseen("_thread.start_new_thread: all_reduce",
       lambda e: in_thread(lambda body: _thread.start_new_thread(body, ()), lambda: dist.all_reduce(e.t())))
unseen("multiprocessing.pool.ThreadPool.apply: all_reduce", lambda e: e.thread_pool.apply(dist.all_reduce, (e.t(),)))
unseen("subprocess.run: its output", lambda e: subprocess.run(["echo", "x"], capture_output=True, check=True))
unseen("multiprocessing.Process: its exit code", lambda e: _exit_code(0))
unseen("select.select on a socket", lambda e: select.select([e.near], [], [], 0))
unseen("multiprocessing.connection.wait", lambda e: multiprocessing.connection.wait([e.conn], 0))

through = _family("let through on purpose", "none")
through("socket.shutdown", lambda e: e.ending.shutdown(socket.SHUT_WR),
        lambda e: setattr(e, "ending", socket.socketpair()[0]))  # fmt: skip
through("socket.create_server: bind and listen", lambda e: socket.create_server(("127.0.0.1", 0)).close())
through("HashStore()", lambda e: dist.HashStore())
through("PrefixStore()", lambda e: dist.PrefixStore("p", e.store))
