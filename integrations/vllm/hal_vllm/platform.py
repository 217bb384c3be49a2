"""The platform that vLLM sees: its own tensors stay on the host, and hal's backend has the device.

vLLM imports this module while it imports itself, so what needs vLLM's configuration is imported late.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from vllm.platforms.interface import Platform, PlatformEnum

from hal.contracts.backend import select
from hal_vllm.allowed import check_options
from hal_vllm.exit_status import watch_for_failure
from hal_vllm.options import ASKED, EXECUTOR, backend_of, check_config, runs_ahead


class HalPlatform(Platform):
    """One class for every backend, which `hal_vllm.options.backend_of` chooses."""

    _enum = PlatformEnum.OOT
    device_name = "hal"
    device_type = "cpu"
    dispatch_key = "CPU"
    _released = False
    vocab_size: int | None = None  # of the model that this process serves; known once its configuration is checked

    @property
    def supported_dtypes(self) -> list[torch.dtype]:
        """Best first, since vLLM's dtype="auto" takes the first one where the checkpoint's is missing."""
        return [getattr(torch, name) for name in select(os.environ.get(ASKED) or "auto").capabilities.dtypes]

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        return f"hal ({os.environ.get(ASKED) or 'auto'})"

    @classmethod
    def is_pin_memory_available(cls) -> bool:
        return False

    @classmethod
    def import_kernels(cls) -> None:
        """vLLM's compiled operations are not used. On a processor for which they were not built, loading them would
        end the process."""

    @classmethod
    def import_ir_kernels(cls) -> None:
        """As import_kernels."""

    @classmethod
    def released(cls) -> None:
        """The executor has ended its ranks. Next vLLM asks `is_cpu` before it empties an accelerator's cache. In its
        process there may be no accelerator, or one whose memory is hal's."""
        cls._released = True

    def is_cpu(self) -> bool:
        released, HalPlatform._released = self._released, False
        return released

    @classmethod
    def support_hybrid_kv_cache(cls) -> bool:
        return False  # one group of KV blocks: hal's block tables are shared by all layers

    @classmethod
    def validate_request(cls, processed_inputs: Any, params: Any, *_: Any, **__: Any) -> None:
        from hal_vllm.params import check_params

        check_params(params, cls.vocab_size or 1 << 31)

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        """Raises ConfigError, BackendError: the configuration asks for something that hal would not honour."""
        from vllm.config import CompilationMode

        if vllm_config.parallel_config.worker_cls != EXECUTOR:  # not a copy of a configuration that was checked
            check_options(vllm_config)
        check_config(vllm_config)
        watch_for_failure()
        backend = backend_of(vllm_config)
        parallel, scheduler, cache = (vllm_config.parallel_config, vllm_config.scheduler_config,
                                      vllm_config.cache_config)
        parallel.distributed_executor_backend = EXECUTOR
        parallel.worker_cls = EXECUTOR  # vLLM resolves the name, and makes no worker
        scheduler.async_scheduling = runs_ahead(vllm_config, backend)
        vllm_config.compilation_config.mode = CompilationMode.NONE
        if cache is not None and cache.block_size is None:
            cache.block_size = 16
        if vllm_config.model_config is not None:
            cls.vocab_size = vllm_config.model_config.get_vocab_size()
