"""Read a Hugging Face checkpoint's config.json, as old and new transformers write it. Torch-free.

A key that is missing takes the default that transformers has for that architecture. What would change results and is
not implemented is refused, never ignored; keys that transformers itself ignores for an architecture are ignored here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hal.errors import ModelLoadError
from hal.models.config import ModelConfig, RopeConfig

_MISSING = object()
_GELU = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu": "gelu",
         "relu": "relu"}
_DTYPES = {"float32": "float32", "float64": "float32", "float16": "float16", "half": "float16", "bfloat16": "bfloat16"}
_LAYER_TYPES = ("full_attention", "sliding_attention")


def read_config(directory: str | Path) -> ModelConfig:
    """The shape of the model in a checkpoint directory. The end-of-sequence ids of generation_config.json, where it has
    any, replace those of config.json, as in transformers' `generate`.

    Raises:
        ModelLoadError: the directory or config.json is missing, is not JSON, or describes something unsupported.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ModelLoadError("the model directory does not exist", got=directory,
                             expected="a directory with config.json and *.safetensors in Hugging Face format")
    config = parse_config(_read_json(directory / "config.json"))
    generation = directory / "generation_config.json"
    if generation.is_file():
        ids = _token_ids(_Reader(_read_json(generation)), None)
        if ids:
            config = dataclasses.replace(config, eos_token_ids=ids)
    return config


def parse_config(data: dict[str, Any]) -> ModelConfig:
    """The same from the content of config.json.

    Raises:
        ModelLoadError: an unsupported architecture or feature, or a value of the wrong type.
    """
    read = _Reader(data)
    names = data.get("architectures") or []
    kind = data.get("model_type")
    if not names:
        names = [a for a, (k, _) in _ARCHITECTURES.items() if k == kind]
    architecture = names[0] if isinstance(names, list) and names else kind
    if architecture not in _ARCHITECTURES:
        raise ModelLoadError("this architecture is not supported", got=architecture or "neither architectures nor "
                             "model_type in config.json", expected=", ".join(_ARCHITECTURES))
    model_type, parse = _ARCHITECTURES[architecture]
    if kind not in (None, model_type):
        raise ModelLoadError("architectures and model_type of config.json contradict each other",
                             got=f"{architecture} and {kind!r}", expected=f"model_type {model_type!r}")
    read.refuse("quantization_config", "quantised weights", None)
    config = parse(read, architecture)
    _check_shape(config)
    return config


