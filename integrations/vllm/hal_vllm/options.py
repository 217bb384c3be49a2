"""vLLM's configuration as hal's EngineConfig, and the refusal of what hal's ranks would not honour."""

from __future__ import annotations

import os
from typing import Any

from hal.config import EngineConfig
from hal.contracts.backend import Backend, select
from hal.errors import ConfigError

ASKED = "HAL_DEVICE"
_OWN = ("device", "wire", "control_plane", "executor", "heartbeat", "ep")  # keys of additional_config["hal"]
_NONE = ("speculative_config", "lora_config", "kv_transfer_config", "ec_transfer_config", "kv_events_config",
         "watermark_config", "quant_config")  # of VllmConfig
_OFF = {"model_config": ("enable_sleep_mode", "enable_prompt_embeds", "enable_return_routed_experts"),
        "parallel_config": ("enable_eplb", "enable_dbo", "enable_expert_parallel"),
        "cache_config": ("kv_offloading_size",)}
_ONE = ("data_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size", "nnodes")
_LOADS = {"auto": False, "safetensors": False, "hf": False, "dummy": True}  # by load_format: whether weights are random


def backend_of(config: Any) -> Backend:
    """The backend that the user named, or the best one. Raises BackendError."""
    return select(_own(config).get("device") or os.environ.get(ASKED) or "auto")


def _own(config: Any) -> dict[str, Any]:
    given = config.additional_config
    own = given.get("hal", {}) if isinstance(given, dict) else {}
    if not isinstance(own, dict) or not set(own) <= set(_OWN):
        raise ConfigError("additional_config['hal'] is not usable", got=own, expected=f"some of {', '.join(_OWN)}",
                          hint="vLLM's own options set everything else")
    return own


def check_config(config: Any) -> None:
    """Raises ConfigError: a vLLM option is set that hal's ranks would not honour. It names the option."""
    for name in _NONE:
        if getattr(config, name, None) is not None:
            raise _unsupported(name, getattr(config, name), "none")
    for part, names in _OFF.items():
        for name in names:
            if getattr(getattr(config, part), name, None):
                raise _unsupported(f"{part}.{name}", getattr(getattr(config, part), name), "not set")
    parallel, model, cache = config.parallel_config, config.model_config, config.cache_config
    for name in _ONE:
        if getattr(parallel, name, 1) > 1:
            raise _unsupported(name, getattr(parallel, name), "1", "hal runs tensor and pipeline parallel ranks")
    if model is None:
        return
    if model.runner_type != "generate":
        raise _unsupported("runner", model.runner_type, "generate")
    if model.quantization is not None:
        raise _unsupported("quantization", model.quantization, "none")
    if model.hf_overrides:
        raise _unsupported("hf_overrides", model.hf_overrides, "none", "hal reads the checkpoint's own config.json")
    if model.logits_processors:
        raise _unsupported("logits_processors", model.logits_processors, "none", "write a step feature of hal")
    if model.logprobs_mode != "raw_logprobs":
        raise _unsupported("logprobs_mode", model.logprobs_mode, "raw_logprobs")
    if config.load_config.load_format not in _LOADS:
        raise _unsupported("load_format", config.load_config.load_format, " or ".join(_LOADS))
    if cache.cache_dtype not in _KV_DTYPES and cache.cache_dtype != str(model.dtype).removeprefix("torch."):
        raise _unsupported("kv_cache_dtype", cache.cache_dtype, " or ".join(_KV_DTYPES))
    if cache.kv_cache_memory_bytes is not None:
        raise _unsupported("kv_cache_memory_bytes", cache.kv_cache_memory_bytes, "none",
                           "set num_gpu_blocks_override or gpu_memory_utilization")


_KV_DTYPES = {"auto": "auto", "fp8": "fp8", "fp8_e4m3": "fp8"}


def _unsupported(name: str, got: object, expected: str, hint: str | None = None) -> ConfigError:
    return ConfigError(f"vLLM's option {name} is not supported under hal", got=got, expected=expected, hint=hint)


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
        num_blocks=cache.num_gpu_blocks_override, memory_fraction=cache.gpu_memory_utilization,
        prefix_caching=bool(cache.enable_prefix_caching), async_scheduling=bool(scheduler.async_scheduling),
        graphs=not model.enforce_eager, random_weights=_LOADS[config.load_config.load_format],
        trust_remote_code=model.trust_remote_code, seed=model.seed or 0, **own)
