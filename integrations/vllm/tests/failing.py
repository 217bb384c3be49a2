"""The null backend with ranks that fail when they are told to, on rank 1: a prompt of three equal tokens is the signal
for a step, and the variable FAILING for the start. Every step takes 50 ms, so that requests are in flight for a while.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from typing import Any

import torch

from hal.contracts.inputs import IntermediateTensors, PagedModelInput
from hal.contracts.runner import Progress, no_progress
from hal.testing.null import NullBackend, NullRunner

SIGNALS = {"raises": [5, 5, 5], "dies": [6, 6, 6], "stops": [7, 7, 7]}


def fail(how: str) -> None:
    if how == "raises":
        raise RuntimeError("this rank was told to raise")
    os.kill(os.getpid(), signal.SIGKILL if how == "dies" else signal.SIGSTOP)


class FailingRunner(NullRunner):
    def load_model(self, progress: Progress = no_progress) -> None:
        super().load_model(progress)
        if self.config.topology.rank == 1 and "FAILING" in os.environ:
            fail(os.environ["FAILING"])

    def execute_forward(self, model_input: PagedModelInput, kv_caches: Sequence[torch.Tensor],
                        intermediate: IntermediateTensors | None = None) -> Any:
        time.sleep(0.05)
        for how, tokens in SIGNALS.items():
            if self.config.topology.rank == 1 and model_input.input_ids.tolist()[-3:] == tokens:
                fail(how)
        return super().execute_forward(model_input, kv_caches, intermediate)


class FailingBackend(NullBackend):
    name = "failing"

    def make_runner(self, *args: Any) -> FailingRunner:
        return FailingRunner(*args)


backend = FailingBackend()
