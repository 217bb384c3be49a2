"""Reading of a Hugging Face checkpoint's config.json, as old and new transformers write it. This loads no torch.

A missing key takes the default that transformers has for that architecture. An option that would change results and is
not implemented is refused. Keys that transformers itself ignores for an architecture are ignored here too.
Every number has a range, so that a damaged or hostile file ends as an error before anything is allocated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from os.path import isdir, isfile
from pathlib import Path
from typing import Any

from hal.checkpoints.stored import HEAD, equal, has_weights, locate, read_json, shown, stored_dtype
from hal.errors import ModelLoadError
from hal.model_config import EagleConfig, ModelConfig, ModelImpl, RopeConfig
from hal.weights.formats import check_known

_MISSING = object()
# The largest values that are accepted; each is at least eight times that of any published model of these families,
# except the positions (the largest published context has 10 million tokens).
_MAX_LAYERS, _MAX_HIDDEN, _MAX_INNER, _MAX_HEADS, _MAX_HEAD_DIM = 1024, 1 << 17, 1 << 20, 1024, 4096
_MAX_VOCAB, _MAX_POSITIONS, _MAX_PARAMS, _INT32 = 1 << 22, 1 << 24, 10**13, (1 << 31) - 1
_GELU = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu": "gelu",
         "relu": "relu"}
_STORED_DTYPES = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_DTYPES = {"auto": "float32", "float32": "float32", "float64": "float32", "float16": "float16", "half": "float16",
           "bfloat16": "bfloat16"}
_THETA, _FACTOR = (1.0, 1e15), (1.0, 1e6)  # the smallest and the largest that are accepted
_LAYER_TYPES = ("full_attention", "sliding_attention")


def read_config(directory: str | Path, *, weights: bool = True, impl: ModelImpl = "auto",
                trust_remote_code: bool = False) -> ModelConfig:
    """The shape of the model in a checkpoint directory. As in transformers' `generate`, end-of-sequence ids in
    generation_config.json replace those of config.json.

    Args:
        weights: let the stored tensors decide two things, as transformers 5 does. A stored head that differs from the
            embeddings is used even if config.json sets tie_word_embeddings. If config.json gives no dtype, or "auto",
            the dtype is that of the stored embeddings. False is for a model whose weights will not be loaded.
        impl: "native" takes a definition of hal.models, "transformers" the Transformers backend, and "auto" a
            definition of hal.models where there is one.
        trust_remote_code: the Transformers backend may run the checkpoint's own Python code.

    Raises:
        ModelLoadError: the directory or config.json is missing, is not JSON, or describes something unsupported; the
            files of the weights are damaged.
    """
    directory = Path(directory)
    if not isdir(directory):
        raise ModelLoadError("the model directory does not exist", got=directory,
                             expected="a directory with config.json and *.safetensors in Hugging Face format")
    data = read_json(directory / "config.json")
    config = _by_transformers(data, directory, trust_remote_code) if impl == "transformers" or (
        impl == "auto" and not _is_native(data)) else parse_config(data)
    generation = directory / "generation_config.json"
    if isfile(generation):
        ids = _token_ids(_Reader(read_json(generation), generation.name), None)
        if ids:
            config = dataclasses.replace(config, eos_token_ids=ids)
    return _as_stored(config, _dtype_name(_Reader(data)), directory) if weights and has_weights(directory) else config


def _is_native(data: dict[str, Any]) -> bool:
    names, kind = data.get("architectures") or [None], data.get("model_type")
    if not isinstance(names, list) or names[0] is None:
        return kind is None or any(kind == k for k, _ in _ARCHITECTURES.values())
    return names[0] in _ARCHITECTURES


def _by_transformers(data: dict[str, Any], directory: Path, trust_remote_code: bool) -> ModelConfig:
    from hal.checkpoints.any_config import parse_any

    read = _Reader(data)
    eos = _token_ids(read, None) if "eos_token_id" in data else None
    quantization = read.get(dict, None, "quantization_config", null=None)
    if quantization is not None:
        check_known(quantization)
    config = parse_any(data, _dtype(read), eos, _token_id(read, None), directory, trust_remote_code=trust_remote_code)
    return dataclasses.replace(config, quantization=quantization)


def _as_stored(config: ModelConfig, dtype: str, directory: Path) -> ModelConfig:
    """`config` with the choices that the stored tensors decide. If embeddings and head are stored under a single name,
    the loader decides."""
    if dtype != "auto" and not config.tie_embeddings:
        return config
    tensors = locate(directory)
    embeddings, head = tensors.get(f"{config.embedding_name}.weight"), tensors.get(HEAD)
    if config.tie_embeddings and embeddings and head:
        config = dataclasses.replace(config, tie_embeddings=equal(embeddings, head))
    table = embeddings or head
    if dtype == "auto" and table:
        config = dataclasses.replace(config, dtype=_STORED_DTYPES.get(stored_dtype(table), config.dtype))
    return config


def parse_config(data: dict[str, Any]) -> ModelConfig:
    """The shape of the model from the content of config.json alone.

    Raises:
        ModelLoadError: an unsupported architecture or feature, or a value of the wrong type or out of range.
    """
    read = _Reader(data)
    if EAGLE3 in read.get(list, [], "architectures", null=[]):
        raise ModelLoadError("this checkpoint is a head that proposes tokens for another model", got=EAGLE3,
                             expected="a model that runs by itself",
                             hint="run its target model, with this directory as --draft-model and --speculate eagle")
    kind = read.get(str, None, "model_type", null=None)
    names = read.get(list, [], "architectures", null=[]) or [a for a, (k, _) in _ARCHITECTURES.items() if k == kind]
    architecture = names[0] if names else kind
    if not isinstance(architecture, str) or architecture not in _ARCHITECTURES:
        raise ModelLoadError("this architecture is not supported", got="neither architectures nor model_type in "
                             "config.json" if architecture is None else shown(architecture),
                             expected=", ".join(_ARCHITECTURES))
    model_type, parse = _ARCHITECTURES[architecture]
    if kind not in (None, model_type):
        raise ModelLoadError("architectures and model_type of config.json contradict each other",
                             got=f"{architecture} and {shown(kind)}", expected=f"model_type {model_type!r}")
    config = parse(read, architecture)
    quantization = read.get(dict, None, "quantization_config", null=None)
    if quantization is not None:
        check_known(quantization)
        config = dataclasses.replace(config, quantization=quantization)
    _check_shape(config)
    return config


def parse_eagle(data: dict[str, Any]) -> ModelConfig:
    """The shape of an EAGLE-3 head from the content of its config.json alone.

    Raises:
        ModelLoadError: it is no such head; or as parse_config does.
    """
    read = _Reader(data)
    names = read.get(list, [], "architectures", null=[])
    if names != [EAGLE3]:
        raise ModelLoadError("the draft checkpoint is no EAGLE-3 head in the published layout",
                             got=shown(names), expected=EAGLE3, hint="--speculate draft takes a whole model as draft")
    read.refuse("tie_word_embeddings", "a head that is the embedding table of an EAGLE-3 head", False)
    config = _llama(read, EAGLE3)
    if config.num_layers != 1:
        raise read.unusable("num_hidden_layers", config.num_layers, "1, since an EAGLE-3 head has one layer")
    own = _Reader(read.get(dict, {}, "eagle_config", null={}))
    if not own.flag(True, "use_aux_hidden_state"):
        own.refuse("use_aux_hidden_state", "a head that does not read hidden states of three layers", True)
    drafts = read.size(config.vocab_size, config.vocab_size, "draft_vocab_size", null=config.vocab_size)
    target = read.size(config.hidden_size, _MAX_HIDDEN, "target_hidden_size", null=config.hidden_size)
    taps = own.get(list, None, "eagle_aux_hidden_state_layer_ids", null=None)
    taps = read.get(list, [], "eagle_aux_hidden_state_layer_ids", null=[]) if taps is None else taps
    if taps and (len(taps) != 3 or any(type(i) is not int or not 0 <= i < _MAX_LAYERS for i in taps)):
        raise read.unusable("eagle_aux_hidden_state_layer_ids", taps, "three numbers of layers, low to high")
    eagle = EagleConfig(draft_vocab_size=drafts, target_hidden_size=target, taps=tuple(taps),
                        norm_before_residual=read.flag(False, "norm_before_residual"))
    config = dataclasses.replace(config, family="eagle3", eagle=eagle)
    _check_shape(config)
    return config


class _Reader:
    """Typed access to a JSON file; each method raises ModelLoadError naming the key."""

    def __init__(self, data: dict[str, Any], file: str = "config.json") -> None:
        self.data, self.file = data, file

    def get(self, kinds: type | tuple[type, ...], default: Any, *names: str, null: Any = _MISSING) -> Any:
        """The value of the first of `names` that is present; the other names are aliases. `null` stands for JSON's
        null."""
        for name in names:
            value = self.data.get(name, _MISSING)
            if value is None and null is not _MISSING:
                return null
            if value is not _MISSING:
                if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
                    wanted = kinds if isinstance(kinds, tuple) else (kinds,)
                    raise self.unusable(name, value, " or ".join(k.__name__ for k in wanted))
                return value
        return default

    def size(self, default: Any, most: int, *names: str, null: Any = _MISSING) -> Any:
        """An integer from 1 to `most`."""
        value = self.get(int, default, *names, null=null)
        if isinstance(value, int) and not 1 <= value <= most:
            raise self.unusable(names[0], value, f"an integer from 1 to {most}")
        return value

    def number(self, default: float, low: float, high: float, name: str) -> float:
        """A number from `low` to `high`, both above 0."""
        value = self.get((int, float), default, name)
        if not low <= value <= high:
            raise self.unusable(name, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, default: bool, name: str) -> bool:
        return bool(self.get(bool, default, name, null=default))

    def refuse(self, name: str, what: str, allowed: Any) -> None:
        value = self.data.get(name, allowed)
        if value is not None and value != allowed:
            raise ModelLoadError(f"{self.file} asks for {what}, which is not supported", got=f"{name} = {shown(value)}")

    def unusable(self, name: str, value: object, expected: str) -> ModelLoadError:
        return ModelLoadError(f"{name} in {self.file} is not usable", got=shown(value), expected=expected)


def _llama(read: _Reader, architecture: str) -> ModelConfig:
    return _decoder(read, architecture, vocab=32000, inner=11008, kv_heads=None, max_position=2048, bos=1, eos=2,
                    qkv_bias=read.flag(False, "attention_bias"), out_bias=read.flag(False, "attention_bias"),
                    mlp_bias=read.flag(False, "mlp_bias"))


def _mistral(read: _Reader, architecture: str) -> ModelConfig:
    window = read.size(4096, _INT32, "sliding_window", null=None)
    if window and "full_attention" in read.get(list, [], "layer_types", null=[]):
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
    windowed = read.flag(False, "use_sliding_window")
    window = read.size(4096, _INT32, "sliding_window", null=None) if windowed else None
    types = read.get(list, None, "layer_types", null=None)
    if types is None:
        first = read.get(int, 28, "max_window_layers")
        return tuple(window if i >= first else None for i in range(layers))
    if len(types) != layers or any(t not in _LAYER_TYPES for t in types):
        raise ModelLoadError("layer_types in config.json is not usable", got=shown(types),
                             expected=f"{layers} entries, each one of {', '.join(_LAYER_TYPES)}")
    return tuple(window if t == "sliding_attention" else None for t in types)


def _decoder(read: _Reader, architecture: str, *, vocab: int, inner: int, kv_heads: int | None, max_position: int,
             bos: int | None = None, eos: int | None = None, head_dim: int | None = None,
             windows: Callable[[int], tuple[int | None, ...]] = lambda layers: (None,) * layers,
             **features: Any) -> ModelConfig:
    """The configuration of a Llama-like model; the arguments are the architecture's own defaults and features."""
    if read.get(str, "silu", "hidden_act") not in ("silu", "swish"):
        read.refuse("hidden_act", "another activation than silu", "silu")
    read.refuse("partial_rotary_factor", "rotary embedding over part of the head", 1.0)
    hidden = read.size(4096, _MAX_HIDDEN, "hidden_size")
    layers = read.size(32, _MAX_LAYERS, "num_hidden_layers")
    heads = read.size(32, _MAX_HEADS, "num_attention_heads")
    positions = read.size(max_position, _MAX_POSITIONS, "max_position_embeddings")
    own = read.size(head_dim, _MAX_HEAD_DIM, "head_dim", null=None)
    if own is None and hidden % heads:
        raise ModelLoadError("num_attention_heads does not divide hidden_size", got=f"{heads} and {hidden}",
                             hint="config.json must then give head_dim")
    return ModelConfig(
        family="llama", architecture=architecture, vocab_size=read.size(vocab, _MAX_VOCAB, "vocab_size"),
        hidden_size=hidden, num_layers=layers, num_heads=heads, head_dim=own or hidden // heads,
        num_kv_heads=read.size(kv_heads, _MAX_HEADS, "num_key_value_heads", null=heads) or heads,
        intermediate_size=read.size(inner, _MAX_INNER, "intermediate_size"), max_position=positions,
        norm_eps=_eps(read, 1e-6, "rms_norm_eps"), rope=_rope(read, positions), windows=windows(layers),
        tie_embeddings=read.get(bool, False, "tie_word_embeddings"), bos_token_id=_token_id(read, bos),
        eos_token_ids=_token_ids(read, eos), dtype=_dtype(read), **features)


