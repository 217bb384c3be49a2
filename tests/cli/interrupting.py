"""The CPU, at which Ctrl-C comes in the third step. A signal from another process might come after the reply."""

from __future__ import annotations

import os
import signal
from typing import Any

from runners.cpu import CpuBackend
from runners.cpu.runner import CpuModelRunner


class InterruptedRunner(CpuModelRunner):
    steps = 0

    def warmup(self, *args: Any) -> None:
        super().warmup(*args)
        self.steps = 0

    def execute_model(self, *args: Any) -> Any:
        self.steps += 1
        if self.steps == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return super().execute_model(*args)


class InterruptingBackend(CpuBackend):
    name = "interrupting"

    def make_runner(self, *args: Any) -> InterruptedRunner:
        return InterruptedRunner(*args)


backend = InterruptingBackend()
