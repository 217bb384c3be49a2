"""The config.json of an architecture that the Transformers backend runs, read by transformers itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from hal.checkpoints.stored import shown
from hal.errors import ModelLoadError
from hal.model_config import ModelConfig
from hal.models.families import EMBEDDERS

_MAX = {"vocab_size": 1 << 22, "hidden_size": 1 << 17, "num_hidden_layers": 1024, "max_position_embeddings": 1 << 24}
_MAX_PARAMS = 10**13
_POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")


def parse_any(data: dict[str, Any], dtype: str, eos: tuple[int, ...] | None, bos: int | None, directory: Path, *,
              trust_remote_code: bool = False) -> ModelConfig:
    """The shape of a model of any architecture that transformers has as a causal language model.

    Args:
        dtype, eos, bos: what config.json says; None for eos where it says nothing.

    Raises:
        ModelLoadError: transformers does not have the architecture or refuses its configuration, or the checkpoint
            wants its own code and nobody trusts it.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    try:
        from hal.models.skeleton import config_object, trace
    except ImportError as error:
        raise ModelLoadError("this release of transformers is too old for the Transformers backend",
                             got=f"transformers {transformers.__version__}", expected="transformers 5 or later",
                             hint="a native definition needs no newer one: see docs/transformers.md") from error
    configs: Any = transformers.CONFIG_MAPPING
    causal: dict[str, Any] = dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

    kind, names = data.get("model_type"), data.get("architectures") or []
    auto_map = data.get("auto_map")
    own = isinstance(auto_map, dict) and "AutoModelForCausalLM" in auto_map
    architecture = str(names[0]) if isinstance(names, list) and names else str(kind)
    known = isinstance(kind, str) and kind in causal and kind in configs
    listed = causal[str(kind)] if known else ()
    classes = (listed,) if isinstance(listed, str) else tuple(listed)
    if known and not names:
        architecture = classes[0]
    if own and not known and not trust_remote_code:
        raise ModelLoadError("the checkpoint's model is Python code of its own, which is not run",
                             got=shown(architecture),
                             hint="read that code; to run it, give --trust-remote-code (trust_remote_code=True). "
                                  "No certificate says that its results are right")
    if kind is None and not own and (types := [name for name, value in causal.items() if architecture in (
            (value,) if isinstance(value, str) else value)]):
        raise ModelLoadError("config.json has no model_type", got=shown(architecture),
                             expected=f"model_type {' or '.join(types)}", hint="add it, if the checkpoint is complete")
    if not known and not own:
        raise ModelLoadError("this architecture is not supported", got=shown(architecture),
                             expected="a native family, or a causal language model of transformers",
                             hint=f"embeddings can be computed by {', '.join(EMBEDDERS)}")
    if known and architecture not in classes:
        raise ModelLoadError("this architecture is not supported", got=shown(architecture),
                             expected=f"the causal language model of {kind}: {', '.join(classes)}")
    try:
        if known:
            config = config_object(data)
        else:
            config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=True)
        text = config.get_text_config(decoder=True)
    except Exception as error:  # the configuration class of any architecture
        said = f"{type(error).__name__}: {error!s:.200}"
        if not known:
            raise ModelLoadError("the checkpoint's own code does not load", got=said, hint=(
                "its files are missing, need a package that is not installed, or were written for another release of "
                "transformers")) from error
        raise ModelLoadError("transformers refuses config.json", got=said,
                             hint="config.json is damaged, or another release of transformers wrote it") from error
    sizes: dict[str, Any] = {name: getattr(text, name, None) for name in _MAX}
    sizes["max_position_embeddings"] = next((v for n in _POSITIONS if (v := getattr(text, n, None))), None)
    if sizes["max_position_embeddings"] is None:
        raise ModelLoadError(f"the configuration of {architecture} says nothing of the longest context", expected=(
            f"one of {', '.join(_POSITIONS)}"), hint="an architecture without positions cannot run here")
    for name, value in sizes.items():
        if type(value) is not int or not 1 <= value <= _MAX[name]:
            raise ModelLoadError(f"{name} in config.json is not usable", got=shown(value),
                                 expected=f"an integer from 1 to {_MAX[name]}")
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = {str(r.get("rope_type")) for r in (rope, *rope.values()) if isinstance(r, dict)}
    if "longrope" in kinds:
        raise ModelLoadError("the Transformers backend cannot run rope type 'longrope'",
                             got=architecture, expected="a rotary embedding that is the same for all sequences",
                             hint="transformers chooses the factors by the longest sequence of a batch")
    heads = _number(text, "num_attention_heads", 1)
    generated = text.eos_token_id if eos is None else eos
    ids = (generated,) if isinstance(generated, int) else tuple(generated or ())
    model = ModelConfig(
        family="transformers", architecture=architecture, vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"], num_layers=sizes["num_hidden_layers"], num_heads=heads,
        num_kv_heads=_number(text, "num_key_value_heads", heads),
        head_dim=_number(text, "head_dim", max(sizes["hidden_size"] // heads, 1)),
        intermediate_size=_number(text, "intermediate_size", 4 * sizes["hidden_size"]),
        max_position=sizes["max_position_embeddings"], tie_embeddings=bool(getattr(text, "tie_word_embeddings", False)),
        bos_token_id=text.bos_token_id if bos is None else bos, eos_token_ids=ids, dtype=dtype, source=data,
        code=None if known else str(directory), windows=(None,) * sizes["num_hidden_layers"])
    found = trace(model)
    if found.num_params > _MAX_PARAMS:
        raise ModelLoadError("config.json describes a model of impossible size", got=f"{found.num_params} parameters",
                             expected=f"at most {_MAX_PARAMS}")
    return replace(model, embedding_name=found.embedding)


def _number(text: Any, name: str, default: int) -> int:
    try:
        value = getattr(text, name, None)
    except Exception:  # a size that differs between layers; the trace finds those of each
        return default
    return value if type(value) is int and value > 0 else default
