"""The data plane of one host: all-reduce, all-gather and a pipeline's send + recv, through shared memory and over gloo.

    python benchmarks/collectives.py

One thread a rank; mechanisms take turns within one run. Times are those of rank 0, calls one after another.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from time import perf_counter_ns

import torch
from ranks import as_rank, on_ranks, quantiles

from hal.config import Topology
from hal.contracts.device import GLOO
from hal.contracts.inputs import IntermediateTensors
from hal.schema import Array
from workers.data.axes import ByAxis
from workers.data.process_groups import TorchCommunicator
from workers.data.shared_memory import ShmCommunicator
from workers.links.groups import Store, dist, make_group

ROUNDS, CALLS = 20, 60
SIZES = (4 << 10, 64 << 10, 1 << 20)
Hidden = IntermediateTensors.declare("Hidden", x=Array("bfloat16", "num_tokens", 1024))


def run(rank: int, world: int, store: Store) -> None:
    topology, device = Topology(tp=world, rank=rank), torch.device("cpu")
    comms = {"shm": ShmCommunicator(topology, device, store),
             "gloo": over_gloo(topology, device, store)}
    cases: dict[tuple[str, int, str], Callable[[], object]] = {}
    for size in SIZES:
        for name, comm in comms.items():
            x = torch.zeros(size // 2, dtype=torch.bfloat16)
            cases["all_reduce", size, name] = lambda comm=comm, x=x: comm.all_reduce(x)  # type: ignore[misc]
            y = torch.zeros(size // 2 // world, dtype=torch.bfloat16)
            cases["all_gather", size, name] = lambda comm=comm, y=y: comm.all_gather(y)  # type: ignore[misc]
    if world == 2:
        topology, store = Topology(pp=2, rank=rank), dist.PrefixStore("pp", store)
        pipes = {"shm": ShmCommunicator(topology, device, store),
                 "gloo": over_gloo(topology, device, store)}
        for size in SIZES:
            for name, comm in pipes.items():
                cases["send + recv", size, name] = stage(comm, size // 2048, rank)
    times: dict[tuple[str, int, str], list[float]] = {case: [] for case in cases}
    for _ in range(ROUNDS):
        for case, call in cases.items():
            comms["gloo"].all_reduce(torch.zeros(1))
            for i in range(CALLS + 5):
                start = perf_counter_ns()
                call()
                if i >= 5:
                    times[case].append((perf_counter_ns() - start) / 1e3)
    if rank == 0:
        print(f"\n{world} ranks, us       bytes        shm p50 / p99       gloo p50 / p99")
        for what, size, name in cases:
            if name == "shm":
                shm, gloo = (quantiles(times[what, size, n]) for n in ("shm", "gloo"))
                print(f"  {what:<14}{size:>9}{shm[0]:>13.1f} /{shm[1]:>8.1f}{gloo[0]:>13.1f} /{gloo[1]:>8.1f}")
    comms["gloo"].all_reduce(torch.zeros(1))


def over_gloo(topology: Topology, device: torch.device, store: Store) -> TorchCommunicator:
    return TorchCommunicator(topology, device, ByAxis(
        topology, lambda axis: make_group(GLOO, store, axis.name, axis.rank, axis.size)))


def stage(comm: ShmCommunicator | TorchCommunicator, tokens: int, rank: int) -> Callable[[], object]:
    """Nothing comes back: the sender waits when it is too far ahead, so this is what a transfer takes."""
    x = Hidden(x=torch.zeros(tokens, 1024, dtype=torch.bfloat16))  # type: ignore[call-arg]
    return lambda: comm.recv(Hidden, {"num_tokens": tokens}) if rank else comm.send(x)


if __name__ == "__main__" and not as_rank(run):
    for world in map(int, sys.argv[1:] or (2, 3)):
        on_ranks(run, world)
