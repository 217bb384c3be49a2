"""The null backend; each rank but the driver writes the names of the spans that it opens to the file TEST_SPANS."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from hal.testing.null import NullBackend


class SpansBackend(NullBackend):
    name = "spans_backend:backend"

    def device(self, local_rank: int) -> torch.device:
        if local_rank > 0:
            file = Path(os.environ["TEST_SPANS"]).open("a", buffering=1)  # noqa: SIM115  # open while the process runs

            @contextlib.contextmanager
            def record(name: str) -> Iterator[None]:
                file.write(name + "\n")
                yield

            setattr(torch.profiler, "record_function", record)
        return super().device(local_rank)


backend = SpansBackend()
