"""The XLA backend: TPUs, and XLA's CPU client if PJRT_DEVICE=CPU. Importing this loads no torch."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from glob import glob
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hal.contracts.backend import Backend, Capabilities
from hal.contracts.device import DeviceRuntime

if TYPE_CHECKING:
    import torch

    from hal.config import WorkerConfig
    from hal.contracts.communicator import Communicator
    from hal.contracts.runner import ModelRunnerBase

_INSTALL = "pip install torch==2.8.0 torch_xla==2.8.1"  # the pair that is tested; torch_xla ended with 2.9
_CHIPS = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")  # device files of TPU v4 and older, of v5 and newer
_CPU_SHARE = 8  # XLA's CPU client shares the host's memory with other programs: the cache gets at most this part


class TpuRuntime(DeviceRuntime):
    """XLA has no streams to choose from: it orders a device's work by itself."""

    def synchronize(self, device: torch.device) -> None:
        from runners.tpu import lowering

        lowering.wait()

    def program_folders(self) -> Mapping[str, Path]:
        from runners.tpu import lowering

        folder = lowering.cache_folder()
        return {} if folder is None else {"XLA": folder}


class TpuBackend(Backend):
    name = "tpu"
    runtime = TpuRuntime()

    @property
    def capabilities(self) -> Capabilities:  # type: ignore[override]
        return Capabilities(contracts="2.0", dtypes=("bfloat16", "float32"), max_tp=256, max_pp=64, spmd=True,
                            embeddings=True, adapters=True, host_memory=os.environ.get("PJRT_DEVICE") == "CPU")

    @property
    def priority(self) -> int:  # type: ignore[override]
        """The device "auto" is a TPU if there is one. It is never XLA's CPU client."""
        return 20 if os.environ.get("PJRT_DEVICE", "TPU") == "TPU" else -50

    def unavailable(self) -> str | None:
        found = self._packages()
        if "torch_xla" not in found or importlib.util.find_spec("torch_xla") is None:
            return f"torch_xla is not installed: {_INSTALL}"
        if found["torch_xla"].split(".")[:2] != found.get("torch", "").split(".")[:2]:
            return f"torch_xla {found['torch_xla']} does not load with torch {found.get('torch')}: {_INSTALL}"
        kind = os.environ.get("PJRT_DEVICE")
        chips = any(map(glob, _CHIPS))
        if kind is None and not chips:
            return "no TPU is attached: set PJRT_DEVICE=CPU to run on XLA's CPU client"
        if kind == "TPU" and not chips:
            return "PJRT_DEVICE=TPU, but no TPU is attached: run on a TPU host, or set PJRT_DEVICE=CPU"
        if kind not in (None, "TPU", "CPU"):
            return f"PJRT_DEVICE={kind} is not served by this backend: set it to TPU or CPU"
        return None

    def device(self, local_rank: int) -> torch.device:
        from runners.tpu import lowering

        return lowering.device()

    def free_memory(self, device: torch.device) -> int:
        from runners.tpu import lowering

        free = lowering.free_bytes() if lowering.device_kind() != "CPU" else None
        return free or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") // _CPU_SHARE

    def make_runner(self, config: WorkerConfig, device: torch.device, communicator: Communicator,
                    ) -> ModelRunnerBase[Any]:
        if config.model.embedding is not None:
            from runners.tpu.embeddings import TpuEmbeddingRunner

            return TpuEmbeddingRunner(config, device, communicator)
        from runners.tpu.runner import TpuModelRunner

        return TpuModelRunner(config, device, communicator)

    def versions(self) -> Mapping[str, str]:
        """The versions, and the devices that PJRT sees, if it can be asked."""
        found = self._packages()
        if self.unavailable() is None:
            from runners.tpu import lowering

            found["PJRT devices"] = lowering.devices_seen()
        return found

    @staticmethod
    def _packages() -> dict[str, str]:
        found = {}
        for package in ("torch", "torch_xla"):
            try:
                found[package] = version(package)
            except PackageNotFoundError:
                continue
        return found


backend = TpuBackend()