def _gpt2(read: _Reader, architecture: str) -> ModelConfig:
    read.refuse("add_cross_attention", "cross attention", False)
    read.refuse("scale_attn_weights", "unscaled attention", True)
    read.refuse("scale_attn_by_inverse_layer_idx", "attention scaled by the layer's number", False)
    act = read.get(str, "gelu_new", "activation_function")
    if act not in _GELU:
        raise ModelLoadError("config.json asks for an activation that is not supported", got=shown(act),
                             expected=", ".join(_GELU))
    hidden = read.size(768, _MAX_HIDDEN, "n_embd", "hidden_size")
    layers = read.size(12, _MAX_LAYERS, "n_layer", "num_hidden_layers")
    heads = read.size(12, _MAX_HEADS, "n_head", "num_attention_heads")
    if hidden % heads:
        raise ModelLoadError("n_head does not divide n_embd", got=f"{hidden} and {heads}")
    return ModelConfig(
        family="gpt2", architecture=architecture, embedding_name="wte",
        vocab_size=read.size(50257, _MAX_VOCAB, "vocab_size"),
        hidden_size=hidden, num_layers=layers, num_heads=heads, num_kv_heads=heads, head_dim=hidden // heads,
        intermediate_size=read.size(4 * hidden, _MAX_INNER, "n_inner", null=4 * hidden),
        max_position=read.size(1024, _MAX_POSITIONS, "n_positions", "max_position_embeddings"),
        norm_eps=_eps(read, 1e-5, "layer_norm_epsilon"), activation=_GELU[act], windows=(None,) * layers,  # type: ignore[arg-type]
        tie_embeddings=read.get(bool, True, "tie_word_embeddings"), qkv_bias=True, out_bias=True, mlp_bias=True,
        bos_token_id=_token_id(read, 50256), eos_token_ids=_token_ids(read, 50256), dtype=_dtype(read))


