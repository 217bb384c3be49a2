"""The CPU's runner: the default one with the CPU's parts."""

from __future__ import annotations

import logging

import torch

from hal.config import WorkerConfig
from hal.contracts.communicator import Communicator
from hal.contracts.inputs import PagedModelInput
from hal.contracts.runner import Progress, no_progress
from hal.embedding.runner import EmbeddingRunner
from hal.paged.runner import PagedModelRunner
from runners.cpu.attention import CpuAttention
from runners.cpu.invariant import InvariantAttention, InvariantOps
from runners.cpu.ops import CpuOps
from runners.cpu.sampler import CpuSampler


class CpuModelInput(PagedModelInput):
    """A paged batch, without further fields."""


class CpuModelRunner(PagedModelRunner):
    input_type = CpuModelInput
    ops: CpuOps

    def __init__(self, config: WorkerConfig, device: torch.device, communicator: Communicator) -> None:
        alike = config.engine.batch_invariant
        super().__init__(config, device, communicator, attention=InvariantAttention if alike else CpuAttention,
                         sampler=CpuSampler())
        self.ops = (InvariantOps if alike else CpuOps)()

    def load_model(self, progress: Progress = no_progress) -> None:
        super().load_model(progress)
        logging.getLogger("hal").info(self.ops.described())


class CpuEmbeddingRunner(EmbeddingRunner):
    ops: CpuOps

    def __init__(self, config: WorkerConfig, device: torch.device, communicator: Communicator) -> None:
        super().__init__(config, device, communicator)
        self.ops = CpuOps()

    def load_model(self, progress: Progress = no_progress) -> None:
        super().load_model(progress)
        logging.getLogger("hal").info(self.ops.described())
