"""The formats that come with hal: each reads a checkpoint's quantization_config, as the tools that publish write it."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hal.errors import ModelLoadError
from hal.weights.base import Scheme, canonical
from hal.weights.dense import DENSE
from hal.weights.eight_bits import EightBits
from hal.weights.gguf import GgufBlocks
from hal.weights.grid import Inputs
from hal.weights.groups import Awq, Gptq, Packed
from hal.weights.mxfp4 import Mxfp4, Mxfp4Blocks

Config = Mapping[str, Any]
SchemeOf = Callable[[str], Scheme]
_HEAD = "lm_head"
_EXPERT = re.compile(r"\.experts\.\d+\.")
_PATTERN = set("*+?^$()[]{}|\\")  # a key of extra_config that has one of these is a regular expression


def compressed_tensors(config: Config) -> SchemeOf:
    """Groups of layers, each with a scheme. A target or an ignored layer is a name, "re:" and a pattern, or the class
    "Linear"."""
    check_cache(config)
    if config.get("transform_config"):  # such as rotations, which the steps would have to undo
        raise _refused("transforms of weights and activations", config["transform_config"])
    groups = _get(config, "config_groups", dict, {})
    ignored = _names(config, "ignore")
    found: list[tuple[Sequence[str], Scheme]] = []
    for group in groups.values():
        if not isinstance(group, dict):
            raise _unusable("config_groups", groups, "an object of objects")
        found.append((_names(group, "targets"), _compressed(group, group.get("format") or config.get("format"))))
    if not found and not config.get("kv_cache_scheme"):
        raise _unusable("config_groups", groups, "at least one group of layers, or a kv_cache_scheme")

    def scheme(name: str) -> Scheme:
        if _matches(name, ignored):
            return DENSE
        for by_class in (False, True):
            for targets, each in found:
                if ("Linear" in targets) if by_class else _matches(name, targets):
                    return each
        return DENSE

    return scheme


def check_cache(config: Config) -> None:
    """Whether the checkpoint's scales of the KV cache, if there are any, are those of an fp8 cache.

    Raises:
        ModelLoadError: they are of another type, or of something smaller than a layer.
    """
    cache = config.get("kv_cache_scheme")
    if isinstance(cache, dict) and (cache.get("num_bits", 8), cache.get("type", "float"), cache.get(
            "strategy", "tensor"), cache.get("dynamic") or False) != (8, "float", "tensor", False):
        raise _refused("scales of the KV cache", cache, "8 bits of float, static, of a tensor")


def _compressed(group: Config, layout: object) -> Scheme:
    weights, inputs = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, dict) or not isinstance(inputs, dict | None):
        raise _unusable("config_groups", group, "objects: weights, and input_activations, which may be null")
    if group.get("output_activations"):
        raise _refused("rounded outputs of layers", group["output_activations"])
    kind, bits, strategy = (weights.get(n) for n in ("type", "num_bits", "strategy"))
    symmetric, act_order = weights.get("symmetric", True), weights.get("actorder") in ("group", True)
    if layout == "pack-quantized" and kind == "int" and bits in (4, 8) and strategy in ("group", "channel") and (
            inputs is None):
        size = None if strategy == "channel" else _size(weights.get("group_size"))
        return Packed(bits, size, bool(symmetric), act_order and size is not None)
    if layout == "mxfp4-pack-quantized" and kind == "float" and bits == 4:
        return Mxfp4()
    wanted = {"float-quantized": "float", "int-quantized": "int", "naive-quantized": kind}
    if wanted.get(str(layout)) == kind and bits == 8 and symmetric and strategy in ("tensor", "channel", "block"):
        block = weights.get("block_structure") or [128, 128]
        return EightBits("fp8" if kind == "float" else "int8", strategy, _inputs(inputs), _block(block))
    raise _refused("a scheme of layers", f"{layout} with {bits} bits of {kind}, strategy {strategy}, symmetric="
                   f"{symmetric}, input_activations {'given' if inputs else 'none'}",
                   "pack-quantized (4 or 8 bits, group or channel), float-quantized and int-quantized (8 bits, "
                   "symmetric, tensor, channel or block), mxfp4-pack-quantized")


def _inputs(config: Config | None) -> Inputs:
    if config is None:
        return "exact"
    dynamic, strategy = config.get("dynamic", False), config.get("strategy")
    if config.get("num_bits") != 8 or not config.get("symmetric", True) or (not dynamic and strategy != "tensor"):
        raise _refused("a rounding of inputs", config, "8 bits, symmetric; a static scale belongs to a tensor")
    if not dynamic:
        return "static"
    kinds: dict[object, Inputs] = {"token": "token", "tensor": "tensor", "group": "group"}
    if strategy not in kinds:
        raise _refused("a rounding of inputs", config, "dynamic scales of a token, a tensor or a group")
    return kinds[strategy]


def fp8(config: Config) -> SchemeOf:
    """The format of DeepSeek, Qwen and transformers (blocks), and that of AutoFP8 (tensors). The head is dense."""
    if config.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        raise _refused("a type of 8 bits", config["fmt"], "e4m3")
    how = config.get("activation_scheme", "dynamic")
    if how not in ("static", "dynamic"):
        raise _unusable("activation_scheme", how, "static, dynamic")
    block = config.get("weight_block_size")
    if block is None:
        scheme = EightBits("fp8", "tensor", "static" if how == "static" else "tensor")
    elif how == "static":
        raise _refused("a rounding of inputs", "static scales beside weights in blocks", "dynamic")
    else:
        scheme = EightBits("fp8", "block", "group", _block(block), "weight_scale_inv")
    return _but(scheme, [*_names(config, "modules_to_not_convert"), *_names(config, "ignored_layers"), _HEAD])


def gptq(config: Config) -> SchemeOf:
    """`dynamic` holds patterns: "-:" leaves layers dense, "+:" changes options of others."""
    if config.get("checkpoint_format", "gptq") not in ("gptq", "gptq_v2"):
        raise _refused("a layout of GPTQ", config["checkpoint_format"], "gptq, gptq_v2")
    rules = _get(config, "dynamic", dict, {})
    ignored = [*_names(config, "modules_in_block_to_not_quantize"), *([] if config.get("lm_head") else [_HEAD])]

    def made(options: Config) -> Scheme:
        bits, size = options.get("bits"), options.get("group_size")
        if bits not in (4, 8):
            raise _refused("a number of bits", bits, "4 or 8")
        v1 = config.get("checkpoint_format", "gptq") == "gptq"
        return Gptq(bits, None if size == -1 else _size(size), bool(options.get("desc_act")), int(v1))

    schemes = {pattern: DENSE if pattern.startswith("-:") else made({**config, **(options or {})})
               for pattern, options in rules.items()}
    usual = made(config)

    def scheme(name: str) -> Scheme:
        if _within(name, ignored):
            return DENSE
        return next((each for pattern, each in schemes.items() if any(
            _searched(pattern.removeprefix("-:").removeprefix("+:"), n) for n in _spelled(name))), usual)

    return scheme


def awq(config: Config) -> SchemeOf:
    bits, size = config.get("bits", config.get("w_bit")), config.get("group_size", config.get("q_group_size"))
    if bits != 4 or str(config.get("version", "gemm")).lower() != "gemm":
        raise _refused("a layout of AWQ", f"{bits} bits, version {config.get('version')}", "4 bits, version gemm")
    return _but(Awq(None if size == -1 else _size(size)), [*_names(config, "modules_to_not_convert"), _HEAD])


def auto_round(config: Config) -> SchemeOf:
    """AutoRound's own format: layers inside the named blocks in the layout of GPTQ or of AWQ. `extra_config` changes
    the options of single layers, which a name or a regular expression chooses."""
    extra, blocks = _get(config, "extra_config", dict, {}), config.get("block_name_to_quantize")
    if not all(isinstance(options, dict) for options in extra.values()):
        raise _unusable("extra_config", extra, "an object of objects")
    blocks = ([block.strip() for block in blocks.split(",")] if isinstance(blocks, str) else
              _names(config, "block_name_to_quantize"))

    def made(options: Config) -> Scheme:
        layout, bits, size = (options.get(key) for key in ("packing_format", "bits", "group_size"))
        inputs = _get(options, "act_bits", int, 16)
        if type(bits) is int and bits >= 16:
            return DENSE
        if options.get("data_type", "int") == "int" and inputs >= 16:
            if layout == "auto_round:auto_gptq" and bits in (4, 8):
                return Gptq(bits, None if size == -1 else _size(size))
            if layout == "auto_round:auto_awq" and bits == 4:
                return Awq(None if size == -1 else _size(size))
        raise _refused("a layout of AutoRound", f"{layout} with {bits} bits of {options.get('data_type')}, act_bits="
                       f"{options.get('act_bits')}", "auto_round:auto_gptq (4 or 8 bits of int), auto_round:auto_awq "
                       "(4 bits of int), and inputs of layers that are not rounded")

    usual, others = made(config), {name: made({**config, **options}) for name, options in extra.items()}

    def scheme(name: str) -> Scheme:
        spelled = _spelled(name)
        for exact in (True, False):
            for pattern, each in others.items():
                if any(pattern == n if exact else not _PATTERN.isdisjoint(pattern) and _searched(f".*(?:{pattern})", n)
                       for n in spelled):
                    return each
        within = any(n.startswith(f"{block}.") for block in blocks for n in spelled)
        return usual if within or (not blocks and name != _HEAD) else DENSE

    return scheme


def mxfp4(config: Config) -> SchemeOf:
    """The format of gpt-oss, in which only experts are of few bits."""
    experts, ignored = Mxfp4Blocks(), _names(config, "modules_to_not_convert")
    return lambda name: experts if ".experts." in name and not _within(name, ignored) else DENSE


def gguf(config: Config) -> SchemeOf:
    """`types` has the GGUF type of each projection, in which all experts of a layer count as one;
    hal.checkpoints.gguf makes this configuration."""
    schemes: dict[str, Scheme] = {name: GgufBlocks(kind) for name, kind in config["types"].items()}
    return lambda name: schemes.get(_EXPERT.sub(".experts.", name), DENSE)


ON_LOAD: dict[str, Scheme] = {
    "fp8": EightBits("fp8", "channel", "token", on_load=True), "int8": EightBits("int8", "channel", on_load=True),
    "int4": Packed(4, 64, symmetric=False, on_load=True)}


def on_load(config: Config) -> SchemeOf:
    """The option --quantize: the weights of a dense checkpoint lose bits as they are read. The head, whose errors reach
    the logits directly, keeps at least 8 bits; with fp8, which also rounds inputs, it is dense."""
    body = ON_LOAD[config["scheme"]]
    head = DENSE if config["scheme"] == "fp8" else ON_LOAD["int8"]
    return lambda name: head if name == _HEAD else body


def _but(scheme: Scheme, ignored: Sequence[str]) -> SchemeOf:
    return lambda name: DENSE if _within(name, ignored) else scheme


def _within(name: str, ignored: Sequence[str]) -> bool:
    """Whether a module or a part of its path is named. "mlp.gate" does not name "mlp.gate_proj"."""
    path = f".{name}."
    return any(fnmatch.fnmatchcase(path, f"*.{canonical(f'{each}')}.*") for each in ignored)


def _matches(name: str, targets: Sequence[str]) -> bool:
    return any(_searched(target[3:], each) if target.startswith("re:") else target == each
               for target in targets for each in _spelled(name))


def _spelled(name: str) -> tuple[str, str]:
    """A name as a checkpoint's configuration may spell it."""
    return name, f"model.{name}"


