"""The plug-in acts when it is asked for, and refuses by name what it cannot honour."""

from __future__ import annotations

import dataclasses
from typing import Any

import hal_vllm
import pytest
import torch
from hal_vllm.fields import refuse_unknown
from served import bundled, serving
from vllm import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

from hal.errors import RequestError


@pytest.mark.parametrize(("arguments", "device"), [
    (["serve", "m", "--additional-config", '{"hal": {"device": "cpu"}}'], "cpu"),
    (['--additional-config={"hal": {"device": "null"}}'], "null"),
    (['--additional_config={"hal": {"device": "null"}}'], "null"),
    (["--additional-config.hal.device", "fake"], "fake"), (["--additional-config.hal.device=fake"], "fake"),
    (["--additional-config", '{"other": 1}'], None), (["--additional-config", "{"], None),
    (["--additional-config"], None), (["serve", "hal", "--device", "cpu"], None)])
def test_the_device_is_found_on_the_command_line(arguments: list[str], device: str | None) -> None:
    assert hal_vllm.device_in(arguments) == device


def test_the_plugin_stays_out_of_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HAL_DEVICE")
    monkeypatch.setattr("sys.argv", ["vllm", "serve", "m"])
    assert hal_vllm.register() is None
    monkeypatch.setenv("HAL_DEVICE", "cpu")
    assert hal_vllm.register() == "hal_vllm.platform.HalPlatform"


@pytest.mark.parametrize(("options", "name"), [
    ({"logprobs_mode": "raw_logits"}, "logprobs_mode"), ({"load_format": "tensorizer"}, "load_format"),
    ({"hf_overrides": {"num_hidden_layers": 2}}, "hf_overrides"), ({"hal": {"speed": 3}}, "additional_config"),
    ({"enable_sleep_mode": True}, "(?i)sleep"), ({"model_impl": "vllm"}, "model_impl"),
    ({"attention_backend": "FLASH_ATTN"}, r"attention_config\.backend"),
    ({"compilation_config": {"cudagraph_capture_sizes": [1, 2]}}, r"compilation_config\."),
    ({"enable_lora": True}, "lora_config"), ({"quantization": "fp8", "dtype": "bfloat16"}, "quantization"),
    ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}},
     "speculative_config"), ({"kv_offloading_size": 1}, "kv_offloading_size|kv_transfer_config"),
    ({"use_fp64_gumbel": True}, r"model_config\.use_fp64_gumbel"),
    ({"data_parallel_size": 2}, "data_parallel_size"), ({"worker_extension_cls": "x.Y"}, "worker_extension_cls")])
def test_options_that_hal_would_not_honour_are_refused_by_name(options: dict[str, Any], name: str) -> None:
    with pytest.raises(Exception, match=name), serving(**options):  # vLLM wraps some errors of its configuration
        pass


def test_a_new_option_of_a_later_vllm_is_refused_only_if_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The later release derives one of its new options by itself; the user sets the other."""
    from hal_vllm import allowed
    from vllm.engine.arg_utils import EngineArgs

    @dataclasses.dataclass
    class LaterConfig:
        speed: int
        derived: int

    def later(config: Any) -> None:
        users = not allowed._checked
        config.kernel_config = LaterConfig(asked if users else 1, config.scheduler_config.max_num_seqs * 2)
        allowed.check_options(config)

    monkeypatch.setattr("hal_vllm.platform.check_options", later)
    asked = 1
    assert EngineArgs(bundled(), max_num_seqs=3).create_engine_config().kernel_config == LaterConfig(1, 6)
    asked = 2
    with pytest.raises(ValueError, match=r"kernel_config\.speed"):
        EngineArgs(bundled(), max_num_seqs=3).create_engine_config()


def test_a_configuration_may_be_copied_after_it_was_checked() -> None:
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(bundled(), max_num_seqs=3).create_engine_config()
    assert dataclasses.replace(config).parallel_config.worker_cls == "hal_vllm.executor.HalExecutor"


def test_content_of_a_step_that_would_be_ignored_is_refused_by_name() -> None:
    step = SchedulerOutput.make_empty()
    refuse_unknown(step)
    step.scheduled_spec_decode_tokens = {"a": [1]}
    with pytest.raises(RequestError, match=r"SchedulerOutput\.scheduled_spec_decode_tokens"):
        refuse_unknown(step)
    new = NewRequestData("a", [1], [], SamplingParams(), None, ([1],), 0, None)
    refuse_unknown(new)
    new.prompt_embeds = torch.zeros(2, 3)
    with pytest.raises(RequestError, match=r"NewRequestData\.prompt_embeds"):
        refuse_unknown(new)


@pytest.mark.parametrize("base", [SchedulerOutput, CachedRequestData])
def test_a_new_field_of_a_later_step_is_refused_by_name_if_it_has_content(base: Any) -> None:
    @dataclasses.dataclass
    class Later(base):
        made_up: dict[str, int] = dataclasses.field(default_factory=dict)
        times: int = 1  # the default of a new field need not be empty

    Later.__name__ = base.__name__
    step = Later.make_empty()
    refuse_unknown(step)
    step.times = 2
    with pytest.raises(RequestError, match=rf"{base.__name__}\.times"):
        refuse_unknown(step)
    step.times, step.made_up = 1, {"a": 1}
    with pytest.raises(RequestError, match=rf"{base.__name__}\.made_up"):
        refuse_unknown(step)


def test_an_error_names_remote_calls_that_ranks_do_not_have(cpu: Any) -> None:
    with pytest.raises(Exception, match="save_sharded_state"):
        cpu.llm_engine.engine_core.engine_core.model_executor.save_sharded_state("/nowhere")


def test_the_representation_names_the_model(cpu: Any) -> None:
    assert repr(cpu).startswith("LLM(model=")
