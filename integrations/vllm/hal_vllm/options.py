"""vLLM's configuration as hal's EngineConfig, and the refusal of what hal's ranks would not honour."""

from __future__ import annotations

import os
from typing import Any

from hal.config import EngineConfig
from hal.contracts.backend import Backend, select
from hal.errors import ConfigError

ASKED = "HAL_DEVICE"
EXECUTOR = "hal_vllm.executor.HalExecutor"
# Keys of additional_config["hal"].
_OWN = ("device", "wire", "control_plane", "executor", "heartbeat", "ep", "quantize")
_LOADS = {"auto": False, "safetensors": False, "hf": False, "dummy": True}  # by load_format: whether weights are random
_KV_DTYPES = {"auto": "auto", "fp8": "fp8", "fp8_e4m3": "fp8"}
_IMPLS = {"auto": "auto", "transformers": "transformers"}  # of the model


def backend_of(config: Any) -> Backend:
    """The backend that the user named, or the best one. Raises BackendError."""
    return select(_own(config).get("device") or os.environ.get(ASKED) or "auto")


def _own(config: Any) -> dict[str, Any]:
    given = config.additional_config
    own = given.get("hal", {}) if isinstance(given, dict) and set(given) <= {"hal"} else given
    if not isinstance(own, dict) or not set(own) <= set(_OWN):
        raise ConfigError("additional_config is not usable", got=own,
                          expected=f"the key hal alone, and in it some of {', '.join(_OWN)}",
                          hint="vLLM's own options set everything else")
    return own


def check_config(config: Any) -> None:
    """Raises ConfigError: an allowed option has a value that hal's ranks would not honour. It names the option."""
    model, cache, load = config.model_config, config.cache_config, config.load_config
    _own(config)
    if model is None:
        return
    dtypes = {*_KV_DTYPES, str(model.dtype).removeprefix("torch.")}
    for name, got, values in (
            ("runner", model.runner_type, ("generate",)), ("logprobs_mode", model.logprobs_mode, ("raw_logprobs",)),
            ("model_impl", model.model_impl, _IMPLS), ("load_format", load.load_format, _LOADS),
            ("kv_cache_dtype", cache.cache_dtype, dtypes),
            ("distributed_executor_backend", config.parallel_config.distributed_executor_backend,
             (None, "uni", "mp", EXECUTOR))):
        if got not in values:
            raise ConfigError(f"vLLM's option {name} has a value that is not supported under hal", got=got,
                              expected=" or ".join(map(str, values)), hint=_HINTS.get(name))


_HINTS = {"logprobs_mode": "hal reports log probabilities of the model's own scores",
          "distributed_executor_backend": """set additional_config '{"hal": {"executor": "ray"}}' for Ray"""}


def runs_ahead(config: Any, backend: Backend) -> bool:
    """Whether vLLM schedules a step before it knows the tokens of the one before: where the user has not turned it off,
    and the device runs steps while the host goes on."""
    asked = config.scheduler_config.async_scheduling is not False
    return asked and backend.capabilities.asynchronous and config.parallel_config.pipeline_parallel_size == 1


def engine_config(config: Any, backend: Backend, directory: str) -> EngineConfig:
    """Args:
        config: vLLM's VllmConfig, after check_config. directory: the checkpoint's.

    Raises:
        ConfigError: a value is not usable.
    """
    model, cache, parallel, scheduler = (config.model_config, config.cache_config, config.parallel_config,
                                         config.scheduler_config)
    own: dict[str, Any] = {"kv_dtype": _KV_DTYPES.get(cache.cache_dtype, "auto"), **_own(config)}
    own["device"] = own.get("device") or os.environ.get(ASKED) or backend.name
    dtype: Any = str(model.dtype).removeprefix("torch.")
    return EngineConfig(
        model=directory, dtype=dtype, tp=parallel.tensor_parallel_size, pp=parallel.pipeline_parallel_size,
        max_model_len=model.max_model_len, max_num_seqs=scheduler.max_num_seqs,
        max_num_batched_tokens=scheduler.max_num_batched_tokens, block_size=cache.block_size,
        num_blocks=cache.num_gpu_blocks_override, kv_cache_bytes=cache.kv_cache_memory_bytes,
        memory_fraction=cache.gpu_memory_utilization,
        prefix_caching=bool(cache.enable_prefix_caching), async_scheduling=bool(scheduler.async_scheduling),
        graphs=not model.enforce_eager, random_weights=_LOADS[config.load_config.load_format],
        model_impl=_IMPLS[model.model_impl], trust_remote_code=model.trust_remote_code, seed=model.seed or 0, **own)
