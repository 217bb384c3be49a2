"""What a sentence-transformers directory says beside the model: modules.json and the files that it leads to. This
loads no torch.

The first module is the model, the second pools its hidden states, and linear layers and a normalisation may follow.
Anything else is refused by name, since it would change the vectors.
"""

from __future__ import annotations

import json
from os.path import isfile
from pathlib import Path, PurePosixPath
from typing import Any

from hal.checkpoints.reader import INT32, MAX_HIDDEN, Reader
from hal.checkpoints.stored import read_json, shown
from hal.config import Pooling
from hal.errors import ModelLoadError
from hal.model_config import DenseConfig, EmbeddingConfig, ModelConfig, PoolingKind
from hal.models.families import EMBEDDERS

MODULES = "modules.json"
_SETTINGS = tuple(f"sentence_{kind}_config.json" for kind in ("bert", "roberta", "distilbert", "camembert", "albert",
                                                              "xlm-roberta", "xlnet"))
_MODES: dict[str, PoolingKind] = {
    "pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean", "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt", "pooling_mode_lasttoken": "last"}
_NAMES: dict[str, PoolingKind] = {"cls": "cls", "mean": "mean", "max": "max", "mean_sqrt_len_tokens": "mean_sqrt",
                                  "lasttoken": "last"}
_ACTIVATIONS: dict[str, Any] = {"Identity": "identity", "Tanh": "tanh", "ReLU": "relu", "GELU": "gelu"}
_KNOWN = ("Transformer", "Pooling", "Dense", "Normalize")


def embedding_of(directory: Path, config: ModelConfig, pooling: Pooling) -> EmbeddingConfig | None:
    """How a checkpoint's model makes embeddings; None where it generates.

    Raises:
        ModelLoadError: modules.json has a module that is not known, or in another order; a module's file is not usable
            or does not fit the model; an architecture without a head has neither modules.json nor `pooling`; the
            Transformers backend runs the model.
    """
    described = isfile(directory / MODULES)
    headless = config.architecture in EMBEDDERS or not config.causal
    if pooling == "none" and headless:
        raise ModelLoadError("this model cannot generate: it has no head, or its tokens see the tokens behind them",
                             got=config.architecture,
                             expected='a pooling, or "auto" with modules.json')
    if pooling == "none" or (pooling == "auto" and not described and not headless):
        return None
    if config.source is not None:
        raise ModelLoadError("the Transformers backend makes no embeddings", got=config.architecture,
                             expected=f"a native architecture, or one of {', '.join(EMBEDDERS)}")
    if described:
        return _by_modules(directory, config, pooling)
    if pooling == "auto":
        raise ModelLoadError("the checkpoint does not say how its hidden states become an embedding",
                             got=f"{config.architecture} without {MODULES}",
                             expected="a sentence-transformers directory",
                             hint="it cannot generate; to embed, give --pooling cls, mean or last, as the model was "
                                  "trained; the vectors are then normalised")
    return EmbeddingConfig(pooling=pooling, max_length=config.max_position, prompts={})


def _by_modules(directory: Path, config: ModelConfig, pooling: Pooling) -> EmbeddingConfig:
    modules = _modules(directory)
    if len(modules) < 2 or [kind for kind, _ in modules[:2]] != ["Transformer", "Pooling"]:
        raise _order(modules)
    if modules[0][1]:
        raise ModelLoadError(f"{MODULES} has the model in a folder of its own", got=shown(modules[0][1]),
                             expected='the path ""', hint="save the directory with a newer sentence-transformers")
    own = _pooling(directory, modules[1][1], config)
    size, dense, normalise = config.hidden_size, [], False
    for kind, folder in modules[2:]:
        if kind not in ("Dense", "Normalize") or normalise:
            raise _order(modules)
        if kind == "Normalize":
            normalise = True
            continue
        dense.append(_dense(directory, folder, size))
        size = dense[-1].out_size
    prompts = Reader({}) if not isfile(directory / "config_sentence_transformers.json") else Reader(
        read_json(directory / "config_sentence_transformers.json"), "config_sentence_transformers.json")
    texts, default = prompts.get(dict, {}, "prompts", null={}), prompts.get(str, None, "default_prompt_name", null=None)
    if not all(isinstance(text, str) for text in texts.values()):
        raise prompts.unusable("prompts", texts, "an object of texts")
    if default is not None and default not in texts:
        raise prompts.unusable("default_prompt_name", default, f"a name of prompts: {', '.join(texts) or 'none'}")
    settings = next((Reader(read_json(directory / name), name) for name in _SETTINGS if isfile(directory / name)),
                    Reader({}))
    most = settings.size(None, INT32, "max_seq_length", null=None)
    return EmbeddingConfig(
        pooling=own if pooling == "auto" else pooling, normalise=normalise, dense=tuple(dense),  # type: ignore[arg-type]
        max_length=min(most or _of_tokenizer(directory) or config.max_position, config.max_position), prompts=texts,
        default_prompt=default, strip=True, lower_case=settings.flag(False, "do_lower_case"))


