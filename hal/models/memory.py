"""The memory that a rank's weights take, by the scheme that they are stored in. Building the model takes no memory."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from hal.config import EngineConfig, Topology
from hal.contracts.communicator import LocalCommunicator
from hal.model_config import ModelConfig
from hal.models import build_model
from hal.models.layers import Linear
from hal.models.ops import Ops


class Held(NamedTuple):
    """Linear layers of a scheme, and their bytes. Everything else of a model counts as "other", without layers."""

    layers: int
    bytes: int


def weight_bytes(config: ModelConfig, dtype: str, topology: Topology | None = None) -> dict[str, Held]:
    """By scheme, what a rank holds. `dtype`: of the model, as torch spells it. Raises as build_model does."""
    model = build_model(config, topology or Topology(), LocalCommunicator(), Ops(), getattr(torch, dtype),
                        torch.device("meta"))
    found: dict[str, Held] = {}
    seen = set[int]()
    for module in (*(m for m in model.modules() if isinstance(m, Linear)), model):
        own = [p for p in module.parameters() if id(p) not in seen]
        seen.update(map(id, own))
        name = module.scheme.name if isinstance(module, Linear) else "other"
        before = found.get(name, Held(0, 0))
        found[name] = Held(before.layers + isinstance(module, Linear), before.bytes + sum(p.nbytes for p in own))
    return found


def described(held: dict[str, Held]) -> str:
    """ "4.6 GiB of weights: int4-groups 3.5 in 128 layers, dense 0.5 in 1, other 0.5"."""
    unit, name = (1 << 30, "GiB") if sum(h.bytes for h in held.values()) >= 1 << 30 else (1 << 20, "MiB")
    parts = [f"{scheme} {h.bytes / unit:.1f}" + (f" in {h.layers} layers" if h.layers else "")
             for scheme, h in held.items()]
    return f"{sum(h.bytes for h in held.values()) / unit:.1f} {name} of weights a rank: {', '.join(parts)}"


def memory_line(config: EngineConfig, model: ModelConfig, dtype: str) -> str:
    """For people: the bytes of the first rank's weights by scheme, and those of a token in its KV cache."""
    text = described(weight_bytes(model, dtype, Topology(config.tp, config.pp, 0, config.ep)))
    if config.model.endswith(".gguf"):
        text += f"; the file has {os.path.getsize(config.model) / (1 << 30):.2f} GiB"
    return text if config.kv_dtype == "auto" else (
        f"{text}; KV cache in {config.kv_dtype}, {_SMALLER[dtype]}, with "
        f"{'the scales of the checkpoint' if (model.quantization or {}).get('kv_cache_scheme') else 'scales of 1'}")


_SMALLER = {"float32": "a quarter of the bytes of float32", "bfloat16": "half the bytes of bfloat16",
            "float16": "half the bytes of float16"}