class _Reader:
    """Typed access to config.json; each method raises ModelLoadError naming the key."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data

    def get(self, kinds: type | tuple[type, ...], default: Any, *names: str, null: Any = _MISSING) -> Any:
        """The first of `names` that is present (the others are its aliases); `null` is what a JSON null means."""
        for name in names:
            value = self.data.get(name, _MISSING)
            if value is None and null is not _MISSING:
                return null
            if value is not _MISSING:
                if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
                    wanted = kinds if isinstance(kinds, tuple) else (kinds,)
                    raise ModelLoadError(f"{name} in config.json is not usable", got=repr(value),
                                         expected=" or ".join(k.__name__ for k in wanted))
                return value
        return default

    def size(self, default: Any, *names: str, null: Any = _MISSING) -> Any:
        value = self.get(int, default, *names, null=null)
        if isinstance(value, int) and value < 1:
            raise ModelLoadError(f"{names[0]} in config.json is not usable", got=value, expected="an integer above 0")
        return value

    def number(self, default: float, *names: str) -> float:
        return float(self.get((int, float), default, *names))

    def flag(self, default: bool, name: str) -> bool:
        return bool(self.get(bool, default, name, null=default))

    def refuse(self, name: str, what: str, allowed: Any) -> None:
        value = self.data.get(name, allowed)
        if value is not None and value != allowed:
            raise ModelLoadError(f"config.json asks for {what}, which is not supported", got=f"{name} = {value!r}")


def _llama(read: _Reader, architecture: str) -> ModelConfig:
    return _decoder(read, architecture, vocab=32000, inner=11008, kv_heads=None, max_position=2048, bos=1, eos=2,
                    qkv_bias=read.flag(False, "attention_bias"), out_bias=read.flag(False, "attention_bias"),
                    mlp_bias=read.flag(False, "mlp_bias"))


def _mistral(read: _Reader, architecture: str) -> ModelConfig:
    window = read.size(4096, "sliding_window", null=None)
    if window and "full_attention" in (read.data.get("layer_types") or ()):
        read.refuse("layer_types", "a Mistral whose layers differ in their window", None)
    return _decoder(read, architecture, vocab=32000, inner=14336, kv_heads=8, max_position=131072, bos=1, eos=2,
                    windows=lambda layers: (window,) * layers)


def _qwen2(read: _Reader, architecture: str) -> ModelConfig:
    return _decoder(read, architecture, vocab=151936, inner=22016, kv_heads=32, max_position=32768, qkv_bias=True,
                    windows=lambda layers: _qwen_windows(read, layers))


def _qwen3(read: _Reader, architecture: str) -> ModelConfig:
    bias = read.flag(False, "attention_bias")
    return _decoder(read, architecture, vocab=151936, inner=22016, kv_heads=32, max_position=32768, head_dim=128,
                    qkv_bias=bias, out_bias=bias, qk_norm=True, windows=lambda layers: _qwen_windows(read, layers))


def _qwen_windows(read: _Reader, layers: int) -> tuple[int | None, ...]:
    window = read.size(4096, "sliding_window", null=None) if read.flag(False, "use_sliding_window") else None
    types = read.get(list, None, "layer_types", null=None)
    if types is None:
        first = read.get(int, 28, "max_window_layers")
        return tuple(window if i >= first else None for i in range(layers))
    if len(types) != layers or any(t not in _LAYER_TYPES for t in types):
        raise ModelLoadError("layer_types in config.json is not usable", got=types,
                             expected=f"{layers} entries, each one of {', '.join(_LAYER_TYPES)}")
    return tuple(window if t == "sliding_attention" else None for t in types)


def _decoder(read: _Reader, architecture: str, *, vocab: int, inner: int, kv_heads: int | None, max_position: int,
             bos: int | None = None, eos: int | None = None, head_dim: int | None = None,
             windows: Callable[[int], tuple[int | None, ...]] = lambda layers: (None,) * layers,
             **features: Any) -> ModelConfig:
    """What the Llama family shares; the arguments are the architecture's own defaults and features."""
    if read.get(str, "silu", "hidden_act") not in ("silu", "swish"):
        read.refuse("hidden_act", "another activation than silu", "silu")
    read.refuse("partial_rotary_factor", "rotary embedding over part of the head", 1.0)
    hidden, layers = read.size(4096, "hidden_size"), read.size(32, "num_hidden_layers")
    heads = read.size(32, "num_attention_heads")
    positions = read.size(max_position, "max_position_embeddings")
    own = read.size(head_dim, "head_dim", null=None)
    return ModelConfig(
        family="llama", architecture=architecture, vocab_size=read.size(vocab, "vocab_size"), hidden_size=hidden,
        num_layers=layers, num_heads=heads, head_dim=own or hidden // heads,
        num_kv_heads=read.size(kv_heads, "num_key_value_heads", null=heads) or heads,
        intermediate_size=read.size(inner, "intermediate_size"), max_position=positions,
        norm_eps=read.number(1e-6, "rms_norm_eps"), rope=_rope(read, positions), windows=windows(layers),
        tie_embeddings=read.flag(False, "tie_word_embeddings"), bos_token_id=_token_id(read, bos),
        eos_token_ids=_token_ids(read, eos), dtype=_dtype(read), **features)


def _gpt2(read: _Reader, architecture: str) -> ModelConfig:
    read.refuse("add_cross_attention", "cross attention", False)
    read.refuse("scale_attn_weights", "unscaled attention", True)
    read.refuse("scale_attn_by_inverse_layer_idx", "attention scaled by the layer's number", False)
    act = read.get(str, "gelu_new", "activation_function")
    if act not in _GELU:
        raise ModelLoadError("config.json asks for an activation that is not supported", got=act,
                             expected=", ".join(_GELU))
    hidden, layers = read.size(768, "n_embd", "hidden_size"), read.size(12, "n_layer", "num_hidden_layers")
    heads = read.size(12, "n_head", "num_attention_heads")
    if hidden % heads:
        raise ModelLoadError("n_head does not divide n_embd", got=f"{hidden} and {heads}")
    return ModelConfig(
        family="gpt2", architecture=architecture, vocab_size=read.size(50257, "vocab_size"), hidden_size=hidden,
        num_layers=layers, num_heads=heads, num_kv_heads=heads, head_dim=hidden // heads,
        intermediate_size=read.size(4 * hidden, "n_inner", null=4 * hidden),
        max_position=read.size(1024, "n_positions", "max_position_embeddings"),
        norm_eps=read.number(1e-5, "layer_norm_epsilon"), activation=_GELU[act], windows=(None,) * layers,  # type: ignore[arg-type]
        tie_embeddings=read.flag(True, "tie_word_embeddings"), qkv_bias=True, out_bias=True, mlp_bias=True,
        bos_token_id=_token_id(read, 50256), eos_token_ids=_token_ids(read, 50256), dtype=_dtype(read))


