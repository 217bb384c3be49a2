"""A device whose warm-up keeps a program for each number of sequences in the folder KEPT, unless it is there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hal.contracts.device import DeviceRuntime
from hal.testing.null import NullBackend, NullRunner


class KeepingRuntime(DeviceRuntime):
    def program_folders(self) -> Mapping[str, Path]:
        return {"programs": Path(os.environ["KEPT"])}


class KeepingRunner(NullRunner):
    def warmup(self, *args: Any) -> None:
        for seqs in range(self.config.engine.max_num_seqs):
            path = Path(os.environ["KEPT"], "of-this-shape", str(seqs))
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"x" * 1000)


class KeepingBackend(NullBackend):
    name = "keeping"
    runtime = KeepingRuntime()

    def make_runner(self, *args: Any) -> KeepingRunner:
        return KeepingRunner(*args)


backend = KeepingBackend()
