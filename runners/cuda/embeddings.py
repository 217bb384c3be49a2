"""The CUDA runner of embeddings: the default one with the models' kernels, and copies to the host that do not wait."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hal.config import WorkerConfig
from hal.contracts.communicator import Communicator
from hal.contracts.runner import OutputT
from hal.embedding.runner import EmbeddingRunner
from runners.cuda.ops import CudaOps
from runners.cuda.staging import Fetcher


class CudaEmbeddingRunner(EmbeddingRunner):
    """Attention is PyTorch's own, which takes a flash kernel in 16 bits; steps run eagerly."""

    def __init__(self, config: WorkerConfig, device: torch.device, communicator: Communicator) -> None:
        super().__init__(config, device, communicator, CudaOps())
        self._fetch = Fetcher()

    def fetch(self, output: OutputT) -> Callable[[], OutputT]:
        return self._fetch(output)
