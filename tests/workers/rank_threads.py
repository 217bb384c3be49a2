"""Ranks as threads of one process: links need no more, and a process takes a second to start."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

R = TypeVar("R")
_HANGS = 120.0  # seconds; ranks that join a Ray, or are many on few cores, take a while


def on_ranks(world: int, call: Callable[[int, Any], R], store: Any = None) -> list[R]:
    """What `call(rank, store)` returns on each rank. The first error is raised when all have ended."""
    store = dist.HashStore() if store is None else store
    results: list[Any] = [None] * world
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = call(rank, store)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + _HANGS
    for thread in threads:
        thread.join(max(end - time.monotonic(), 0))
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "a rank hangs"
    return results
