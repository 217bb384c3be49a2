"""What a decoder has beside the parts of a plain Llama: a runner of one's own refuses what it does not compute."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from hal.errors import ConfigError
from hal.models.causal_lm import CausalLM

# Fields of a ModelConfig that change sizes and names alone, or that the library handles: tables of rotary angles hold
# what RopeConfig says, and Ops.schemes refuses formats of weights.
PLAIN = frozenset(("architecture", "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
                   "intermediate_size", "max_position", "norm_eps", "embedding_name", "rope", "tie_embeddings",
                   "bos_token_id", "eos_token_ids", "dtype", "quantization", "code"))
_NORMS = ("input_layernorm", None, "post_attention_layernorm", None)  # of a Llama layer, as Decoder.norms names them


def parts_of(model: CausalLM) -> dict[str, Any]:
    """What the model has beside the parts of a plain Llama, with its value: fields of ModelConfig (a field that a later
    version adds counts as a part), "norms" at other places, and "no_positions" without rotary embedding."""
    config = model.config
    used = {f.name: value for f in dataclasses.fields(config) if f.name not in PLAIN
            and (value := getattr(config, f.name)) != ("llama" if f.name == "family" else f.default)}
    if not any(used.get("windows", ())):
        used.pop("windows", None)
    if (norms := tuple(getattr(model, "norms", _NORMS))) != _NORMS:
        used["norms"] = norms
    return used if config.rope is not None else {**used, "no_positions": "rope=None"}


def refuse_parts(model: CausalLM, who: str, supported: Collection[str] = ()) -> None:
    """Refuse a model with parts that a runner does not compute, before its weights are loaded.

    Args:
        who: the runner's name. supported: which parts it computes, by their names in `parts_of`.

    Raises:
        ConfigError: it has others.
    """
    lacking = {name: value for name, value in parts_of(model).items() if name not in supported}
    if lacking:
        raise ConfigError(f"{who} does not compute all parts of {model.config.architecture}",
                          got=", ".join(f"{name}={value!r:.60}" for name, value in lacking.items()),
                          expected=f"a Llama decoder with at most: {', '.join(sorted(supported)) or 'nothing more'}",
                          hint="run this model on --device cpu")
