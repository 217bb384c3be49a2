"""A vendor's collectives, for ranks that are threads. Their groups do what NCCL's do and gloo's do not: an operation
ends once all its ranks have issued theirs, and after those before it; what is sent is read then; an abort ends what
waits, and nobody is told that it did not do its work. The device is the host: who issues an operation on the current
stream waits in it.
"""

from __future__ import annotations

import functools
import itertools
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch._C._distributed_c10d import ErrorType

from hal.contracts.device import Collectives, DeviceRuntime
from hal.testing.null import NullBackend


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

    def broadcast(self, tensors: list[torch.Tensor], options: Any) -> Work | None:
        if options.asyncOp:
            return self._copied("collective", tensors[0], options.rootRank, self.size - 1)
        self._together("broadcast", tensors[0], options, lambda parts: tensors[0].copy_(parts[options.rootRank]))
        return None

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

    def _reduce_scatter_base(self, into: torch.Tensor, tensor: torch.Tensor, options: Any) -> None:
        self._together("reduce_scatter", tensor, options, lambda parts: into.copy_(functools.reduce(
            torch.add, parts)[self.rank]))

    def alltoall_base(self, into: torch.Tensor, tensor: torch.Tensor, received: list[int], sent: list[int],
                      options: Any) -> None:
        """What each rank sends lies at its end: ranks may send different sizes."""
        assert sum(sent) == len(tensor) and sum(received) == len(into)
        cut = torch.split(tensor, sent)
        self._issue_together("alltoall", list(cut), options, lambda parts: into.copy_(torch.cat(
            [part[self.rank] for part in parts])))

    def _together(self, kind: str, tensor: torch.Tensor, options: Any, use: Callable[[list[Any]], Any]) -> None:
        assert tensor.is_contiguous()
        self._issue_together((kind, tensor.shape), tensor.clone(), options, use)

    def _issue_together(self, kind: Any, given: Any, options: Any, use: Callable[[list[Any]], Any]) -> None:
        """On the current stream."""
        assert not options.asyncOp and not self.small

        def finish(here: dict[int, Any], read: set[int]) -> bool:
            if len(here) == self.size and self.rank not in read:
                assert len({what for what, _ in here.values()}) == 1, "ranks differ in their order"
                use([here[rank][1] for rank in range(self.size)])
                read.add(self.rank)
            return self.rank in read

        self._issue("collective", (kind, given), finish).wait()  # type: ignore[arg-type]

    def get_error(self) -> Any:
        return self.error

    def abort(self) -> None:
        assert not self.issuing or not self.queue.is_set(), "an abort frees what issuing an operation uses"
        self.aborted = True
        self.graphs.wait()


class StandIn(Collectives):
    """Attributes: made: all groups, as they are made."""

    def __init__(self) -> None:
        super().__init__("stand-in", on_device=True)
        self.made: list[Group] = []

    def process_group(self, store: Any, rank: int, size: int, timeout: timedelta, control: bool = False) -> Any:
        if rank == 0:
            store.set("board", str(next(_numbers)))
        board = bytes(store.get("board"))  # waits for rank 0, which may need the lock meanwhile
        with Group.lock:
            group = Group(_boards[board], rank, size, control)
        self.made.append(group)
        return group


class HostRuntime(DeviceRuntime):
    """Attributes: capture: whether the current stream is being captured."""

    capture = False

    def capturing(self, device: torch.device) -> bool:
        return self.capture


class StandInBackend(NullBackend):
    """A device with collectives of its own, which workers/ know by its Backend alone."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: StandIn = StandIn()
        self.runtime: HostRuntime = HostRuntime()


_numbers = itertools.count()
_boards: dict[bytes, Any] = defaultdict(lambda: defaultdict(lambda: ({}, set())))
