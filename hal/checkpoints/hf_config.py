"""Reading of a Hugging Face checkpoint's config.json, as old and new transformers write it. This loads no torch.

A missing key takes the default that transformers has for that architecture. An option that would change results and is
not implemented is refused. Keys that transformers itself ignores for an architecture are ignored here too.
hal.models.families names what parses each architecture.
"""

from __future__ import annotations

import dataclasses
from os.path import isdir, isfile
from pathlib import Path
from typing import Any

from hal.checkpoints.gguf import config_data, is_gguf
from hal.checkpoints.reader import MAX_HIDDEN, MAX_LAYERS, MAX_PARAMS, Reader
from hal.checkpoints.sentence import embedding_of
from hal.checkpoints.shapes import llama
from hal.checkpoints.stored import HEAD, equal, has_weights, locate, read_json, shown, stored_dtype
from hal.config import Pooling
from hal.errors import ConfigError, ModelLoadError
from hal.files import HUB_ID
from hal.model_config import EagleConfig, ModelConfig, ModelImpl
from hal.models.families import EMBEDDERS, architectures, family_of, native
from hal.weights.formats import check_known

EAGLE3 = "LlamaForCausalLMEagle3"
_STORED_DTYPES = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def read_config(directory: str | Path, *, weights: bool = True, impl: ModelImpl = "auto",
                trust_remote_code: bool = False, quantize: str | None = None,
                pooling: Pooling = "auto") -> ModelConfig:
    """The shape of the model in a checkpoint directory or a GGUF file. As in transformers' `generate`, end-of-sequence
    ids in generation_config.json replace those of config.json.

    Args:
        weights: let the stored tensors decide two things, as transformers 5 does. A stored head that differs from the
            embeddings is used even if config.json sets tie_word_embeddings. If config.json gives no dtype, or "auto",
            the dtype is that of the stored embeddings. False is for a model whose weights will not be loaded.
        impl: "native" takes a definition of hal.models, "transformers" the Transformers backend, and "auto" a
            definition of hal.models where there is one.
        trust_remote_code: the Transformers backend may run the checkpoint's own Python code.
        quantize: as in EngineConfig.
        pooling: as in EngineConfig.

    Raises:
        ConfigError: `quantize` is given for a checkpoint whose weights are not dense.
        ModelLoadError: the directory or config.json is missing, is not JSON, or describes something unsupported; the
            files of the weights are damaged.
    """
    directory = Path(directory)
    if isfile(directory) and not is_gguf(directory):
        raise ModelLoadError("the model is a file and no directory", got=directory, expected="a directory with "
                             "config.json and *.safetensors in Hugging Face format, or a GGUF file",
                             hint=f"give the directory of the file: {directory.parent}")
    if not isdir(directory) and not is_gguf(directory):
        raise ModelLoadError("the model directory does not exist", got=directory,
                             expected="a directory with config.json and *.safetensors in Hugging Face format, or a "
                                      "GGUF file",
                             hint=f"an id of the Hugging Face hub needs its files in the local cache: hf download "
                                  f"{directory}" if HUB_ID.fullmatch(str(directory)) else None)
    if isfile(directory / "adapter_config.json") and not isfile(directory / "config.json"):
        raise ModelLoadError("the model directory holds an adapter and no model", got=directory,
                             expected="the directory of the model that the adapter was trained for",
                             hint="load that model with --adapter NAME=DIR (adapters=), where DIR is this directory")
    data = config_data(directory) if is_gguf(directory) else read_json(directory / "config.json")
    config = _by_transformers(data, directory, trust_remote_code) if impl == "transformers" or (
        impl == "auto" and not _is_native(data)) else parse_config(data)
    generation = directory / "generation_config.json"
    if isfile(generation):
        ids = Reader(read_json(generation), generation.name).eos(None)
        if ids:
            config = dataclasses.replace(config, eos_token_ids=ids)
    embedding = embedding_of(directory, config, pooling)
    if embedding is not None:
        config = dataclasses.replace(config, embedding=embedding)
    if weights and has_weights(directory):
        config = _as_stored(config, Reader(data).dtype_name(), directory)
    return config if quantize is None else _to_quantize(config, quantize)


def _to_quantize(config: ModelConfig, scheme: str) -> ModelConfig:
    if config.quantization is not None:
        raise ConfigError("the checkpoint's weights are quantised already",
                          got=f"quantize={scheme!r}, quant_method={config.quantization['quant_method']!r}",
                          expected="quantize=None")
    return dataclasses.replace(config, quantization={"quant_method": "on-load", "scheme": scheme})


def _is_native(data: dict[str, Any]) -> bool:
    names, kind = data.get("architectures") or [None], data.get("model_type")
    if not isinstance(names, list) or names[0] is None:
        return kind is None or bool(native(kind))
    return names[0] == EAGLE3 or (isinstance(names[0], str) and family_of(names[0]) is not None)


