"""The configuration of a draft: a smaller model, or an EAGLE-3 head, that proposes tokens for a target model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from hal.checkpoints.hf_config import parse_eagle, read_config
from hal.checkpoints.stored import has_weights, locate, read_json
from hal.errors import ConfigError
from hal.model_config import ModelConfig


def read_draft(directory: str | Path, kind: Literal["draft", "eagle"], target: ModelConfig, max_model_len: int, *,
               weights: bool = True) -> ModelConfig:
    """The shape of a draft, checked against the model that it proposes tokens for.

    Args:
        kind: "draft" is a model that runs by itself, "eagle" an EAGLE-3 head.
        max_model_len: the engine's longest sequence, which the draft must reach too.
        weights: as in read_config.

    Raises:
        ConfigError: the draft's vocabulary, context or hidden size does not fit the target.
        ModelLoadError: the checkpoint is of another kind, or as read_config.
    """
    directory = Path(directory)
    config = read_config(directory, weights=weights) if kind == "draft" else _read_eagle(directory, target, weights)
    if config.vocab_size != target.vocab_size:
        raise ConfigError("the draft model has another vocabulary than the target model",
                          got=f"{config.vocab_size} tokens in {directory}", expected=f"{target.vocab_size} tokens",
                          hint="take a draft of the same family: token ids must mean the same in both")
    if config.max_position < max_model_len:
        raise ConfigError("the draft model's context is shorter than the engine's longest sequence",
                          got=f"{config.max_position} tokens in {directory}", expected=f"at least {max_model_len}",
                          hint=f"set max_model_len to at most {config.max_position}")
    return config


def _read_eagle(directory: Path, target: ModelConfig, weights: bool) -> ModelConfig:
    config = parse_eagle(read_json(directory / "config.json"))
    eagle = config.eagle
    assert eagle is not None
    if eagle.target_hidden_size != target.hidden_size:
        raise ConfigError("the EAGLE-3 head was trained for another target model",
                          got=f"hidden states of {eagle.target_hidden_size} values in {directory}",
                          expected=f"{target.hidden_size}, the target's hidden_size")
    taps = eagle.layers(target.num_layers)
    if min(taps) < 0 or max(taps) >= target.num_layers:
        raise ConfigError("the EAGLE-3 head reads a layer that the target model does not have", got=list(taps),
                          expected=f"layers from 0 to {target.num_layers - 1}",
                          hint="eagle_aux_hidden_state_layer_ids in the head's config.json names the layers")
    own = weights and has_weights(directory) and "embed_tokens.weight" in locate(directory)
    if not own and config.hidden_size != target.hidden_size:
        raise ConfigError("the EAGLE-3 head uses the target's embeddings, which have another size",
                          got=f"hidden_size {config.hidden_size} in {directory}", expected=target.hidden_size)
    return dataclasses.replace(config, eagle=dataclasses.replace(eagle, taps=taps, own_embeddings=own))