def _searched(pattern: str, name: str) -> bool:
    try:
        return re.match(pattern, name) is not None
    except re.error as error:
        raise _unusable("a pattern of layers", pattern, f"a regular expression ({error})") from None


def _get(config: Config, key: str, kind: type, default: Any) -> Any:
    value = config.get(key)
    if not isinstance(value, kind | None):
        raise _unusable(key, value, kind.__name__)
    return default if value is None else value


def _names(config: Config, key: str) -> list[str]:
    names: list[str] = _get(config, key, list, [])
    if not all(isinstance(name, str) for name in names):
        raise _unusable(key, names, "a list of names")
    return names


def _size(value: object) -> int:
    if type(value) is not int or not 8 <= value <= 1 << 20:
        raise _unusable("group_size", value, "an integer from 8 on, or -1 where the format knows it")
    return value


def _block(value: object) -> tuple[int, int]:
    sizes = value if isinstance(value, list) else []
    if len(sizes) != 2 or any(type(n) is not int or not 1 <= n <= 1 << 20 for n in sizes):
        raise _unusable("weight_block_size", value, "two integers above 0")
    return sizes[0], sizes[1]


def _unusable(key: str, value: object, expected: str) -> ModelLoadError:
    return ModelLoadError(f"{key} in quantization_config is not usable", got=f"{value!r:.120}", expected=expected)


def _refused(what: str, got: object, expected: str = "none") -> ModelLoadError:
    return ModelLoadError(f"quantization_config asks for {what} that is not supported", got=f"{got!s:.160}",
                          expected=expected, hint="take a checkpoint in another format")
