"""The allow-lists of vLLM's options. An option that is on no list must have the value that vLLM gives it by itself."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

from hal.errors import ConfigError

# Options that hal honours, and options that vLLM's front end and scheduler honour by themselves, by part of VllmConfig.
ALLOWED = {
    "": {"additional_config", "instance_id", "shutdown_timeout", "quant_config"},  # the last is the checkpoint's
    "model_config": {
        "model", "model_weights", "tokenizer", "tokenizer_mode", "trust_remote_code", "dtype", "seed", "hf_token",
        "revision", "code_revision", "tokenizer_revision", "max_model_len", "enforce_eager", "max_logprobs",
        "logprobs_mode", "served_model_name", "skip_tokenizer_init", "generation_config", "override_generation_config",
        "runner", "model_impl", "renderer_num_workers"},
    "cache_config": {
        "block_size", "gpu_memory_utilization", "cache_dtype", "num_gpu_blocks_override", "enable_prefix_caching",
        "prefix_caching_hash_algo", "kv_cache_memory_bytes", "is_attention_free", "sliding_window"},
    "parallel_config": {
        "tensor_parallel_size", "pipeline_parallel_size", "distributed_executor_backend", "is_moe_model"},
    "scheduler_config": {
        "max_num_batched_tokens", "max_num_scheduled_tokens", "max_num_seqs", "max_num_active_seqs",
        "long_prefill_token_threshold", "long_prefill_token_threshold_adaptive", "max_num_queued_reqs",
        "max_num_queued_tokens", "enable_chunked_prefill", "policy", "scheduler_cls", "scheduler_reserve_full_isl",
        "watermark", "prefill_schedule_interval", "async_scheduling", "stream_interval", "runner_type"},
    "kernel_config": {"enable_jit_warmup"},  # none of vLLM's kernels runs
    "load_config": {"load_format", "download_dir", "ignore_patterns", "use_tqdm_on_load"},
    "structured_outputs_config": {
        "backend", "disable_any_whitespace", "disable_additional_properties", "reasoning_parser",
        "reasoning_parser_plugin", "enable_in_reasoning"},
    "observability_config": {
        "show_hidden_metrics_for_version", "otlp_traces_endpoint", "kv_cache_metrics", "kv_cache_metrics_sample",
        "custom_histogram_buckets", "enable_logging_iteration_details"},
    "logging_config": {"log_level", "formatter", "configure_logging", "pylogging_config_file"}}
# Names of these options as EngineArgs has them, where they differ.
_ARGUMENTS = {"cache_dtype": "kv_cache_dtype", "policy": "scheduling_policy"}
_HINTS = {"speculative_config": "hal.LLM speculates: EngineConfig.speculate, docs/speculation.md",
          "parallel_config.enable_expert_parallel": """set additional_config '{"hal": {"ep": N}}'""",
          "model_config.quantization": "hal reads it off the checkpoint; a dense one loses bits by additional_config"
                                       """ '{"hal": {"quantize": "int8"}}'""",
          "model_config.logits_processors": "a step feature of hal changes scores: docs/architecture.md"}
_checked: list[Any] = []  # the configuration that is compared with one of vLLM's own making, while that is made


def check_options(config: Any) -> None:
    """Compare a VllmConfig with the one that vLLM makes of the allowed options alone. So values that vLLM derives are
    no reason for a refusal, whatever release derives them.

    Raises:
        ConfigError: an option that is on no list was set. It names the option.
    """
    if _checked:
        _compare(_checked[0], config)
        return
    if config.model_config is None:
        return
    from vllm.engine.arg_utils import EngineArgs

    arguments = {field.name for field in dataclasses.fields(EngineArgs)}
    given = {_ARGUMENTS.get(name, name): getattr(getattr(config, part), name)
             for part, names in ALLOWED.items() if part for name in names if hasattr(getattr(config, part), name)}
    _checked.append(config)
    try:
        with _quiet():
            EngineArgs(**{name: value for name, value in given.items() if name in arguments}).create_engine_config()
    finally:
        _checked.clear()


def _compare(config: Any, own: Any) -> None:
    for part in dataclasses.fields(config):
        found, expected = getattr(config, part.name), getattr(own, part.name, None)
        if dataclasses.is_dataclass(found) and type(found) is type(expected):
            for name, got, want in _differences(found, expected, ALLOWED.get(part.name, frozenset())):
                raise _unsupported(f"{part.name}.{name}", got, want)
        elif part.name not in ALLOWED[""] and not _same(found, expected):
            raise _unsupported(part.name, found, expected)


def _differences(found: Any, expected: Any, allowed: Any) -> Iterator[tuple[str, Any, Any]]:
    """Public options that differ: name, value and vLLM's own value. Private fields follow from public ones."""
    for field in dataclasses.fields(found):
        name = field.name
        if not field.init or name.startswith("_") or name in allowed:
            continue
        got, want = getattr(found, name, None), getattr(expected, name, None)
        if not _same(got, want):
            yield name, got, want


def _same(one: Any, other: Any) -> bool:
    try:
        return one is other or bool(one == other)
    except (TypeError, ValueError):  # arrays
        return False


def _unsupported(name: str, got: Any, expected: Any) -> ConfigError:
    return ConfigError(f"vLLM's option {name} is not supported under hal", got=repr(got)[:200],
                       expected=f"{repr(expected)[:200]}, which vLLM takes by itself",
                       hint=_HINTS.get(name, "hal_vllm/allowed.py lists the options that may be set"))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """vLLM reports each decision about its options, and has done so already."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
