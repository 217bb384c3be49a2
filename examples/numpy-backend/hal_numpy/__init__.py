"""A backend for hal whose arithmetic is numpy. Importing this loads no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from hal.contracts.backend import Backend, Capabilities

if TYPE_CHECKING:
    import torch

    from hal.config import WorkerConfig
    from hal.contracts.communicator import Communicator
    from hal.paged.runner import PagedModelRunner


class NumpyBackend(Backend):
    name = "numpy"
    priority = -10  # only when asked for
    capabilities = Capabilities(contracts="2.0", dtypes=("float32",), max_tp=8, max_pp=8)

    def unavailable(self) -> str | None:
        return None

    def device(self, local_rank: int) -> torch.device:
        import torch

        return torch.device("cpu")

    def free_memory(self, device: torch.device) -> int:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")

    def make_runner(self, config: WorkerConfig, device: torch.device, communicator: Communicator) -> PagedModelRunner:
        from hal.paged.runner import PagedModelRunner
        from hal_numpy.attention import NumpyAttention
        from hal_numpy.ops import NumpyOps, NumpySampler

        return PagedModelRunner(config, device, communicator, attention=NumpyAttention, ops=NumpyOps(),
                                sampler=NumpySampler())

    def versions(self) -> Mapping[str, str]:
        return {"numpy": np.__version__}


backend = NumpyBackend()
