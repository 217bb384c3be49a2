"""What benchmarks over several processes share: the same script runs again as each other rank."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

from workers.links.groups import Store, dist


def on_ranks(run: Callable[..., None], world: int, *arguments: Any) -> None:
    """`run(rank, world, store, *arguments)` here as rank 0, and in processes of the script `run` is in as the others;
    its `main` begins with `as_rank`. One thread each; arguments arrive there as strings."""
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")
    folder = tempfile.TemporaryDirectory()
    store = dist.FileStore(f"{folder.name}/store", world)
    others = [subprocess.Popen([sys.executable, sys.argv[0], "--rank", str(rank), str(world), folder.name,
                                *map(str, arguments)]) for rank in range(1, world)]
    try:
        run(0, world, store, *arguments)
        for process in others:
            process.wait(30)
    finally:
        for process in others:
            process.kill()
        folder.cleanup()


def as_rank(run: Callable[..., None]) -> bool:
    """Whether this process is another rank; if so, it has run."""
    if sys.argv[1:2] != ["--rank"]:
        return False
    rank, world = map(int, sys.argv[2:4])
    store: Store = dist.FileStore(f"{sys.argv[4]}/store", world)
    run(rank, world, store, *sys.argv[5:])
    sys.stdout.flush()
    os._exit(0)


def quantiles(us: Iterable[float]) -> tuple[float, float]:
    """p50 and p99."""
    ordered = sorted(us)
    return ordered[len(ordered) // 2], ordered[min(int(len(ordered) * 0.99), len(ordered) - 1)]
