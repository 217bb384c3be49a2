"""Damaged and hostile JSON files of a checkpoint: each ends as a named error or as a configuration that can be run."""

from __future__ import annotations

import functools
import json
import math
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hal.checkpoints.hf_config import parse_config, read_config
from hal.config import Topology
from hal.contracts.communicator import LocalCommunicator
from hal.errors import ConfigError, ModelLoadError
from hal.model_config import ModelConfig
from hal.models import build_model
from hal.models.families import NATIVE
from hal.models.ops import Ops
from hal.models.rope import inverse_frequencies

# Those whose parsers read different keys.
KINDS = {name: NATIVE[name].model_type for name in (
    "LlamaForCausalLM", "Qwen2ForCausalLM", "GPT2LMHeadModel", "Gemma3ForCausalLM", "Phi3ForCausalLM")}
BASE: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "hidden_act": "silu",
    "head_dim": 16, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False, "attention_bias": False,
    "mlp_bias": False, "torch_dtype": "float32", "dtype": "float32", "rope_theta": 10000.0}
KEYS = [*BASE, "architectures", "model_type", "rope_scaling", "rope_parameters", "sliding_window", "layer_types",
        "use_sliding_window", "max_window_layers", "quantization_config", "n_embd", "n_layer", "n_head", "n_inner",
        "n_positions", "activation_function", "layer_norm_epsilon", "partial_rotary_factor", "scale_attn_weights",
        "scale_attn_by_inverse_layer_idx", "add_cross_attention", "original_max_position_embeddings", "no_rope_layers",
        "no_rope_layer_interval", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping",
        "hidden_activation", "rope_local_base_freq", "sliding_window_pattern", "use_bidirectional_attention"]
NUMBERS: list[Any] = [0, -1, 1, 2, 3, 7, 10**7, 2**31 - 1, 2**31, 2**63, 2**64, 10**30, 10**400, -10**400, 1.5, -0.0,
                      1e-45, 1e-300, 1e38, 1e300, math.nan, math.inf, -math.inf, True, False, None]
OTHERS: list[Any] = ["", "x", "5", "torch.", "auto", "\ud800", "\x1b[2J", "x" * 10**5, "LlamaForCausalLM", "llama", [],
                     [1], [None], [[1]], [{"a": 1}], [-1, 2**63], ["LlamaForCausalLM", 1], [["LlamaForCausalLM"]],
                     ["full_attention"] * 2, ["sliding_attention", "full_attention"], [0] * 1000, {}, {"a": 1}]
ROPE_KEYS = ["rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor",
             "original_max_position_embeddings", "partial_rotary_factor", "beta_fast", "beta_slow", "truncate",
             "mscale", "mscale_all_dim", "attention_factor", "short_factor", "long_factor"]


def ropes(draw: random.Random, count: int) -> Iterator[dict[str, Any]]:
    """Rope parameters of which one or two values are spoilt."""
    for _ in range(count):
        kind = draw.choice(["default", "linear", "dynamic", "llama3", "yarn", "longrope"])
        rope = {"rope_type": kind, "rope_theta": 1e4,
                "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 2.0,
                "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
        for key in draw.sample(ROPE_KEYS, draw.randint(1, 2)):
            rope[key] = draw.choice(NUMBERS + OTHERS)
        yield rope


@functools.cache  # most of the changed keys change nothing in a configuration
def assert_runs(config: ModelConfig) -> None:
    """Every value is one that a model can compute with, and a model of few layers can be built."""
    sizes = (config.vocab_size, config.hidden_size, config.num_layers, config.num_heads, config.num_kv_heads,
             config.head_dim, config.intermediate_size, config.max_position)
    assert all(type(size) is int and 1 <= size <= 1 << 24 for size in sizes) and config.num_params <= 10**13
    assert len(config.windows) == config.num_layers and all(w is None or 1 <= w < 2**31 for w in config.windows)
    assert all(-1 <= i < 2**31 for i in (*config.eos_token_ids, config.bos_token_id or 0))
    assert config.dtype in ("float32", "float16", "bfloat16")
    zeros = torch.zeros(4)
    assert (zeros * (zeros.square().mean() + config.norm_eps).rsqrt()).isfinite().all()
    for rope in filter(None, (config.rope, config.local_rope)):
        frequencies = inverse_frequencies(rope, config.head_dim, config.max_position)
        assert math.isfinite(rope.attention_factor)
        assert frequencies.isfinite().all() and (frequencies >= 0).all()
        assert rope.scaling == "longrope" or (frequencies <= 1).all()
    if config.num_layers <= 4:
        build_model(config, Topology(), LocalCommunicator(), Ops(), torch.float32, torch.device("meta"))


def outcome(data: dict[str, Any]) -> bool:
    """Whether the configuration is accepted. Any other exception than a named one fails the test."""
    try:
        config = parse_config(data)
    except (ModelLoadError, ConfigError) as error:
        text = str(error)
        text.encode("utf-8")
        assert len(text) < 1000 and text.replace("\n", "").isprintable()
        return False
    assert_runs(config)
    return True


@pytest.mark.slow
@pytest.mark.parametrize("architecture", KINDS)
def test_every_key_with_every_value(architecture: str) -> None:
    accepted = refused = 0
    for key in KEYS:
        for value in NUMBERS + OTHERS:
            if outcome({"architectures": [architecture], "model_type": KINDS[architecture], **BASE, key: value}):
                accepted += 1
            else:
                refused += 1
    assert accepted > 200 and refused > 200


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [a for a in KINDS if a != "GPT2LMHeadModel"])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_rope_parameters(architecture: str, key: str) -> None:
    results = {outcome({"architectures": [architecture], **BASE, key: rope}) for rope in ropes(random.Random(5), 800)}
    assert results == {True, False}


