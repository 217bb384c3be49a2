"""The plug-in acts when it is asked for, and refuses by name what it cannot honour."""

from __future__ import annotations

from typing import Any

import hal_vllm
import pytest
from served import serving
from vllm.v1.core.sched.output import SchedulerOutput

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
    ({"kv_cache_memory_bytes": 1 << 20}, "kv_cache_memory_bytes"), ({"logprobs_mode": "raw_logits"}, "logprobs_mode"),
    ({"load_format": "tensorizer"}, "load_format"), ({"hf_overrides": {"num_hidden_layers": 2}}, "hf_overrides"),
    ({"hal": {"speed": 3}}, "additional_config"), ({"enable_sleep_mode": True}, "(?i)sleep")])
def test_options_that_hal_would_not_honour_are_refused_by_name(options: dict[str, Any], name: str) -> None:
    with pytest.raises(Exception, match=name), serving(**options):  # vLLM wraps some errors of its configuration
        pass


def test_content_of_a_step_that_would_be_ignored_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from hal_vllm import translate

    step = SchedulerOutput.make_empty()
    translate.refuse_unknown(step)
    step.scheduled_spec_decode_tokens = {"a": [1]}
    with pytest.raises(RequestError, match=r"SchedulerOutput\.scheduled_spec_decode_tokens"):
        translate.refuse_unknown(step)
    step = SchedulerOutput.make_empty()
    monkeypatch.setitem(translate._MUST_BE_EMPTY, SchedulerOutput, ("made_up",))
    step.made_up = {}  # a field of a later vLLM, without content
    translate.refuse_unknown(step)
    step.made_up = {"a": 1}
    with pytest.raises(RequestError, match=r"SchedulerOutput\.made_up"):
        translate.refuse_unknown(step)


def test_an_error_names_remote_calls_that_ranks_do_not_have(cpu: Any) -> None:
    with pytest.raises(Exception, match="save_sharded_state"):
        cpu.llm_engine.engine_core.engine_core.model_executor.save_sharded_state("/nowhere")
