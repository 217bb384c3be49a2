"""The null backend, whose steps take 20 ms more while the file SLOWED exists."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from hal.testing.null import NullBackend, NullRunner


class SlowedRunner(NullRunner):
    def execute_forward(self, *args: Any) -> Any:
        if Path(os.environ["SLOWED"]).exists():
            time.sleep(0.02)
        return super().execute_forward(*args)


class SlowedBackend(NullBackend):
    name = "slowed"

    def make_runner(self, *args: Any) -> SlowedRunner:
        return SlowedRunner(*args)


backend = SlowedBackend()
