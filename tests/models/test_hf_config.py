"""config.json in both spellings, defaults against transformers, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hal.checkpoints.hf_config import parse_config, read_config
from hal.errors import ModelLoadError
from hal.model_config import ModelConfig, RopeConfig
from hal.models.families import NATIVE

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
KINDS = {name: family.model_type for name, family in NATIVE.items()}


def test_reading_a_config_loads_no_torch() -> None:
    code = "import sys, hal.checkpoints.hf_config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _windows(config: Any) -> tuple[int | None, ...]:
    layers, window = config.num_hidden_layers, getattr(config, "sliding_window", None) or None
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    return tuple(window if t == "sliding_attention" else None for t in types)


def _assert_same(ours: ModelConfig, theirs: Any) -> None:
    """Field by field what transformers understands, with its attribute names."""
    kv = getattr(theirs, "num_key_value_heads", theirs.num_attention_heads)
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert (ours.vocab_size, ours.hidden_size, ours.num_layers, ours.num_heads, ours.num_kv_heads, ours.head_dim,
            ours.max_position, ours.tie_embeddings, ours.bos_token_id) == (
        theirs.vocab_size, theirs.hidden_size, theirs.num_hidden_layers, theirs.num_attention_heads, kv, head_dim,
        theirs.max_position_embeddings, theirs.tie_word_embeddings, theirs.bos_token_id)
    eos = theirs.eos_token_id
    assert ours.eos_token_ids == (tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,))
    if ours.embedding_name == "wte":
        assert ours.intermediate_size == (theirs.n_inner or 4 * theirs.n_embd)
        assert ours.norm_eps == theirs.layer_norm_epsilon and ours.rope is None
    else:
        assert ours.intermediate_size == theirs.intermediate_size and ours.norm_eps == theirs.rms_norm_eps
        assert ours.windows == _windows(theirs)
        assert ours.rope is not None
        params = theirs.rope_parameters.get("full_attention", theirs.rope_parameters)
        local = theirs.rope_parameters.get("sliding_attention", params)
        for rope, given in ((ours.rope, params), (ours.local_rope or ours.rope, local)):
            kind = given["rope_type"]
            assert (rope.theta, rope.scaling) == (given["rope_theta"], "none" if kind == "default" else kind)
            assert (rope.rotary_dim or head_dim) == int(head_dim * given.get("partial_rotary_factor", 1.0))
        assert ours.attention_softcap == getattr(theirs, "attn_logit_softcapping", None)
        assert ours.logits_softcap == getattr(theirs, "final_logit_softcapping", None)
        assert [i not in ours.no_rope for i in range(ours.num_layers)] == [
            bool(x) for x in getattr(theirs, "no_rope_layers", [1] * ours.num_layers)]


@pytest.mark.parametrize("architecture", KINDS)
def test_defaults_are_those_of_transformers(architecture: str) -> None:
    from transformers import AutoConfig

    kind = KINDS[architecture]
    if kind == "glm4_moe":
        pytest.skip("its default heads do not divide its hidden size, so that no head_dim follows")
    _assert_same(parse_config({"model_type": kind}), AutoConfig.for_model(kind))


@pytest.mark.parametrize("name", checkpoints.NAMES)
def test_saved_by_transformers(checkpoint: Callable[[str], Path], name: str) -> None:
    from transformers import AutoConfig

    path = checkpoint(name)
    _assert_same(read_config(path), AutoConfig.from_pretrained(path, trust_remote_code=False))
    assert read_config(path).dtype == "float32"


_ROPES = st.one_of(
    st.just({}), st.fixed_dictionaries({"rope_type": st.just("default")}),
    st.fixed_dictionaries({"rope_type": st.sampled_from(["linear", "dynamic"]), "factor": st.floats(1.0, 32.0)}),
    st.fixed_dictionaries({"rope_type": st.just("llama3"), "factor": st.floats(1.0, 32.0),
                           "low_freq_factor": st.floats(0.5, 2.0), "high_freq_factor": st.floats(3.0, 8.0),
                           "original_max_position_embeddings": st.integers(16, 8192)}))


@given(rope=_ROPES, theta=st.floats(1e3, 1e7), short=st.booleans(), nulls=st.booleans())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_old_and_new_spelling_of_rope_agree(rope: dict[str, Any], theta: float, short: bool, nulls: bool) -> None:
    old_rope = dict(rope)
    if short and "rope_type" in old_rope:
        old_rope["type"] = old_rope.pop("rope_type")  # as before transformers 4.43
    old = {**LLAMA, "rope_theta": theta, "rope_scaling": old_rope or None}
    new = {**LLAMA, "rope_parameters": {"rope_type": "default", **rope, "rope_theta": theta}}
    if nulls:
        new["rope_scaling"] = None
    parsed = parse_config(old).rope
    assert parsed == parse_config(new).rope and parsed is not None and parsed.theta == theta
    if "factor" in rope:
        assert (parsed.factor, parsed.scaling) == (rope["factor"], rope["rope_type"])


def test_published_configurations() -> None:
    """The spellings that are out there, abridged: Llama 3.1 8B, Mistral 7B v0.3, Qwen2.5 0.5B, GPT-2."""
    llama = parse_config({**LLAMA, "attention_bias": False, "bos_token_id": 128000,
                          "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu",
                          "hidden_size": 4096, "intermediate_size": 14336,
                          "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 32,
                          "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
                          "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                           "original_max_position_embeddings": 8192, "rope_type": "llama3"},
                          "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
                          "vocab_size": 128256})
    assert llama == ModelConfig(
        family="llama", architecture="LlamaForCausalLM", vocab_size=128256, hidden_size=4096, num_layers=32,
        num_heads=32, num_kv_heads=8, head_dim=128, intermediate_size=14336, max_position=131072, norm_eps=1e-5,
        rope=RopeConfig(theta=500000.0, scaling="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                        original_max_position=8192),
        windows=(None,) * 32, bos_token_id=128000, eos_token_ids=(128001, 128008, 128009), dtype="bfloat16")
    mistral = parse_config({"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None,
                            "rope_theta": 1000000.0, "num_key_value_heads": 8})
    assert mistral.windows == (None,) * 32 and mistral.rope == RopeConfig(theta=1e6)
    assert not (mistral.qkv_bias or mistral.out_bias or mistral.mlp_bias or mistral.qk_norm)
    qwen = parse_config({"architectures": ["Qwen2ForCausalLM"], "hidden_size": 896, "num_attention_heads": 14,
                         "num_key_value_heads": 2, "num_hidden_layers": 24, "max_window_layers": 21,
                         "sliding_window": 32768, "use_sliding_window": False, "tie_word_embeddings": True})
    assert qwen.qkv_bias and not qwen.out_bias and qwen.head_dim == 64 and qwen.tie_embeddings
    assert qwen.windows == (None,) * 24
    gpt2 = parse_config({"model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12,
                         "n_positions": 1024, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
                         "vocab_size": 50257})
    assert (gpt2.architecture, gpt2.activation, gpt2.intermediate_size) == ("GPT2LMHeadModel", "gelu_tanh", 3072)
    assert gpt2.tie_embeddings and gpt2.qkv_bias and gpt2.out_bias and gpt2.mlp_bias


def test_features_reach_the_config() -> None:
    biased = parse_config({**LLAMA, "attention_bias": True, "mlp_bias": True})
    assert biased.qkv_bias and biased.out_bias and biased.mlp_bias
    qwen3 = parse_config({"model_type": "qwen3", "attention_bias": True})
    assert qwen3.qkv_bias and qwen3.out_bias and qwen3.qk_norm and qwen3.head_dim == 128
    types = ["sliding_attention", "full_attention"]
    mixed = parse_config({"model_type": "qwen2", "num_hidden_layers": 2, "layer_types": types, "sliding_window": 7,
                          "use_sliding_window": True})
    assert mixed.windows == (7, None)


@pytest.mark.parametrize(("change", "named"), [
    ({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}, "Qwen3ForCausalLM"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    ({"architectures": None, "model_type": None}, "architectures"),
    ({"model_type": "qwen2"}, "qwen2"),
    ({"quantization_config": {"quant_method": "exl2"}}, "quantization_config"),
    ({"rope_scaling": {"type": "yarn"}}, "factor"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}, "sliding_attention": {}}}, "type of layer"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    ({"rope_scaling": {"type": "linear"}}, "factor"),
    ({"rope_scaling": {"type": "proportional", "factor": 2.0}}, "proportional"),
    ({"rope_scaling": {"type": "longrope", "long_factor": [1.0] * 64}}, "short_factor"),
    ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 64}}, "64 numbers"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"hidden_size": "4096"}, "hidden_size"),
    ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ({"num_hidden_layers": True}, "num_hidden_layers"),
    ({"num_key_value_heads": 5}, "5 and 32"),
    ({"head_dim": 33}, "head_dim"),
    ({"attention_bias": "yes"}, "attention_bias"),
    ({"eos_token_id": [2, "x"]}, "eos_token_id"),
    ({"torch_dtype": "int8"}, "int8"),
    ({"rope_theta": "big"}, "rope_theta"),
])
def test_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelLoadError) as caught:
        parse_config({**LLAMA, **change})
    assert named in str(caught.value)


@pytest.mark.parametrize(("change", "named"), [
    ({"scale_attn_weights": False}, "scale_attn_weights"), ({"scale_attn_by_inverse_layer_idx": True}, "inverse_layer"),
    ({"add_cross_attention": True}, "cross"), ({"activation_function": "silu"}, "silu"), ({"n_head": 7}, "n_head")])
def test_refused_of_gpt2(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelLoadError) as caught:
        parse_config({"model_type": "gpt2", **change})
    assert named in str(caught.value)


@pytest.mark.parametrize(("change", "expected"), [
    ({"hidden_size": "64"}, "an integer"), ({"rms_norm_eps": "1e-5"}, "a number"), ({"rope_scaling": [1]}, "an object"),
    ({"tie_word_embeddings": "true"}, "true or false"), ({"layer_types": "full_attention"}, "a list"),
    ({"hidden_act": None}, "a text"), ({"eos_token_id": {}}, "an integer or a list")])
def test_a_value_of_another_type_is_refused_in_the_words_of_json(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(ModelLoadError) as caught:
        parse_config({**LLAMA, **({"model_type": "qwen3", "architectures": None} if "layer_types" in change else {}),
                      **change})
    assert caught.value.expected == expected


def test_an_architecture_that_is_null_is_that_of_the_model_type() -> None:
    assert parse_config({**LLAMA, "architectures": [None]}) == parse_config(LLAMA)


def test_a_path_that_leads_to_something_else_says_what_to_give(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelLoadError, match="holds an adapter and no model") as caught:
        read_config(tmp_path)
    assert "--adapter NAME=DIR" in str(caught.value.hint)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text(json.dumps(LLAMA))
        with pytest.raises(ModelLoadError, match="is a file and no directory") as caught:
            read_config(tmp_path / name)
        assert str(tmp_path) in str(caught.value.hint)


def test_files(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="does not exist"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(ModelLoadError, match=r"no config\.json"):
        read_config(tmp_path)
    for text in ("{", "[]", "\0"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelLoadError, match=r"config\.json"):
            read_config(tmp_path)


@pytest.mark.parametrize("spelling", [{}, {"dtype": "auto"}, {"torch_dtype": "auto"}, {"dtype": None}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_left_open_is_that_of_the_stored_weights(tmp_path: Path, spelling: dict[str, Any], dtype: str) -> None:
    import torch
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **spelling}))
    assert read_config(tmp_path).dtype == "float32"  # nothing is stored yet
    tensors = {"model.norm.weight": torch.ones(4), "model.embed_tokens.weight": torch.ones(4, 4)}
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].to(getattr(torch, dtype))
    save_file(tensors, tmp_path / "model.safetensors")
    assert read_config(tmp_path).dtype == dtype and read_config(tmp_path, weights=False).dtype == "float32"
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "dtype": "float16"}))
    assert read_config(tmp_path).dtype == "float16"


@pytest.mark.parametrize(("generation", "expected"), [
    (None, (2,)), ({}, (2,)), ({"eos_token_id": None}, (2,)), ({"eos_token_id": 7}, (7,)),
    ({"eos_token_id": [7, 8]}, (7, 8))])
def test_generation_config_replaces_eos(tmp_path: Path, generation: dict[str, Any] | None,
                                        expected: tuple[int, ...]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert read_config(tmp_path).eos_token_ids == expected