def test_several_keys_at_once() -> None:
    draw, results = random.Random(7), set()
    for _ in range(3000):
        architecture = draw.choice(list(KINDS))
        data = {"architectures": [architecture], "model_type": KINDS[architecture], **BASE}
        for key in draw.sample(list(data) + KEYS, draw.randint(1, 4)):
            if draw.random() < 0.2:
                data.pop(key, None)
            else:
                data[key] = draw.choice(NUMBERS + OTHERS)
        results.add(outcome(data))
    assert results == {True, False}


@pytest.mark.parametrize(("change", "expected"), [
    ({"num_hidden_layers": 10**7}, "1 to 1024"), ({"vocab_size": 10**12}, "1 to 4194304"),
    ({"max_position_embeddings": 1 << 25}, "1 to 16777216"),
    ({"num_hidden_layers": 1024, "hidden_size": 1 << 17, "intermediate_size": 1 << 20, "num_attention_heads": 1024,
      "num_key_value_heads": 1024, "head_dim": 128}, "at most 10000000000000"),
    ({"num_attention_heads": 128, "num_key_value_heads": 1, "head_dim": None}, "must then give head_dim"),
    ({"rms_norm_eps": 0}, "1e-30 to 1"), ({"rms_norm_eps": -1e-6}, "rms_norm_eps"),
    ({"rope_theta": 0}, "1 to 1e"), ({"rope_theta": 0.5}, "rope_theta"), ({"rope_theta": 1e16}, "rope_theta"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}},
     "low_freq_factor"),
    ({"eos_token_id": 2**31}, "eos_token_id"), ({"bos_token_id": -2}, "bos_token_id")])
def test_values_out_of_range_are_refused_by_name(change: dict[str, Any], expected: str) -> None:
    started = time.monotonic()
    with pytest.raises(ModelLoadError, match=expected):
        parse_config({"architectures": ["LlamaForCausalLM"], **BASE, **change})
    assert time.monotonic() - started < 5.0  # ten million layers took minutes


DEEP = b'{"a":' + b"[" * 100000 + b"]" * 100000 + b"}"
BAD_FILES = {"deep": DEEP, "huge integer": b'{"eos_token_id": ' + b"9" * 10000 + b"}", "latin-1": b'{"a": "\xe4"}',
             "empty": b"", "text": b"x", "list": b"[]", "null": b"null", "zeros": b"\0" * 100,
             "cut": b'{"eos_token_id": ', "ids": b'{"eos_token_id": [1, [2]]}', "id": b'{"eos_token_id": 1e999}',
             "large id": b'{"eos_token_id": 1' + b"0" * 400 + b"}", "bom": b"\xef\xbb\xbf{}"}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **BASE}))
    return tmp_path


@pytest.mark.parametrize("kind", BAD_FILES)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_files_that_are_damaged(directory: Path, name: str, kind: str) -> None:
    content = BAD_FILES[kind]
    if name == "config.json" and content.startswith(b'{"eos'):
        content = b'{"model_type": "llama", ' + content[1:]
    (directory / name).write_bytes(content)
    with pytest.raises(ModelLoadError, match=name.replace(".", r"\.")):
        read_config(directory)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_a_file_that_is_too_large_is_not_read(directory: Path, name: str) -> None:
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", **BASE, "dtype": "auto"}))
    with open(directory / name, "ab") as file:
        file.truncate(10**12)  # sparse
    with pytest.raises(ModelLoadError, match="too large"):
        read_config(directory)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json",
                                  "model.safetensors"])
def test_a_named_pipe_does_not_block(directory: Path, name: str) -> None:
    content = json.dumps({"model_type": "llama", **BASE, "torch_dtype": "auto", "dtype": "auto"})
    (directory / "config.json").write_text(content)
    (directory / name).unlink(missing_ok=True)
    os.mkfifo(directory / name)
    if name == "config.json":
        with pytest.raises(ModelLoadError, match=r"no config\.json"):
            read_config(directory)
    else:
        assert read_config(directory).eos_token_ids == (2,)


@pytest.mark.parametrize("mapped", [None, 3, "x", [], [["a", "b"]], {"lm_head.weight": None}, {"lm_head.weight": [[]]},
                                    {"lm_head.weight": {}}, {"lm_head.weight": 2**70}, {"lm_head.weight": "../x"},
                                    {"\ud800": "\ud800"}, {"model.norm.weight": "a", "norm.weight": "a"}])
def test_an_index_that_is_damaged(directory: Path, mapped: object) -> None:
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", **BASE, "tie_word_embeddings": True}))
    (directory / "a").touch()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": mapped}))
    with pytest.raises(ModelLoadError) as caught:
        read_config(directory)
    str(caught.value).encode()


@pytest.mark.parametrize("path", ["x" * 5000, "\0", "\udc80", "a/\0/b"])
def test_paths_that_no_file_can_have(path: str) -> None:
    with pytest.raises(ModelLoadError, match="does not exist"):
        read_config(path)
