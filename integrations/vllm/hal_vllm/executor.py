"""The executor that vLLM's engine drives. It owns hal's ranks, so hal's control plane and failure handling are kept."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.executor.abstract import Executor
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput

from hal.checkpoints.hf_config import read_config
from hal.contracts.executor import StepHandle, make_executor
from hal.errors import ConfigError, StateError
from hal_vllm.exit_status import fatal, report_failure
from hal_vllm.fields import refuse_unknown
from hal_vllm.options import backend_of, engine_config
from hal_vllm.outputs import take_output
from hal_vllm.platform import HalPlatform
from hal_vllm.rows import Step
from hal_vllm.translate import Translator

logger = init_logger("vllm.hal")
# Remote calls of vLLM that ask nothing of hal's ranks: they keep no multimodal or encoder cache.
_NOTHING = frozenset(("synchronize_device", "reset_mm_cache", "reset_encoder_cache", "check_health"))


class StepFuture(Future[ModelRunnerOutput]):
    """The output of a step. It is taken over when it is asked for, after the outputs of all steps before it."""

    def __init__(self, executor: HalExecutor, step: Step, handle: StepHandle) -> None:
        super().__init__()
        self._executor, self.step, self.handle = executor, step, handle

    def result(self, timeout: float | None = None) -> ModelRunnerOutput:
        self._executor.take_until(self)
        return super().result()


class HalExecutor(Executor):
    """All ranks of one model, under vLLM's EngineCore. `_init_executor` starts the ranks, which size the KV cache. vLLM
    is then told of as much memory as makes it come to the same number of blocks."""

    supports_pp = True

    @classmethod
    def supports_async_scheduling(cls) -> bool:
        return True  # HalPlatform decides it by the device

    def _init_executor(self) -> None:
        config = self.vllm_config
        self._hal = None
        self._in_flight: deque[StepFuture] = deque()
        self._submitted: StepFuture | None = None  # the step that sample_tokens completes
        backend = backend_of(config)
        engine = engine_config(config, backend, checkpoint_directory(config))
        model = read_config(engine.model, weights=not engine.random_weights, pooling="none")
        self._hal = make_executor(engine, model, backend)
        if self._hal.has_row_states or not self._hal.num_blocks:
            self._hal.shutdown()
            raise ConfigError("vLLM's scheduler would not know of the state that a layer keeps per row",
                              got=f"a model of architecture {config.model_config.architecture}",
                              expected="layers with a paged KV cache alone", hint="use hal's own engine")
        self._translator = Translator(engine.max_num_seqs, model.vocab_size, engine.seed)
        self._hal.on_failure(_failed)

    # Start-up

    def get_kv_cache_specs(self) -> list[dict[str, Any]]:
        """One layer that stands for all: its block takes the bytes that a block takes on the largest rank."""
        size, dtype = self.cache_config.block_size, self.model_config.dtype
        least = FullAttentionSpec(block_size=size, num_kv_heads=1, head_size=1, dtype=dtype).page_size_bytes
        self._page = max(self._hal.kv_bytes_per_block, least)
        return [{"hal": FullAttentionSpec(block_size=size, num_kv_heads=1, head_size=1, dtype=dtype,
                                          page_size_padded=self._page)}]

    def get_supported_kv_cache_layouts(self) -> list[list[str]]:
        from vllm.v1.kv_cache_layout import KVCacheLayout  # not in every release that is supported

        return [[layout.name for layout in KVCacheLayout]]

    def set_kv_cache_layout(self, *resolved: Any) -> None:
        """The layout belongs to hal's runners."""

    def determine_available_memory(self) -> list[int]:
        return [self._hal.num_blocks * self._page]

    def initialize_from_config(self, kv_cache_configs: list[Any]) -> None:
        told, groups = kv_cache_configs[0].num_blocks, len(kv_cache_configs[0].kv_cache_groups)
        if told > self._hal.num_blocks or groups != 1:
            raise StateError("vLLM and hal do not agree about the KV cache", got=f"{told} blocks in {groups} groups",
                             expected=f"at most {self._hal.num_blocks} blocks in one group")

    def compile_or_warm_up_model(self) -> None:
        """The ranks are warm already."""

    @property
    def supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def supports_draft_weight_updates(self) -> bool:
        return False

    # Steps

    @fatal
    def execute_model(self, scheduler_output: SchedulerOutput, non_block: bool = False) -> Any:
        """Submit a step. vLLM asks for its output by `sample_tokens`, unless no token is scheduled."""
        if self._translator.must_wait(scheduler_output):
            self.take_until(None)
        step = self._translator.translate(scheduler_output)
        if step is None:
            return _given(EMPTY_MODEL_RUNNER_OUTPUT, non_block)
        handle = self._hal.execute_model(step.request, sampling_follows=step.grammar)
        self._submitted = StepFuture(self, step, handle)
        self._in_flight.append(self._submitted)
        return _given(None, non_block)

    @fatal
    def sample_tokens(self, grammar_output: GrammarOutput | None, non_block: bool = False) -> Any:
        """Complete the step that was submitted last. Where a request follows a grammar, its sampling begins here: vLLM
        computed the grammar's masks while the device ran the forward pass."""
        submitted, self._submitted = self._submitted, None
        if submitted is None:
            raise StateError("vLLM asks for tokens of a step that it has not submitted")
        if grammar_output is not None:
            refuse_unknown(grammar_output)
        step = submitted.step
        masks = {} if grammar_output is None else dict(zip(grammar_output.structured_output_request_ids,
                                                           grammar_output.grammar_bitmask, strict=False))
        if step.grammar:
            submitted.handle.sample(self._translator.masks(step, masks))
        elif masks:
            raise StateError("vLLM gives masks for a step that was submitted without a grammar", got=sorted(masks))
        return submitted if non_block else submitted.result()

    def take_until(self, last: StepFuture | None) -> None:
        """Take the outputs of the steps up to `last`, or of all steps, in their order."""
        while self._in_flight and not (last is not None and last.done()):
            future = self._in_flight.popleft()
            try:
                future.set_result(take_output(self._translator, future.step, future.handle.result()))
            except Exception as error:
                report_failure(error)
                future.set_exception(error)
                if last is None:
                    raise

    # Failures

    def register_failure_callback(self, callback: Callable[[], None]) -> None:
        """vLLM's callback ends the engine. It is called from a thread of hal's when a rank dies, also when idle."""
        self._hal.on_failure(lambda error: callback())

    def check_health(self) -> None:
        error = self._hal.health()
        if error is not None:
            raise error

    def shutdown(self) -> None:
        hal, self._hal = getattr(self, "_hal", None), None
        if hal is not None:
            hal.shutdown()
            HalPlatform.released()

    # The rest

    def collective_rpc(self, method: Any, timeout: float | None = None, args: tuple[Any, ...] = (),
                       kwargs: dict[str, Any] | None = None, non_block: bool = False) -> Any:
        """Raises StateError: hal's ranks do not have the method, which the error names."""
        if method in _NOTHING:
            return _given([None], non_block)
        if method == "get_model_inspection":  # for repr(LLM), which names the model then
            return _given([], non_block)
        name = method if isinstance(method, str) else getattr(method, "__qualname__", repr(method))
        raise StateError("hal's ranks do not have this call of vLLM", got=name,
                         expected=f"one of {', '.join(sorted(_NOTHING))}")


def _failed(error: Exception) -> None:
    logger.error("hal's ranks have failed: %s", error)
    report_failure(error)


def _given(value: Any, non_block: bool) -> Any:
    if not non_block:
        return value
    future: Future[Any] = Future()
    future.set_result(value)
    return future


def checkpoint_directory(config: Any) -> str:
    """The directory of the checkpoint; a name of the Hugging Face hub is downloaded, or found in its cache."""
    import os

    name: str = config.model_config.model
    if os.path.isdir(name):
        return name
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "tokenizer*"]
    found: str = snapshot_download(name, revision=config.model_config.revision, allow_patterns=patterns,
                                   cache_dir=config.load_config.download_dir, token=config.model_config.hf_token,
                                   ignore_patterns=config.load_config.ignore_patterns)
    return found
