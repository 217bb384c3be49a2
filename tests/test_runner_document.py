"""The code of docs/runner.md runs, block after block, and prints what the text shows behind each block."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import fields
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch

from hal.checkpoints.hf_config import read_config
from hal.config import BUNDLED_MODEL, Topology
from hal.contracts.communicator import LocalCommunicator
from hal.errors import ConfigError
from hal.model_config import ModelConfig, RopeConfig
from hal.models import build_model
from hal.models.causal_lm import CausalLM
from hal.models.ops import Ops
from hal.models.parts import PLAIN, parts_of, refuse_parts

DOCUMENT = Path(__file__).parents[1] / "docs" / "runner.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```\n\n((?:    [^\n]*\n)+)", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)


def test_every_block_prints_what_is_shown() -> None:
    assert len(BLOCKS) == DOCUMENT.read_text().count("```python") == 4
    names: dict[str, object] = {"__name__": "runner_document"}
    for code, shown in BLOCKS:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(code, str(DOCUMENT), "exec"), names)
        assert out.getvalue() == dedent(shown)


SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4,
                         "head_dim": 8, "intermediate_size": 64, "max_position": 64}
BIASES = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}
LLAMA: dict[str, Any] = {**SIZES, "family": "llama", "architecture": "Qwen3ForCausalLM", "rope": RopeConfig()}
GPT2: dict[str, Any] = {**SIZES, **BIASES, "family": "gpt2", "architecture": "GPT2LMHeadModel", "gated": False,
                        "activation": "gelu_tanh", "embedding_name": "wte"}


def built(**config: Any) -> CausalLM:
    cpu = torch.device("cpu")
    return build_model(ModelConfig(**config), Topology(), LocalCommunicator(), Ops(), torch.float32, cpu)


@pytest.mark.parametrize(("title", "config"), [("Llama family", {**LLAMA, **BIASES, "qk_norm": True}), ("GPT-2", GPT2)])
def test_the_tables_name_every_parameter(title: str, config: dict[str, Any]) -> None:
    table = DOCUMENT.read_text().partition(f"| {title} (")[2].partition("\n\n")[0].partition("\n")[2]
    told = set(re.findall(r"`([^`]+)`", table))
    assert told == {re.sub(r"\b\d+\b", "N", name) for name, _ in built(**config).named_parameters()}


def test_a_plain_llama_has_no_parts_and_every_field_is_judged() -> None:
    bundled = build_model(read_config(BUNDLED_MODEL), Topology(), LocalCommunicator(), Ops(), torch.float32,
                          torch.device("cpu"))
    assert parts_of(bundled) == {} and {f.name for f in fields(ModelConfig)} >= PLAIN
    refuse_parts(bundled, "mine")


@pytest.mark.parametrize(("config", "parts"), [
    ({**LLAMA, **BIASES, "qk_norm": True}, {"qkv_bias", "out_bias", "mlp_bias", "qk_norm"}),
    ({**LLAMA, "windows": (8, None), "local_rope": RopeConfig(theta=7.0)}, {"windows", "local_rope"}),
    ({**LLAMA, "architecture": "Gemma3ForCausalLM", "embedding_scale": 2.0}, {"embedding_scale", "norms"}),
    ({**LLAMA, "logits_softcap": 30.0, "no_rope": (1,)}, {"logits_softcap", "no_rope"}),
    (GPT2, {"family", "gated", "activation", "no_positions", *BIASES})])
def test_a_runner_refuses_parts_by_name(config: dict[str, Any], parts: set[str]) -> None:
    model = built(**config)
    assert parts_of(model).keys() == parts
    refuse_parts(model, "mine", parts)
    for part in parts:
        with pytest.raises(ConfigError, match=f"mine does not compute.*\n.*{part}="):
            refuse_parts(model, "mine", parts - {part})
