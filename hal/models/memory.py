"""The memory that a rank's weights take, by the scheme that they are stored in. Building the model takes no memory."""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import torch

from hal.config import EngineConfig, Topology
from hal.contracts.communicator import LocalCommunicator
from hal.model_config import ModelConfig
from hal.models import build_model
from hal.models.expert_weights import ExpertWeight
from hal.models.layers import LinearWeight
from hal.models.ops import Ops

EXPERTS = "experts "  # before the scheme's name, of experts whose weights are in few bits


class Held(NamedTuple):
    """Linear layers of a scheme, and their bytes. Those of experts count apart, if their weights are in few bits: one
    layer of all experts is one. Everything else of a model counts as "other", without layers."""

    layers: int
    bytes: int


def weight_bytes(config: ModelConfig, dtype: str, topology: Topology | None = None) -> dict[str, Held]:
    """By scheme, what a rank holds. `dtype`: of the model, as torch spells it. Raises as build_model does."""
    model = build_model(config, topology or Topology(), LocalCommunicator(), Ops(), getattr(torch, dtype),
                        torch.device("meta"))
    found: dict[str, Held] = {}
    seen = set[int]()
    for module in (*(m for m in model.modules() if isinstance(m, LinearWeight)), model):
        own = [p for p in module.parameters() if id(p) not in seen]
        seen.update(map(id, own))
        name = module.scheme.name if isinstance(module, LinearWeight) else "other"
        if isinstance(module, ExpertWeight):
            name = f"{EXPERTS}{name}"
        before = found.get(name, Held(0, 0))
        found[name] = Held(before.layers + isinstance(module, LinearWeight), before.bytes + sum(p.nbytes for p in own))
    return found


def row_state(config: ModelConfig, dtype: str, topology: Topology | None = None) -> Held:
    """The layers of a rank that keep a state per row, and the bytes of a row in all of them."""
    model = build_model(config, topology or Topology(), LocalCommunicator(), Ops(), getattr(torch, dtype),
                        torch.device("meta"))
    arrays = [array for spec in model.state_specs for array in spec.tensors.values()]
    return Held(len(model.state_specs), sum(math.prod(dim.offset for dim in array.dims)
                                            * getattr(torch, array.dtype).itemsize for array in arrays))


def described(held: dict[str, Held]) -> str:
    """ "4.6 GiB of weights: int4-groups 3.5 in 128 layers, dense 0.5 in 1, other 0.5"."""
    unit, name = (1 << 30, "GiB") if sum(h.bytes for h in held.values()) >= 1 << 30 else (1 << 20, "MiB")
    parts = [f"{scheme} {h.bytes / unit:.1f}" + (f" in {h.layers} layers" if h.layers else "")
             for scheme, h in held.items()]
    return f"{sum(h.bytes for h in held.values()) / unit:.1f} {name} of weights a rank: {', '.join(parts)}"


def memory_line(config: EngineConfig, model: ModelConfig, dtype: str) -> str:
    """For people: the bytes of the first rank's weights by scheme, and those of a token in its KV cache."""
    topology = Topology(config.tp, config.pp, 0, config.ep)
    text = described(weight_bytes(model, dtype, topology))
    if model.delta is not None:
        state, rows = row_state(model, dtype, topology), config.max_num_seqs + 1
        text += (f"; states of {state.layers} layers {state.bytes / (1 << 20):.2f} MiB a row, "
                 f"{rows * state.bytes / (1 << 20):.0f} MiB for max_num_seqs={config.max_num_seqs} and padding; no "
                 "prefix caching, since the state after a prefix is not kept")
    if config.model.endswith(".gguf"):
        text += f"; the file has {os.path.getsize(config.model) / (1 << 30):.2f} GiB"
    return text if config.kv_dtype == "auto" else (
        f"{text}; KV cache in {config.kv_dtype}, {_SMALLER[dtype]}, with "
        f"{'the scales of the checkpoint' if (model.quantization or {}).get('kv_cache_scheme') else 'scales of 1'}")


_SMALLER = {"float32": "a quarter of the bytes of float32", "bfloat16": "half the bytes of bfloat16",
            "float16": "half the bytes of float16"}