def _modules(directory: Path) -> list[tuple[str, str]]:
    """(kind, folder) of each module."""
    path = directory / MODULES
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        entries = sorted(entries, key=lambda entry: entry["idx"])
        found = [(entry["type"], entry["path"]) for entry in entries]
        if not all(isinstance(kind, str) and isinstance(folder, str) for kind, folder in found):
            raise TypeError("type and path are not texts")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ModelLoadError(f"{MODULES} cannot be read", got=f"{path}: {type(error).__name__}: {error}",
                             expected="a list of modules, each with idx, type and path") from None
    for kind, folder in found:
        package, _, name = kind.rpartition(".")
        if package.partition(".")[0] != "sentence_transformers" or name not in _KNOWN:
            raise ModelLoadError(f"{MODULES} names a module that is not known", got=shown(kind),
                                 expected=", ".join(_KNOWN), hint="only modules of sentence-transformers itself are "
                                 "read, and no code of the checkpoint is run")
        if ".." in PurePosixPath(folder).parts or folder.startswith("/"):
            raise ModelLoadError(f"{MODULES} names a folder outside the checkpoint", got=shown(folder),
                                 expected="a folder of the model directory")
    return [(kind.rpartition(".")[2], folder) for kind, folder in found]


def _order(modules: list[tuple[str, str]]) -> ModelLoadError:
    return ModelLoadError(f"the modules of {MODULES} stand in an order that is not supported",
                          got=", ".join(kind for kind, _ in modules) or "no module",
                          expected="Transformer, Pooling, then any number of Dense, then perhaps Normalize")


def _settings(directory: Path, folder: str) -> Reader:
    """The config.json of a module."""
    name = str(PurePosixPath(folder) / "config.json")
    if not isfile(directory / name):
        raise ModelLoadError(f"{MODULES} names a module whose settings are missing", got=f"{directory} without {name}",
                             expected="a sentence-transformers directory", hint="download the checkpoint again")
    return Reader(read_json(directory / name), name)


def _pooling(directory: Path, folder: str, config: ModelConfig) -> PoolingKind:
    read = _settings(directory, folder)
    size = read.size(config.hidden_size, MAX_HIDDEN, "word_embedding_dimension", "embedding_dimension")
    if size != config.hidden_size:
        raise ModelLoadError("the pooling module does not belong to this model", expected=config.hidden_size,
                             got=f"word_embedding_dimension = {size} in {read.file}")
    if not read.flag(True, "include_prompt"):
        raise ModelLoadError(f"{read.file} leaves the prompt's tokens out of the pooling, which is not supported",
                             got="include_prompt = false")
    if "pooling_mode" in read.data:
        name = read.get(str, "", "pooling_mode")
        if name not in _NAMES:
            raise read.unusable("pooling_mode", name, ", ".join(_NAMES))
        return _NAMES[name]
    chosen = [name for name in read.data if name.startswith("pooling_mode_") and read.flag(False, name)]
    if len(chosen) != 1 or chosen[0] not in _MODES:
        raise ModelLoadError(f"{read.file} does not choose one pooling that is supported",
                             got=", ".join(chosen) or "no mode that is true", expected=f"one of {', '.join(_MODES)}")
    return _MODES[chosen[0]]


def _dense(directory: Path, folder: str, size: int) -> DenseConfig:
    read = _settings(directory, folder)
    inner, outer = (read.size(None, MAX_HIDDEN, name) for name in ("in_features", "out_features"))
    if inner != size or outer is None:
        raise ModelLoadError(f"the dense module {folder} does not fit what comes before it",
                             got=f"in_features = {inner}, out_features = {outer}", expected=f"in_features = {size}")
    activation = read.get(str, "torch.nn.modules.activation.Tanh", "activation_function")
    name = activation.removeprefix("torch.nn.").rpartition(".")[2]
    if not activation.startswith("torch.nn.") or name not in _ACTIVATIONS:
        raise read.unusable("activation_function", activation, ", ".join(f"torch.nn.{n}" for n in _ACTIVATIONS))
    return DenseConfig(folder=folder, in_size=inner, out_size=outer, bias=read.flag(True, "bias"),
                       activation=_ACTIVATIONS[name])


def _of_tokenizer(directory: Path) -> int | None:
    """The longest text by tokenizer_config.json. A tokenizer without a limit has a very large one."""
    path = directory / "tokenizer_config.json"
    most = read_json(path).get("model_max_length") if isfile(path) else None
    return int(most) if isinstance(most, (int, float)) and 1 <= most <= INT32 else None
