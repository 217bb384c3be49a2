"""JAX as a device of hal. Importing this loads neither torch nor jax."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hal.contracts.backend import Backend, Capabilities
from hal.contracts.device import DeviceRuntime
from hal.errors import BackendError

if TYPE_CHECKING:
    import torch

    from hal.config import WorkerConfig
    from hal.contracts.communicator import Communicator
    from hal_jax.runner import JaxRunner


def program_folder() -> Path:
    return Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or Path.home() / ".cache" / "hal" / "jax")


class JaxRuntime(DeviceRuntime):
    def program_folders(self) -> Mapping[str, Path]:
        return {"JAX": program_folder()}


class JaxBackend(Backend):
    """A process for each rank. The compiled step calls the worker's Communicator for tensor parallelism."""

    name = "jax"
    priority = -10  # only when asked for
    runtime = JaxRuntime()
    capabilities = Capabilities(contracts="2.0", dtypes=("float32", "bfloat16"), max_tp=8, max_pp=8)

    def unavailable(self) -> str | None:
        found = importlib.util.find_spec("jax")
        return None if found else "jax is not installed: pip install jax, or jax[cuda13] for NVIDIA GPUs"

    def device(self, local_rank: int) -> torch.device:
        """The rank's JAX device becomes the default one. For torch it is the host, where a step's input stays."""
        import torch

        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several ranks may share a GPU
        import jax

        jax.config.update("jax_compilation_cache_dir", str(program_folder()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        devices = jax.devices()
        if devices[0].platform != "cpu":
            if local_rank >= len(devices):
                raise BackendError("there are fewer JAX devices than ranks", got=f"{len(devices)} devices",
                                   expected=f"at least {local_rank + 1}", hint="choose a smaller tp or pp")
            jax.config.update("jax_default_device", devices[local_rank])
        return torch.device("cpu")

    def free_memory(self, device: torch.device) -> int:
        import jax

        stats = (jax.config.jax_default_device or jax.devices()[0]).memory_stats()
        if stats is None:  # the CPU
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
        return int(stats["bytes_limit"] - stats["bytes_in_use"])

    def make_runner(self, config: WorkerConfig, device: torch.device, communicator: Communicator) -> JaxRunner:
        from hal_jax.runner import JaxRunner

        return JaxRunner(config, device, communicator)

    def versions(self) -> Mapping[str, str]:
        from importlib.metadata import version

        return {} if self.unavailable() else {name: version(name) for name in ("jax", "jaxlib")}


class SpmdBackend(JaxBackend):
    """One process drives the devices of all tensor-parallel ranks of a stage, and the compiler makes the collectives.
    """

    name = "jax-spmd"
    capabilities = Capabilities(contracts="2.0", dtypes=("float32", "bfloat16"), max_tp=8, max_pp=8, spmd=True)


backend, spmd = JaxBackend(), SpmdBackend()
