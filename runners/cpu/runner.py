"""The CPU's runner: the default one with the CPU's parts."""

from __future__ import annotations

import logging
import math
import mmap
from collections.abc import Sequence

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

    def make_kv_caches(self, num_blocks: int) -> Sequence[torch.Tensor]:
        """The system gives zeroed pages when they are first touched. `torch.zeros` writes all of them, which takes
        seconds, and drops files from memory that the next start would have found there."""
        return [torch.frombuffer(mmap.mmap(-1, math.prod(shape) * self.kv_dtype.itemsize, mmap.MAP_PRIVATE
                                           | mmap.MAP_ANONYMOUS), dtype=self.kv_dtype).view(shape)
                for shape in self.cache_shapes(num_blocks)]


class CpuEmbeddingRunner(EmbeddingRunner):
    ops: CpuOps

    def __init__(self, config: WorkerConfig, device: torch.device, communicator: Communicator) -> None:
        super().__init__(config, device, communicator)
        self.ops = CpuOps()

    def load_model(self, progress: Progress = no_progress) -> None:
        super().load_model(progress)
        logging.getLogger("hal").info(self.ops.described())
