"""What the guard costs: the phases of a step, and what each tier adds to a collective, a store access and a socket.
And a span for profilers that is off (hal.profiling).

    OMP_NUM_THREADS=1 python benchmarks/guard_cost.py

One run; tiers are interleaved, since a shared machine drifts. A gloo group of one rank: what is added is Python and
does not depend on the group. Needs hal to be importable (pip install -e .).
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol

from hal.guard import Phase, data_plane, install, phase, uninstall
from hal.profiling import span

Function = Callable[[], object]
PREPARE, EXECUTE, WORKER = Phase.PREPARE, Phase.EXECUTE, Phase.WORKER
TIERS: dict[str, bool | None] = {"none": None, "always": False, "strict": True}


def ns(function: Function, calls: int) -> float:
    start = time.perf_counter_ns()
    for _ in range(calls):
        function()
    return (time.perf_counter_ns() - start) / calls


def enter(step: Phase) -> Function:
    def run() -> None:
        with phase(step, 0):
            pass

    return run


def whole_step() -> None:
    with phase(PREPARE, 0):
        pass
    with phase(WORKER, 0):
        pass
    with phase(EXECUTE, 0):
        pass


def communicator() -> None:
    with data_plane("all_reduce"):
        pass


def span_off() -> None:
    with span("execute"):
        pass


def phases() -> None:
    rows: dict[str, Function] = {
        "a call of nothing, included below": lambda: None,
        "prepare": enter(PREPARE),
        "worker": enter(WORKER),
        "execute": enter(EXECUTE),
        "the three of a step": whole_step,
        "data_plane in execute": communicator,
        "a profiler's span, off": span_off,
    }
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(40):
        for name, function in rows.items():
            with phase(EXECUTE, 0):
                times[name].append(ns(function, 5000))
    print("\nenter + exit, ns                         best    median")
    for name, values in times.items():
        print(f"  {name:<34}{min(values):>8.0f}  {statistics.median(values):>8.0f}")


def operations() -> None:
    tensor = torch.ones(8)
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    group = dist.group.WORLD
    near, far = socket.socketpair()

    def functional() -> object:
        return torch.ops._c10d_functional.wait_tensor(funcol.all_reduce(tensor, "sum", group))

    def loopback() -> None:
        near.send(b"x")
        far.recv(1)

    rows: dict[str, Function] = {
        "all_reduce": lambda: dist.all_reduce(tensor),
        "functional all_reduce": functional,
        "Store.add": lambda: store.add("n", 1),
        "socket send + recv": loopback,
    }
    times: dict[tuple[str, str], list[float]] = {(name, tier): [] for name in rows for tier in TIERS}
    for _ in range(25):
        for tier, strict in TIERS.items():
            if strict is not None:
                install(strict=strict)
            with phase(EXECUTE, 0), data_plane("benchmark"):
                for name, function in rows.items():
                    times[name, tier].append(ns(function, 200))
            uninstall()
    print("\nper call, us, medians            unguarded  + always  + strict")
    for name in rows:
        base, always, strict_ = (statistics.median(times[name, tier]) / 1e3 for tier in TIERS)
        print(f"  {name:<30}{base:>10.2f}{always - base:>10.2f}{strict_ - base:>10.2f}")
    dist.destroy_process_group()
    near.close()
    far.close()


if __name__ == "__main__":
    print(f"torch {torch.__version__}")
    phases()
    operations()