_ARCHITECTURES: dict[str, tuple[str, Callable[[_Reader, str], ModelConfig]]] = {
    "LlamaForCausalLM": ("llama", _llama), "MistralForCausalLM": ("mistral", _mistral),
    "Qwen2ForCausalLM": ("qwen2", _qwen2), "Qwen3ForCausalLM": ("qwen3", _qwen3), "GPT2LMHeadModel": ("gpt2", _gpt2)}
SUPPORTED_ARCHITECTURES = tuple(_ARCHITECTURES)


def _rope(read: _Reader, max_position: int) -> RopeConfig:
    """`rope_scaling` beside `rope_theta` (transformers 4), or `rope_parameters` with both (transformers 5)."""
    params = read.get(dict, {}, "rope_scaling", null={}) or read.get(dict, {}, "rope_parameters", null={})
    rope = _Reader(params)
    rope.refuse("partial_rotary_factor", "rotary embedding over part of the head", 1.0)
    theta = rope.number(read.number(10000.0, "rope_theta"), "rope_theta")
    kind = rope.get(str, "default", "rope_type", "type")
    if kind == "default" and not any(isinstance(value, dict) for value in params.values()):
        return RopeConfig(theta=theta)
    needed = {"linear": ("factor",), "dynamic": ("factor",),
              "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
    if kind not in needed:
        what = "one rotary embedding for each type of layer" if kind == "default" else f"rope type {kind!r}"
        raise ModelLoadError(f"config.json asks for {what}, which is not supported", got=params,
                             expected="default, linear, dynamic or llama3, the same for all layers")
    for name in needed[kind]:
        if params.get(name) is None:
            raise ModelLoadError(f"rope type {kind!r} in config.json lacks {name!r}", got=params)
    factor = rope.number(1.0, "factor")
    if kind != "llama3":
        return RopeConfig(theta=theta, scaling="linear" if kind == "linear" else "dynamic", factor=factor)
    original = read.size(rope.size(max_position, "original_max_position_embeddings"),
                         "original_max_position_embeddings")
    return RopeConfig(theta=theta, scaling="llama3", factor=factor, low_freq_factor=rope.number(1.0, "low_freq_factor"),
                      high_freq_factor=rope.number(4.0, "high_freq_factor"), original_max_position=original)


def _token_id(read: _Reader, default: int | None) -> int | None:
    value: int | None = read.get(int, default, "bos_token_id", null=None)
    return value


def _token_ids(read: _Reader, default: int | None) -> tuple[int, ...]:
    value = read.get((int, list), default, "eos_token_id", null=())
    ids = tuple(value) if isinstance(value, (list, tuple)) else () if value is None else (value,)
    if any(type(i) is not int for i in ids):
        raise ModelLoadError("eos_token_id is not usable", got=value, expected="an integer, a list of them, or null")
    return ids


def _dtype(read: _Reader) -> str:
    value = read.get(str, "float32", "dtype", "torch_dtype", null="float32").removeprefix("torch.")
    if value not in _DTYPES:
        raise ModelLoadError("the checkpoint's dtype is not supported", got=value, expected=", ".join(_DTYPES))
    return _DTYPES[value]


def _check_shape(config: ModelConfig) -> None:
    if config.num_heads % config.num_kv_heads:
        raise ModelLoadError("the key-value heads in config.json do not divide the heads",
                             got=f"{config.num_kv_heads} and {config.num_heads}")
    if config.rope and config.head_dim % 2:
        raise ModelLoadError("a rotary embedding needs an even head_dim", got=config.head_dim)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelLoadError(f"the model directory has no {path.name}", got=path.parent,
                             expected="a checkpoint in Hugging Face format") from None
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path.name} cannot be read", got=f"{path}: {error}", expected="a JSON object") from None
    if not isinstance(data, dict):
        raise ModelLoadError(f"{path.name} is not a JSON object", got=type(data).__name__)
    return data
