"""The legal content of a recording's file: its head, its engine options and its model's shape, within limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hal.config import EngineConfig
from hal.errors import ConfigError, WireError
from hal.model_config import ModelConfig

FORMAT = 3
# The options that a run takes from a file. The numbers of blocks follow from the steps. The caller gives all others.
HONOURED = ("dtype", "kv_dtype", "quantize", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size",
            "graphs", "seed", "max_adapters", "max_adapter_rank")
LIMITS = {"max_model_len": 1 << 24, "max_num_seqs": 1 << 16, "max_num_batched_tokens": 1 << 24, "block_size": 1 << 12,
           "num_blocks": 2**31 - 1, "num_cpu_blocks": 1 << 24, "max_adapters": 1 << 10, "max_adapter_rank": 1 << 10}
_TOKENS = 1 << 28  # tokens that the rows of all sequences may hold: 1 GiB on the host
_MODEL_LIMITS = {"vocab_size": 1 << 24, "hidden_size": 1 << 20, "num_layers": 1 << 12, "num_heads": 1 << 14,
                 "num_kv_heads": 1 << 14, "head_dim": 1 << 14, "intermediate_size": 1 << 24, "max_position": 1 << 24}
SHAPE = ("family", *_MODEL_LIMITS)


def read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            head = json.loads((file.metadata() or {})["hal"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ConfigError("the recording cannot be read", got=f"{path}: {error}") from None
    except (KeyError, ValueError, RecursionError):
        raise WireError("this safetensors file is not a recording", got=path) from None
    except (RuntimeError, TypeError, OverflowError) as error:  # shapes and dtypes that torch does not have
        raise WireError("the recording's tensors are not usable", got=f"{path}: {error}") from None
    if not isinstance(head, dict) or head.get("format") != FORMAT or type(head["format"]) is not int:
        got = head.get("format") if isinstance(head, dict) else None
        raise WireError("this safetensors file is not a recording of this format", got=f"{path}: {got!r:.40}",
                        expected=f"format {FORMAT}", hint="replay it with the version of hal that made it")
    return head, tensors


def object_of(head: Any, name: str) -> dict[str, Any]:
    found = head.get(name) if isinstance(head, dict) else None
    if not isinstance(found, dict):
        raise WireError(f"the recording has no {name}", got=repr(found)[:100], expected="a JSON object")
    return found


def info_of(head: dict[str, Any]) -> dict[str, Any]:
    """Recording.info. Terminals show its texts, so they have no control characters and a limited length."""
    info = object_of(head, "info")
    versions = object_of(info, "versions")
    texts = [info.get("device"), info.get("error", ""), *versions.values()]
    if not all(isinstance(text, str) for text in texts):
        raise WireError("the recording's info is not usable", got=repr(info)[:100], expected="texts")
    plain = {name: _plain(value) if isinstance(value, str) else value for name, value in info.items()}
    return {**plain, "versions": {_plain(name): _plain(value) for name, value in versions.items()}}


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text[:1000])


def check_limits(engine: EngineConfig, model: ModelConfig) -> None:
    for where, config, limits in (("engine", engine, LIMITS), ("model", model, _MODEL_LIMITS)):
        for name, most in limits.items():
            value = getattr(config, name)
            if value is not None and not 0 <= value <= most:
                raise WireError(f"the recording's {where}.{name} is out of range", got=value, expected=f"0 to {most}")
    for name in SHAPE[1:]:
        if getattr(model, name) < 1:
            raise WireError(f"the recording's model.{name} is out of range", got=getattr(model, name),
                            expected="1 or more")
    if not -2**63 <= engine.seed < 2**63:
        raise WireError("the recording's engine.seed is out of range", got=engine.seed, expected="64 bits")
    if (model.num_heads % model.num_kv_heads or (model.rope and model.head_dim % 2)
            or len(model.windows) not in (0, model.num_layers) or any(w is not None and w < 1 for w in model.windows)
            or any(rope.rotary_dim > model.head_dim for rope in (model.rope, model.local_rope) if rope)):
        raise WireError("the recording's model has a shape that contradicts itself", got=repr(model)[:500])
    length = engine.max_model_len or model.max_position
    if length > model.max_position:
        raise WireError("the recording's max_model_len is larger than its model's context", got=length,
                        expected=f"at most {model.max_position}")
    if engine.max_num_seqs * length > _TOKENS:
        raise WireError("the recording's max_num_seqs times its max_model_len is out of range",
                        got=engine.max_num_seqs * length, expected=f"at most {_TOKENS} tokens")
