"""Groups for ranks that are threads, which do what NCCL's do and gloo's do not: an operation ends once all its ranks
have issued theirs, and after those before it; what is sent is read then; `wait` does not wait. The device is the host.
"""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hal.schema.layout import aligned_bytes
from workers import collective_plane


class Work:
    def __init__(self, group: Group, finish: Callable[[], bool]) -> None:
        self.group, self.finish, self.done = group, finish, False
        self.before = group.issued[-1:]

    def is_completed(self) -> bool:
        with self.group.lock:
            if not self.done and all(work.is_completed() for work in self.before):
                self.done = self.finish()
            return self.done

    def wait(self) -> None:
        assert self.is_completed(), "NCCL's wait does not hold the host: it was not asked whether this had ended"


class Group:
    """One rank's end. `board`: by operation and its number, the tensors of ranks that issued it, and who has read."""

    lock = threading.RLock()

    def __init__(self, board: dict[Any, tuple[dict[int, torch.Tensor], set[int]]], rank: int, size: int) -> None:
        self.board, self.rank, self.size = board, rank, size
        self.issued: list[Work] = []
        self.counts: dict[str, int] = defaultdict(int)
        self.aborted = False

    def _issue(self, kind: str, tensor: torch.Tensor, root: int) -> Work:
        with self.lock:
            here, read = self.board[kind, self.counts[kind]]
            self.counts[kind] += 1
            here[self.rank] = tensor

            def finish() -> bool:
                if self.rank == root:  # when the others have read
                    return read == set(range(self.size)) - {root}
                if len(here) == self.size:
                    assert here[root].shape == tensor.shape
                    tensor.copy_(here[root])
                    read.add(self.rank)
                return self.rank in read

            work = Work(self, finish)
            self.issued.append(work)
            return work

    def broadcast(self, tensors: list[torch.Tensor], options: Any) -> Work:
        return self._issue("broadcast", tensors[0], options.rootRank)

    def send(self, tensors: list[torch.Tensor], to: int, tag: int) -> Work:
        assert self.size == 2 and to == 1 - self.rank
        return self._issue("send", tensors[0], self.rank)

    def recv(self, tensors: list[torch.Tensor], source: int, tag: int) -> Work:
        return self._issue("send", tensors[0], source)

    def abort(self) -> None:
        self.aborted = True


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    boards: dict[Any, Any] = defaultdict(lambda: defaultdict(lambda: ({}, set())))

    def make_group(kind: str, store: Any, name: str, rank: int, size: int, small: bool = False) -> Group:
        assert kind == "nccl" and small
        with Group.lock:
            return Group(boards[id(store), name], rank, size)

    monkeypatch.setattr(collective_plane, "make_group", make_group)
    monkeypatch.setattr(collective_plane, "_pinned", aligned_bytes)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
