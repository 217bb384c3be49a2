"""Tiny random checkpoints in Hugging Face format, written by the kit itself: one for each feature of a decoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hal.checkpoints.hf_config import parse_config
from hal.config import Topology
from hal.contracts.communicator import LocalCommunicator
from hal.models import build_model
from hal.models.ops import Ops
from hal.weights.sharding import spec_of

VOCAB, WINDOW, LENGTH, LONG = 199, 8, 128, 10_240
_DECODER = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": LENGTH,
            "tie_word_embeddings": False, "eos_token_id": None, "bos_token_id": None}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {**_DECODER, "architectures": ["LlamaForCausalLM"]},
    "long": {**_DECODER, "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 48,
             "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
             "max_position_embeddings": LONG},
    "window": {**_DECODER, "architectures": ["MistralForCausalLM"], "sliding_window": WINDOW},
    "qwen3": {**_DECODER, "architectures": ["Qwen3ForCausalLM"], "head_dim": 32, "tie_word_embeddings": True},
    "gpt2": {"architectures": ["GPT2LMHeadModel"], "vocab_size": VOCAB, "n_embd": 64, "n_layer": 3, "n_head": 4,
             "n_positions": LENGTH, "eos_token_id": None, "bos_token_id": None}}


def save(shape: str, directory: Path, seed: int) -> Path:
    """Write config.json and model.safetensors (fp32). The weights keep activations and logits near one. So an error in
    any place shows in the result, and rounding errors do not grow on the way."""
    directory.mkdir(parents=True)
    config = parse_config(SHAPES[shape])
    model = build_model(config, Topology(), LocalCommunicator(), Ops(), torch.float32, torch.device("meta"))
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for parameter in model.parameters():
        for source in spec_of(parameter).sources:
            inputs = source.shape[0 if source.transposed else -1]
            if source.name in tensors:
                continue
            if source.name.endswith("bias"):
                value = torch.empty(source.shape).normal_(0.0, 0.1, generator=generator)
            elif len(source.shape) == 1:
                value = torch.empty(source.shape).uniform_(0.5, 1.5, generator=generator)
            else:
                embeds = source.name.startswith(("embed", "wte", "wpe"))
                deviation = 0.5 if embeds else 2.0 / inputs ** 0.5 if "lm_head" in source.name else inputs ** -0.5
                value = torch.empty(source.shape).normal_(0.0, deviation, generator=generator)
            tensors[source.name] = value
    save_file(tensors, str(directory / "model.safetensors"))
    (directory / "config.json").write_text(json.dumps(SHAPES[shape], indent=1), encoding="utf-8")
    return directory
