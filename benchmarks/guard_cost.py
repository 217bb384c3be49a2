"""What the guard costs: entering and leaving the three phases of a step, and one collective with and without it.

    python benchmarks/guard_cost.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from hal import guard
from hal.guard import Phase, phase


def per_call_us(function: Callable[[], object], rounds: int = 50, calls: int = 2000) -> float:
    """Median over rounds of the mean time of a call."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter_ns()
        for _ in range(calls):
            function()
        times.append((time.perf_counter_ns() - start) / calls / 1e3)
    return statistics.median(times)


def step() -> None:
    with phase(Phase.PREPARE, 0):
        pass
    with phase(Phase.WORKER, 0):
        pass
    with phase(Phase.EXECUTE, 0):
        pass


def main() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    tensor = torch.ones(8)
    print(f"torch {torch.__version__}; microseconds, medians")
    print(f"{'three phases of a step':<40}{per_call_us(step):8.2f}")
    for label, strict in (("no guard", None), ("always-on tier", False), ("strict tier", True)):
        if strict is not None:
            guard.install(strict=strict)
        print(f"{'all_reduce, world size 1, ' + label:<40}{per_call_us(lambda: dist.all_reduce(tensor), 20, 300):8.2f}")
    guard.uninstall()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