_ARCHITECTURES: dict[str, tuple[str, Callable[[_Reader, str], ModelConfig]]] = {
    "LlamaForCausalLM": ("llama", _llama), "MistralForCausalLM": ("mistral", _mistral),
    "Qwen2ForCausalLM": ("qwen2", _qwen2), "Qwen3ForCausalLM": ("qwen3", _qwen3), "GPT2LMHeadModel": ("gpt2", _gpt2)}
EAGLE3 = "LlamaForCausalLMEagle3"
SUPPORTED_ARCHITECTURES = tuple(_ARCHITECTURES)


def _eps(read: _Reader, default: float, name: str) -> float:
    """The epsilon of a norm. It must be above 0 in fp32, since with 0 a row of zeros (the embedding of a padding token)
    is normalised to NaN."""
    return read.number(default, 1e-30, 1.0, name)


def _rope(read: _Reader, max_position: int) -> RopeConfig:
    """Transformers 4 writes `rope_scaling` and `rope_theta`; transformers 5 writes both into `rope_parameters`."""
    params = read.get(dict, {}, "rope_scaling", null={}) or read.get(dict, {}, "rope_parameters", null={})
    rope = _Reader(params)
    rope.refuse("partial_rotary_factor", "rotary embedding over part of the head", 1.0)
    theta = rope.number(read.number(10000.0, *_THETA, "rope_theta"), *_THETA, "rope_theta")
    kind = rope.get(str, "default", "rope_type", "type")
    if kind == "default" and not any(isinstance(value, dict) for value in params.values()):
        return RopeConfig(theta=theta)
    needed = {"linear": ("factor",), "dynamic": ("factor",),
              "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
    if kind not in needed:
        what = "one rotary embedding for each type of layer" if kind == "default" else f"rope type {shown(kind)}"
        raise ModelLoadError(f"config.json asks for {what}, which is not supported", got=shown(params),
                             expected="default, linear, dynamic or llama3, the same for all layers")
    for name in needed[kind]:
        if params.get(name) is None:
            raise ModelLoadError(f"rope type {kind!r} in config.json lacks {name!r}", got=shown(params))
    factor = rope.number(1.0, *_FACTOR, "factor")
    if kind != "llama3":
        return RopeConfig(theta=theta, scaling="linear" if kind == "linear" else "dynamic", factor=factor)
    original = read.size(rope.size(max_position, _MAX_POSITIONS, "original_max_position_embeddings"), _MAX_POSITIONS,
                         "original_max_position_embeddings")
    low, high = (rope.number(1.0, 1e-6, 1e6, name) for name in ("low_freq_factor", "high_freq_factor"))
    if low >= high:
        raise ModelLoadError("low_freq_factor in config.json is not below high_freq_factor", got=f"{low} and {high}")
    return RopeConfig(theta=theta, scaling="llama3", factor=factor, low_freq_factor=low, high_freq_factor=high,
                      original_max_position=original)


def _token_id(read: _Reader, default: int | None) -> int | None:
    value = read.get(int, default, "bos_token_id", null=None)
    return None if value is None else _token(read, "bos_token_id", value)


def _token_ids(read: _Reader, default: int | None) -> tuple[int, ...]:
    value = read.get((int, list), default, "eos_token_id", null=None)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(_token(read, "eos_token_id", i) for i in ids)


def _token(read: _Reader, name: str, value: object) -> int:
    """A token id. Some checkpoints have -1 for "none"; it is accepted, since no token has it."""
    if type(value) is not int or not -1 <= value <= _INT32:
        raise read.unusable(name, value, f"an integer from -1 to {_INT32}, or null; for eos_token_id also a list")
    return value


def _dtype_name(read: _Reader) -> str:
    """A key of _DTYPES; "auto" where config.json leaves it open."""
    value: str = read.get(str, "auto", "dtype", "torch_dtype", null="auto").removeprefix("torch.")
    if value not in _DTYPES:
        raise ModelLoadError("the checkpoint's dtype is not supported", got=shown(value), expected=", ".join(_DTYPES))
    return value


def _dtype(read: _Reader) -> str:
    return _DTYPES[_dtype_name(read)]


def _check_shape(config: ModelConfig) -> None:
    if config.num_heads % config.num_kv_heads:
        raise ModelLoadError("the key-value heads in config.json do not divide the heads",
                             got=f"{config.num_kv_heads} and {config.num_heads}")
    if config.rope and config.head_dim % 2:
        raise ModelLoadError("a rotary embedding needs an even head_dim", got=config.head_dim)
    if config.num_params > _MAX_PARAMS:
        raise ModelLoadError("config.json describes a model of impossible size", got=f"{config.num_params} parameters",
                             expected=f"at most {_MAX_PARAMS}")
