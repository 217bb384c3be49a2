"""The CPU backend: PyTorch, and compiled kernels where they are built. Importing this loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from hal.contracts.backend import Backend, Capabilities

if TYPE_CHECKING:
    import torch

    from hal.config import WorkerConfig
    from hal.contracts.communicator import Communicator
    from hal.contracts.runner import ModelRunnerBase


class CpuBackend(Backend):
    name = "cpu"
    capabilities = Capabilities(contracts="2.0", dtypes=("float32", "bfloat16"), max_tp=64, max_pp=64, fp8_kv=True,
                                embeddings=True, adapters=True, batch_invariant="option")

    def unavailable(self) -> str | None:
        return None

    def device(self, local_rank: int) -> torch.device:
        import torch

        return torch.device("cpu")

    def free_memory(self, device: torch.device) -> int:
        from runners.cpu.memory import free_memory

        return free_memory()

    def make_runner(self, config: WorkerConfig, device: torch.device, communicator: Communicator,
                    ) -> ModelRunnerBase[Any]:
        from runners.cpu.runner import CpuEmbeddingRunner, CpuModelRunner

        kind = CpuModelRunner if config.model.embedding is None else CpuEmbeddingRunner
        return kind(config, device, communicator)

    def versions(self) -> Mapping[str, str]:
        from runners.cpu.compiled import described

        found = {"kernels": described()}
        for package in ("torch", "intel-extension-for-pytorch"):
            try:
                found[package] = version(package)
            except PackageNotFoundError:
                continue
        return found


backend = CpuBackend()
