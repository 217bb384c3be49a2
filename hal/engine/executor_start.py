"""The executor of an LLM: workers that have loaded the model, and that the engine can drive."""

from __future__ import annotations

import sys

from hal.config import EngineConfig
from hal.contracts.backend import Backend, resolve_dtype
from hal.contracts.embedding import EmbeddingOutput
from hal.contracts.executor import Executor, make_executor
from hal.contracts.outputs import SamplerOutput
from hal.contracts.runner import no_progress
from hal.engine.progress import LoadProgress
from hal.errors import ConfigError
from hal.model_config import ModelConfig


def start_executor(config: EngineConfig, model: ModelConfig, backend: Backend, *, progress: bool = False) -> Executor:
    """Args: progress: show bars while loading and warming up.

    Raises:
        As LLM.
    """
    if progress and (model.quantization is not None or model.delta is not None or config.kv_dtype != "auto"):
        from hal.models.memory import memory_line

        print(memory_line(config, model, resolve_dtype(backend, config.dtype, model.dtype)), file=sys.stderr)
    bars = LoadProgress() if progress else None
    try:
        executor = make_executor(config, model, backend, bars or no_progress)
    finally:
        if bars is not None:
            bars.close()
    try:
        _require_drivable(executor, config, model)
    except ConfigError:
        executor.shutdown()
        raise
    return executor


def _require_drivable(executor: Executor, config: EngineConfig, model: ModelConfig) -> None:
    """Raises ConfigError: LLM cannot drive these workers as the configuration asks."""
    embeds = model.embedding is not None
    wanted = EmbeddingOutput if embeds else SamplerOutput
    if not issubclass(executor.output_type, wanted):
        raise ConfigError(f"LLM {'makes embeddings' if embeds else 'generates tokens'}, and this device's model runner "
                          "does not", got=f"a runner that yields {executor.output_type.__name__}",
                          expected=f"a runner that yields {wanted.__name__}",
                          hint="drive its executor yourself: hal.contracts.executor.make_executor")
    if config.async_scheduling and executor.tokens_per_row > 1:
        raise ConfigError("async_scheduling prepares a step before it is known how many tokens a sequence gained",
                          got=f"a model runner that gives up to {executor.tokens_per_row} tokens a step",
                          expected="async_scheduling=None or False: then steps are scheduled one after another")
    if config.expert_loads and executor.expert_loads() is None:
        raise ConfigError("expert_loads counts the experts of a native model, where the device can",
                          got=f"{model.architecture} on {config.device}", expected="expert_loads=False")
