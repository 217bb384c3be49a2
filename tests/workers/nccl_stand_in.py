"""Groups for ranks that are threads, which do what NCCL's do and gloo's do not: an operation ends once all its ranks
have issued theirs, and after those before it; what is sent is read then; an abort ends what waits, and nobody is told
that it did not do its work. The device is the host: who issues an operation on the current stream waits in it.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import ErrorType

from hal.schema.layout import aligned_bytes
from workers.control import collectives as collective_plane
from workers.executors import connections as links

make_gloo = links.make_group


class Work:
    def __init__(self, group: Group, finish: Callable[[], bool]) -> None:
        self.group, self.finish, self.done = group, finish, False
        self.before = group.issued[-1:]

    def is_completed(self) -> bool:
        with self.group.lock:
            if not self.done and all(work.is_completed() for work in self.before):
                self.done = self.finish() or self.group.aborted
            return self.done

    def wait(self) -> None:
        if self.group.small:
            assert self.is_completed(), "NCCL's wait does not hold the host: it was not asked whether this had ended"
        while not self.is_completed():  # the current stream
            time.sleep(1e-3)


class Group:
    """One rank's end.

    Attributes:
        board: by operation and its number, the tensors of ranks that issued it, and who has read.
        small: for a control plane, on streams of its own. graphs: until this is set, an abort does not return.
        issuing: operations that are being issued. error: what NCCL says of itself.
    """

    lock = threading.RLock()

    def __init__(self, board: dict[Any, tuple[dict[int, torch.Tensor], set[int]]], rank: int, size: int,
                 small: bool) -> None:
        self.board, self.rank, self.size, self.small = board, rank, size, small
        self.issued: list[Work] = []
        self.counts: dict[Any, int] = defaultdict(int)
        self.aborted, self.issuing, self.error = False, 0, ErrorType.SUCCESS
        self.graphs, self.queue = threading.Event(), threading.Event()
        self.graphs.set()
        self.queue.set()

    def _issue(self, kind: Any, tensor: torch.Tensor, finish: Callable[[dict[int, Any], set[int]], bool]) -> Work:
        self.issuing += 1
        while not (self.queue.wait(1e-3) or self.aborted):  # full
            pass
        with self.lock:
            self.issuing -= 1
            if self.aborted and self.queue.is_set():
                raise RuntimeError("NCCL communicator was aborted")
            here, read = self.board[kind, self.counts[kind]]
            self.counts[kind] += 1
            here[self.rank] = tensor
            work = Work(self, lambda: finish(here, read))
            self.issued.append(work)
            return work

    def _copied(self, kind: Any, tensor: torch.Tensor, root: int, readers: int) -> Work:
        def finish(here: dict[int, Any], read: set[int]) -> bool:
            if self.rank == root:  # when the others have read
                return len(read) == readers
            if len(here) == readers + 1:
                assert here[root].shape == tensor.shape
                tensor.copy_(here[root])
                read.add(self.rank)
            return self.rank in read

        return self._issue(kind, tensor, finish)

    def broadcast(self, tensors: list[torch.Tensor], options: Any) -> Work:
        return self._copied("collective", tensors[0], options.rootRank, self.size - 1)

    def send(self, tensors: list[torch.Tensor], to: int, tag: int) -> Work:
        assert to != self.rank and to < self.size
        return self._copied((self.rank, to), tensors[0], self.rank, 1)

    def recv(self, tensors: list[torch.Tensor], source: int, tag: int) -> Work:
        return self._copied((source, self.rank), tensors[0], source, 1)

    def allreduce(self, tensors: list[torch.Tensor], options: Any) -> None:
        self._together("allreduce", tensors[0], options, lambda parts: tensors[0].copy_(functools.reduce(
            torch.add, parts)))

    def _allgather_base(self, into: torch.Tensor, tensor: torch.Tensor, options: Any) -> None:
        self._together("allgather", tensor, options, lambda parts: into.copy_(torch.cat(parts)))

    def _together(self, kind: str, tensor: torch.Tensor, options: Any, use: Callable[[list[Any]], Any]) -> None:
        """On the current stream."""
        assert not options.asyncOp and not self.small and tensor.is_contiguous()

        def finish(here: dict[int, Any], read: set[int]) -> bool:
            if len(here) == self.size and self.rank not in read:
                assert len({(what, part.shape) for what, part in here.values()}) == 1, "ranks differ in their order"
                use([here[rank][1] for rank in range(self.size)])
                read.add(self.rank)
            return self.rank in read

        self._issue("collective", (kind, tensor.clone()), finish).wait()  # type: ignore[arg-type]

    def get_error(self) -> Any:
        return self.error

    def abort(self) -> None:
        assert not self.issuing or not self.queue.is_set(), "an abort frees what issuing an operation uses"
        self.aborted = True
        self.graphs.wait()


def install(monkeypatch: pytest.MonkeyPatch) -> list[Group]:
    """The groups, as they are made."""
    boards: dict[Any, Any] = defaultdict(lambda: defaultdict(lambda: ({}, set())))
    made: list[Group] = []

    def make_group(kind: str, store: Any, name: str, rank: int, size: int, small: bool = False) -> Any:
        if kind == "gloo":
            return make_gloo(kind, store, name, rank, size)
        with Group.lock:
            made.append(Group(boards[id(store), name], rank, size, small))
            return made[-1]

    for module in (collective_plane, links):
        monkeypatch.setattr(module, "make_group", make_group)
    monkeypatch.setattr(collective_plane, "_pinned", aligned_bytes)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Idle())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return made


class Idle:
    def query(self) -> bool:
        return True
