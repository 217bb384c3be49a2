"""Backends whose ranks say in files of the folder TEST_SIGNALS how many forward passes each of them has begun."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

from hal.testing.null import NullBackend, NullRunner
from runners.cpu import CpuBackend
from runners.cpu.runner import CpuModelRunner


def signal(rank: int) -> None:
    with (Path(os.environ["TEST_SIGNALS"]) / str(rank)).open("a") as file:
        file.write(".")


def begun(folder: Path, rank: int) -> int:
    file = folder / str(rank)
    return file.stat().st_size if file.exists() else 0


def wait_for_forward(folder: Path, world: int, count: int) -> None:
    """Until every rank has begun `count` forward passes."""
    deadline = time.monotonic() + 60
    while min(begun(folder, rank) for rank in range(world)) < count:
        assert time.monotonic() < deadline, "no forward pass begins before the masks are there"
        time.sleep(0.001)


class CpuSignals(CpuModelRunner):
    def forward(self, *args: Any) -> Any:
        signal(self.config.topology.rank)
        return super().forward(*args)

    def warmup(self, *args: Any) -> None:
        pass


class NullSignals(NullRunner):
    def execute_forward(self, *args: Any) -> Any:
        signal(self.config.topology.rank)
        return super().execute_forward(*args)


class NullInOnePart(NullRunner):
    """It knows no parts of a step, so a step in two phases is executed when all has arrived."""

    def execute_model(self, *args: Any) -> Any:
        signal(self.config.topology.rank)
        return super().execute_model(*args)


class NullFails(NullRunner):
    def execute_sampling(self, forwarded: torch.Tensor, model_input: Any) -> Any:
        if self.config.topology.rank == 0 and model_input.token_mask is not None and len(forwarded) == 1:
            raise KeyError("planted")
        return super().execute_sampling(forwarded, model_input)


class _Cpu(CpuBackend):
    def make_runner(self, *args: Any) -> CpuSignals:
        return CpuSignals(*args)


class _Null(NullBackend):
    runner: type[NullRunner]

    def __init__(self, runner: type[NullRunner]) -> None:
        self.runner = runner

    def make_runner(self, *args: Any) -> NullRunner:
        return self.runner(*args)


cpu, null, one_part, fails = _Cpu(), _Null(NullSignals), _Null(NullInOnePart), _Null(NullFails)
