"""A step's message through Ray: from the driver's start to the rank that holds its parts.

    python benchmarks/ray_plane.py

One receiver, 72 KB. The control plane "ray" is two calls of an actor: the driver's, and the rank's, which is answered.
Beside it what Ray does for an actor, which a rank is not: one call, and a compiled graph. Mechanisms take turns. Hot:
the next message follows as soon as the last was acknowledged (through a pipe); paced: at 100 Hz.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from time import perf_counter, sleep

import numpy as np
import torch
from ranks import as_rank, on_ranks, quantiles

from hal.config import Topology
from hal.testing.null import backend as null
from workers.control.planes import make_plane
from workers.links.groups import Store

SIZE, ROUNDS, HOT, PACED, WARM = 73_728, 4, 80, 40, 5


class Receiver:
    """An actor that acknowledges what it gets, once it has copied it like a rank does."""

    def __init__(self, fifo: str) -> None:
        self.ack = os.open(fifo, os.O_WRONLY)

    def take(self, content: bytes) -> None:
        np.empty(len(content), np.uint8)[:] = np.frombuffer(content, np.uint8)
        os.write(self.ack, b".")


def run(rank: int, world: int, store: Store, fifo: str) -> None:
    plane = make_plane("ray", Topology(tp=world, rank=rank), store, null, torch.device("cpu"))
    if rank:
        ack = os.open(fifo, os.O_WRONLY)
        while plane.receive():
            os.write(ack, b".")
        return
    import ray  # after the plane: see workers.links.ray_cluster
    from ray.dag import InputNode

    acks = os.open(fifo, os.O_RDWR)
    actor, compiled_for = (ray.remote(Receiver).options(num_cpus=0).remote(fifo) for _ in range(2))
    with InputNode() as content:
        graph = compiled_for.take.bind(content).experimental_compile(_buffer_size_bytes=2 * SIZE)
    data = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)
    times: dict[tuple[str, bool], list[float]] = {}

    def measure(name: str, call: Callable[[], object]) -> None:
        for paced in (False, True):
            for i in range(WARM + (PACED if paced else HOT)):
                if paced:
                    sleep(0.01)
                start = perf_counter()
                result = call()
                os.read(acks, 1)
                if i >= WARM:
                    times.setdefault((name, paced), []).append((perf_counter() - start) * 1e6)
                if result is not None:
                    ray.get(result)

    for _ in range(ROUNDS):
        measure("control plane 'ray'", lambda: plane.broadcast([data]))
        measure("one call of an actor", lambda: actor.take.remote(data.tobytes()))
        measure("a compiled graph", lambda: graph.execute(data.tobytes()))
    graph.teardown()
    plane.broadcast([])
    print(f"\n  {'us':<24}{'hot p50':>10}{'p99':>10}{'paced p50':>12}{'p99':>10}")
    for name in dict.fromkeys(name for name, _ in times):
        (h, h99), (p, p99) = quantiles(times[name, False]), quantiles(times[name, True])
        print(f"  {name:<24}{h:>10.0f}{h99:>10.0f}{p:>12.0f}{p99:>10.0f}")
    plane.close()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.mkfifo(fifo := f"{folder}/acks")
        on_ranks(run, 2, fifo)


if __name__ == "__main__" and not as_rank(run):
    main()
