"""The CPU's arithmetic with one operation of a step slightly off, and a runner that fails when it is told to."""

from __future__ import annotations

import os
from typing import Any

import torch

from hal.contracts.backend import Capabilities
from hal.models.ops import Ops
from hal.paged.attention import PagedAttention
from hal.paged.runner import PagedModelRunner
from runners.cpu import CpuBackend


def plant() -> tuple[str, int]:
    """PLANT="linear 3": the fourth linear of each step."""
    op, _, number = os.environ.get("PLANT", "nothing 0").partition(" ")
    return op, int(number)


def applies(positions: torch.Tensor) -> bool:
    """PLANT_WHEN="position 24": only steps that reach it; "tokens 5": only steps that compute at least so many."""
    what, _, number = os.environ.get("PLANT_WHEN", "tokens 0").partition(" ")
    return (int(positions.max()) if what == "position" else len(positions)) >= int(number)


class PlantedOps(Ops):
    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.spoils = True

    def begin_rotary(self, positions: torch.Tensor, *args: Any) -> Any:
        self.counts, self.spoils = {}, applies(positions)
        return super().begin_rotary(positions, *args)

    def spoilt(self, op: str, result: torch.Tensor) -> torch.Tensor:
        count = self.counts.get(op, 0)
        self.counts[op] = count + 1
        if (op, count) == plant() and self.spoils:
            result.view(-1)[result.numel() // 2] += 0.01 * (1 + result.abs().max())
        return result

    def linear(self, *args: Any) -> torch.Tensor:
        return self.spoilt("linear", super().linear(*args))

    def adapt(self, *args: Any) -> torch.Tensor:
        return self.spoilt("adapt", super().adapt(*args))

    def rms_norm(self, *args: Any) -> torch.Tensor:
        return self.spoilt("rms_norm", super().rms_norm(*args))

    def add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> Any:
        total = x + residual
        return self.spoilt("add_rms_norm", Ops().rms_norm(total, weight, eps)), total

    def rotary(self, *args: Any) -> torch.Tensor:
        return self.spoilt("rotary", super().rotary(*args))

    def silu_mul(self, *args: Any) -> torch.Tensor:
        return self.spoilt("silu_mul", super().silu_mul(*args))

    def experts(self, *args: Any) -> torch.Tensor:
        return self.spoilt("experts", super().experts(*args))


class PlantedAttention(PagedAttention):
    def begin(self, *args: Any) -> Any:
        step = super().begin(*args)

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            out = step(layer, q, k, v)
            return out * 1.001 if plant() == ("attention", layer) else out

        return attend


class FailingRunner(PagedModelRunner):
    """Fails in the step that FAIL_AT numbers, once it has computed it."""

    multi_step = True
    steps = -2  # the warm-up's
    tokens: list[int] = []

    def execute_model(self, *args: Any) -> Any:
        output = super().execute_model(*args)
        type(self).steps += 1
        if self.steps == int(os.environ.get("FAIL_AT", "0")):
            type(self).tokens = [t for row in output.rows() for t in row] if hasattr(output, "rows") else []
            raise ArithmeticError("the device gave up")
        return output


class PlantedBackend(CpuBackend):
    name = "planted"
    capabilities = Capabilities(contracts="2.0", dtypes=("float32",), max_tp=8, max_pp=8, adapters=True)

    def make_runner(self, *args: Any) -> PagedModelRunner:
        return PagedModelRunner(*args, ops=PlantedOps(), attention=PlantedAttention)


class FailingBackend(PlantedBackend):
    name = "failing"

    def make_runner(self, *args: Any) -> PagedModelRunner:
        FailingRunner.steps = -2
        return FailingRunner(*args)


planted, failing = PlantedBackend(), FailingBackend()