def _by_transformers(data: dict[str, Any], directory: Path, trust_remote_code: bool) -> ModelConfig:
    from hal.checkpoints.any_config import parse_any

    read = Reader(data)
    eos = read.eos(None) if "eos_token_id" in data else None
    quantization = read.get(dict, None, "quantization_config", null=None)
    if quantization is not None:
        check_known(quantization)
    config = parse_any(data, read.dtype(), eos, read.bos(None), directory, trust_remote_code=trust_remote_code)
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
    read = Reader(data)
    if EAGLE3 in read.get(list, [], "architectures", null=[]):
        raise ModelLoadError("this checkpoint is a head that proposes tokens for another model", got=EAGLE3,
                             expected="a model that runs by itself",
                             hint="run its target model, with this directory as --draft-model and --speculate eagle")
    kind = read.get(str, None, "model_type", null=None)
    names = [n for n in read.get(list, [], "architectures", null=[]) if n is not None] or native(kind)
    architecture = names[0] if names else kind
    family = family_of(architecture) if isinstance(architecture, str) else None
    if family is None:
        raise ModelLoadError("this architecture is not supported", got="neither architectures nor model_type in "
                             "config.json" if architecture is None else shown(architecture),
                             expected=", ".join([*architectures(), *EMBEDDERS]),
                             hint="a package can add it: see docs/models.md")
    if kind not in (None, family.model_type):
        raise ModelLoadError("architectures and model_type of config.json contradict each other",
                             got=f"{architecture} and {shown(kind)}", expected=f"model_type {family.model_type!r}")
    config: ModelConfig = family.load("parse")(read, architecture)
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
    read = Reader(data)
    names = read.get(list, [], "architectures", null=[])
    if names != [EAGLE3]:
        raise ModelLoadError("the draft checkpoint is no EAGLE-3 head in the published layout",
                             got=shown(names), expected=EAGLE3, hint="--speculate draft takes a whole model as draft")
    read.refuse("tie_word_embeddings", "a head that is the embedding table of an EAGLE-3 head", False)
    config = llama(read, EAGLE3)
    if config.num_layers != 1:
        raise read.unusable("num_hidden_layers", config.num_layers, "1, since an EAGLE-3 head has one layer")
    own = Reader(read.get(dict, {}, "eagle_config", null={}))
    if not own.flag(True, "use_aux_hidden_state"):
        own.refuse("use_aux_hidden_state", "a head that does not read hidden states of three layers", True)
    drafts = read.size(config.vocab_size, config.vocab_size, "draft_vocab_size", null=config.vocab_size)
    target = read.size(config.hidden_size, MAX_HIDDEN, "target_hidden_size", null=config.hidden_size)
    taps = own.get(list, None, "eagle_aux_hidden_state_layer_ids", null=None)
    taps = read.get(list, [], "eagle_aux_hidden_state_layer_ids", null=[]) if taps is None else taps
    if taps and (len(taps) != 3 or any(type(i) is not int or not 0 <= i < MAX_LAYERS for i in taps)):
        raise read.unusable("eagle_aux_hidden_state_layer_ids", taps, "three numbers of layers, low to high")
    eagle = EagleConfig(draft_vocab_size=drafts, target_hidden_size=target, taps=tuple(taps),
                        norm_before_residual=read.flag(False, "norm_before_residual"))
    config = dataclasses.replace(config, family="eagle3", eagle=eagle)
    _check_shape(config)
    return config


def _check_shape(config: ModelConfig) -> None:
    if config.num_heads % config.num_kv_heads:
        raise ModelLoadError("the key-value heads in config.json do not divide the heads",
                             got=f"{config.num_kv_heads} and {config.num_heads}")
    if config.rope and config.head_dim % 2:
        raise ModelLoadError("a rotary embedding needs an even head_dim", got=config.head_dim)
    if any(rope.rotary_dim > config.head_dim for rope in (config.rope, config.local_rope) if rope):
        raise ModelLoadError("the rotary embedding has more entries than a head", got=config.head_dim)
    experts = config.experts
    if experts is not None and experts.per_token > experts.count:
        raise ModelLoadError("a token has more experts than there are", got=f"{experts.per_token} of {experts.count}")
    if experts is not None and (experts.count % experts.groups or experts.top_groups > experts.groups or (
            experts.top_groups * experts.count // experts.groups < experts.per_token) or (
            experts.sigmoid and experts.count < 2 * experts.groups)):
        raise ModelLoadError("the groups of experts in config.json are not usable", got=f"{experts.count} experts in "
                             f"{experts.groups} groups, of which a token chooses {experts.top_groups}",
                             expected=f"equal groups, in which a token finds {experts.per_token} experts")
    if config.num_params > MAX_PARAMS:
        raise ModelLoadError("config.json describes a model of impossible size", got=f"{config.num_params} parameters",
                             expected=f"at most {MAX_PARAMS}")
