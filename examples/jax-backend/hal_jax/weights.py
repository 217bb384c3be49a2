"""The weights of a stage as JAX arrays. hal builds each rank's part of the model and fills it from the checkpoint, so
the cuts of tensor parallelism need no code here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import torch

from hal.checkpoints.loader import load_weights, random_weights
from hal.config import Topology, WorkerConfig
from hal.contracts.attention import AttentionSpec, refuse_unsupported
from hal.contracts.communicator import LocalCommunicator
from hal.contracts.runner import Progress
from hal.errors import ConfigError
from hal.models import build_model
from hal.models.causal_lm import CausalLM
from hal.models.decoder import DecoderLayer
from hal.models.gpt2 import GPT2Layer
from hal.models.layers import Linear
from hal.models.mlp import GatedMLP
from hal.models.ops import Ops
from hal.weights.sharding import spec_of
from hal_jax.model import FAR, Weights

# GPT-2's names for the parts that other decoders have too.
GPT2 = {"attn_norm": "before_attention", "attn_norm_bias": "before_attention_bias", "qkv": "attention.qkv",
        "out": "attention.out", "mlp_norm": "before_mlp", "mlp_norm_bias": "before_mlp_bias", "up": "mlp.gate_up",
        "down": "mlp.down", "norm": "final_norm", "norm_bias": "final_norm_bias"}


class DenseOps(Ops):
    schemes = ("dense",)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().contiguous()
    return tensor.view(torch.uint16).numpy().view(jnp.bfloat16) if tensor.dtype is torch.bfloat16 else tensor.numpy()


def load_shares(config: WorkerConfig, topologies: Sequence[Topology], dtype: torch.dtype, progress: Progress,
                ) -> list[CausalLM]:
    """The model of each of these ranks, on the host. Raises as ModelRunnerBase.load_model."""
    engine, shares = config.engine, []
    for topology in topologies:
        share = build_model(config.model, topology, LocalCommunicator(), DenseOps(), dtype, torch.device("cpu"),
                            config.max_model_len)
        _refuse(share)
        if engine.random_weights:
            random_weights(share, engine.seed)
        else:
            load_weights(share, engine.model, progress)
        shares.append(share)
    return shares


def _refuse(model: CausalLM) -> None:
    c, layers = model.config, getattr(model, "layers", ())
    known = all(isinstance(x, GPT2Layer) or (isinstance(x, DecoderLayer) and isinstance(x.mlp, GatedMLP))
                for x in layers)
    alike = len({(s.num_heads, s.num_kv_heads, s.head_dim, s.scale) for s in model.attention_specs}) == 1
    if not (layers and known and alike and all(isinstance(x, AttentionSpec) for x in model.caches)) or c.qk_norm_whole:
        raise ConfigError("the JAX example does not have this model's layers", got=c.architecture,
                          expected="dense decoder layers of one shape, with norms of each head at most",
                          hint="run this model on --device cpu")
    refuse_unsupported(model.attention_specs, "the JAX example")


class Parameter(NamedTuple):
    """A parameter of all ranks. Attributes: parts: of each projection of a linear layer, or the one tensor of any other
    module. linear: which of the two. shared: the dimension along which ranks share it; None: each has all of it."""

    parts: list[torch.Tensor]
    linear: bool
    shared: int | None


def _parameters(modules: Sequence[Any], without: str = "-") -> dict[str, Parameter]:
    """The parameters of one module of each rank, side by side, by name; not those of modules called `without`..."""
    found, of_rank = {}, [dict(module.named_modules()) for module in modules]
    for path, module in of_rank[0].items():
        for key, parameter in module.named_parameters(recurse=False) if not path.startswith(without) else ():
            shared, linear = spec_of(parameter).sharded, isinstance(module, Linear)
            tensors = [rank[path].get_parameter(key) for rank in (of_rank[:1] if shared is None else of_rank)]
            pieces = [tensor.split(module.outputs) if linear else (tensor,) for tensor in tensors]
            name = f"{GPT2.get(path, path)}.{key}" if path else GPT2.get(key, key)
            parts = [torch.cat(same, shared or 0) if len(same) > 1 else same[0] for same in zip(*pieces, strict=True)]
            found[name] = Parameter(parts, linear, shared)
    return found


def place_weights(shares: Sequence[CausalLM], place: Callable[..., Any]) -> Weights:
    """The stage's arrays by name. `place(array, dim)` puts an array on the devices, which share its dimension `dim`.
    Under "layers" are the arrays of all layers, stacked in a first dimension, then the window of each layer and the
    number of its rotary table."""
    model, stage, layers = shares[0], list(shares[0].stage), dict[str, Any]()
    of_layers = [_parameters([share.layers[i] for share in shares]) for i in range(len(stage))]
    for name, first in of_layers[0].items():
        stacked = [place(np.stack([to_numpy(layer[name].parts[i]) for layer in of_layers]),
                         None if first.shared is None else first.shared + 1) for i in range(len(first.parts))]
        layers[name] = stacked if first.linear else stacked[0]
    tables = [table for name, table in model.named_buffers() if name.startswith("rope_table")]
    ropes = [model.config.layer_rope(i) for i in stage] if tables else []
    of_layer = ([spec.window or FAR for spec in model.attention_specs],
                [len(tables) if rope is None else model.ropes.index(rope) for rope in ropes] or [0] * len(stage))
    weights: Weights = {"layers": (layers, *(place(np.array(x, np.int32), None) for x in of_layer))}
    if tables:
        still = torch.ones_like(tables[0])  # the table of layers without rotary embedding: no angle
        still[:, still.shape[1] // 2:] = 0
        weights["rope"] = place(to_numpy(torch.stack([*tables, still])), None)
    for name, (parts, linear, shared) in _parameters(shares, without="layers.").items():
        arrays = [place(to_numpy(part), shared) for part in parts]
        weights[name] = arrays if linear else arrays[0]
    if model.config.tie_embeddings and {"embed.weight", "head.weight"} <= weights.keys():
        weights["head.weight"] = [weights["embed.weight"]]
    return weights
