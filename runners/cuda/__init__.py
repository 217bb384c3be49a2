"""The CUDA backend. Importing this loads no torch and needs no GPU."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hal import profiling
from hal.contracts.backend import Backend, Capabilities
from hal.contracts.device import GLOO, Collectives, DeviceRuntime
from hal.errors import BackendError
from runners.cuda.collectives import NcclCollectives

if TYPE_CHECKING:
    import torch

    from hal.config import WorkerConfig
    from hal.contracts.communicator import Communicator
    from hal.contracts.runner import ModelRunnerBase


class CudaRuntime(DeviceRuntime):
    """torch.cuda's streams and events, and page-locked memory."""

    def program_folders(self) -> Mapping[str, Path]:
        return {"Triton": Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")}

    def host_memory(self, device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        import torch

        return torch.zeros(shape, dtype=dtype, pin_memory=True)


class CudaBackend(Backend):
    name = "cuda"
    priority = 10
    capabilities = Capabilities(contracts="2.0", dtypes=("bfloat16", "float16", "float32"), max_tp=64, max_pp=64,
                                fp8_kv=True, embeddings=True, adapters=True, asynchronous=True, ray_resource="GPU",
                                token_cost=0.01, batch_invariant="option")
    collectives: Collectives = NcclCollectives()
    runtime = CudaRuntime()

    def unavailable(self) -> str | None:
        import torch

        if torch.version.cuda is None:
            return (f"PyTorch {torch.__version__} is built without CUDA: install a CUDA build of torch "
                    "(pytorch.org/get-started lists them)")
        if not torch.cuda.is_available():
            return (f"PyTorch {torch.__version__} (CUDA {torch.version.cuda}) finds no usable GPU: check `nvidia-smi`, "
                    "that the driver is new enough for this CUDA, and CUDA_VISIBLE_DEVICES")
        if find_spec("triton") is None:
            return "Triton is not installed, and the kernels are written in it: `pip install triton`"
        return None

    def device(self, local_rank: int) -> torch.device:
        """Check the number of GPUs. Raises BackendError: there is no GPU for this rank; NCCL does not let ranks share
        one.
    """
        import torch

        count = torch.cuda.device_count()
        if local_rank >= count and self.collectives.on_device:
            raise BackendError("there are more ranks on this host than GPUs", expected=f"at most {count}",
                               got=f"a rank {local_rank + 1}", hint="--device runners.cuda:shared_gpu lets ranks share "
                               "one, slowly; CUDA_VISIBLE_DEVICES may hide some")
        device = torch.device("cuda", local_rank % count)
        torch.cuda.set_device(device)
        profiling.mark_with(torch.cuda.nvtx.range)
        return device

    def free_memory(self, device: torch.device) -> int:
        """Bytes that the driver has free, and bytes that PyTorch holds without using them."""
        import torch

        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached

    def make_runner(self, config: WorkerConfig, device: torch.device, communicator: Communicator,
                    ) -> ModelRunnerBase[Any]:
        if config.model.embedding is not None:
            from runners.cuda.embeddings import CudaEmbeddingRunner

            return CudaEmbeddingRunner(config, device, communicator)
        from runners.cuda.runner import CudaModelRunner

        return CudaModelRunner(config, device, communicator)

    def versions(self) -> Mapping[str, str]:
        import torch

        found = {"torch": torch.__version__, "cuda": torch.version.cuda or "none"}
        if find_spec("triton") is not None:
            import triton

            found["triton"] = triton.__version__
        if torch.cuda.is_available():
            found["gpu"] = torch.cuda.get_device_name()
        if "CUDA_VISIBLE_DEVICES" in os.environ:
            found["CUDA_VISIBLE_DEVICES"] = os.environ["CUDA_VISIBLE_DEVICES"]
        return found


class SharedGpuBackend(CudaBackend):
    """A backend whose ranks share a GPU. NCCL does not allow this, so collectives use gloo, and steps run eagerly."""

    name = "runners.cuda:shared_gpu"
    capabilities = replace(CudaBackend.capabilities, ray_resource="CPU")  # a rank takes no GPU for itself
    collectives = GLOO


backend = CudaBackend()
shared_gpu = SharedGpuBackend()
